"""Words become ids and come back; and which ids a model may generate."""

import numpy as np
import pytest

from spg_jax.data.tokenizers import WordTokenizer

pytestmark = pytest.mark.fast

WORDS = ('<answer>', '</answer>', '+', '-', '=', *map(str, range(101)))


def test_specials_come_first():
    tokenizer = WordTokenizer(WORDS)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.size == 3 + len(WORDS)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('', []),
        (' \n', []),
        ('30 + 93 - 100', ['30', '+', '93', '-', '100']),
        ('<answer>30+93</answer>', ['<answer>', '30', '+', '93', '</answer>']),
        ('  1\n\t0 10', ['1', '0', '10']),
    ],
)
def test_encode_is_the_longest_word_and_decode_undoes_it(text, words):
    tokenizer = WordTokenizer(WORDS)
    ids = tokenizer.encode(text)
    assert ids == [3 + WORDS.index(word) for word in words]
    assert tokenizer.decode(ids) == ' '.join(words)


def test_longest_word_wins_whatever_the_order():
    assert WordTokenizer(('a', 'ab', 'abc')).encode('abcab a') == [5, 4, 3]


@pytest.mark.parametrize(
    ('text', 'unknown'),
    [('1 * 2', r"'\*'"), ('3 300', "'300'"), ('<mask>', "'<mask>'"), ('x', "'x'")],
)
def test_unknown_text_is_named(text, unknown):
    with pytest.raises(ValueError, match=f'{unknown} at character'):
        WordTokenizer(WORDS).encode(text)


def test_single_digits_split_a_run():
    assert WordTokenizer(tuple('01234')).encode('4 3120') == [7, 6, 4, 5, 3]


def test_decode_stops_before_eos_or_shows_everything():
    tokenizer = WordTokenizer(('a', 'b'))
    ids = np.array([3, 0, 2, 4, 1, 3])
    assert tokenizer.decode(ids) == 'a b'
    assert tokenizer.decode(ids, keep_specials=True) == 'a <mask> <pad> b <eos> a'
    assert tokenizer.decode([1, 3]) == ''
    for bad in (5, -1):
        with pytest.raises(ValueError, match=f'token id {bad} is outside the vocabulary of 5'):
            tokenizer.decode([3, bad])


def test_allowed_is_eos_and_words():
    tokenizer = WordTokenizer(('a', 'b'))
    assert tokenizer.allowed(8).tolist() == [False, True, False, True, True, False, False, False]
    with pytest.raises(ValueError, match='4 token ids .* vocabulary of 5'):
        tokenizer.allowed(4)


@pytest.mark.parametrize('words', [(), ('a', 'a'), ('',), ('a b',), (' a',), ('<eos>',)])
def test_impossible_vocabularies(words):
    with pytest.raises(ValueError, match='vocabulary'):
        WordTokenizer(words)

"""Prompts that are too long, counted by hand, under every rule for them; and batches of prompts."""

import numpy as np
import pytest

from spg_jax import tasks
from spg_jax.data import batches
from spg_jax.data.demonstrations import Lessons, encode_pairs
from spg_jax.data.tokenizers import WordTokenizer

pytestmark = pytest.mark.fast

# A compact Countdown prompt has one token for each number, for '=', for the target and for ':'.
NUMBERS = ([3, 2, 1], [4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [9, 1, 1])
EXAMPLES = [
    {'numbers': numbers, 'target': 7, 'index': index} for index, numbers in enumerate(NUMBERS)
]
COUNT = '2 of 4 training prompts are longer than sampling.prompt_length 6, up to 9 tokens'


@pytest.fixture
def task():
    return tasks.get('countdown')


@pytest.fixture
def tokenizer(task):
    return WordTokenizer(task.vocabulary)


def fit(task, tokenizer, rule, length=6):
    return batches.fit_prompts(task, tokenizer, EXAMPLES, length, rule)


def test_long_prompts_are_dropped_and_counted(task, tokenizer):
    problems, message = fit(task, tokenizer, 'drop')
    assert problems.places.tolist() == [0, 3] and problems.lengths.tolist() == [6, 6]
    assert message == f'{COUNT}: dropped'
    iterator = batches.prompts(task, tokenizer, problems, batch_size=2, buckets=(6,), seed=0)
    assert sorted(next(iterator).index.tolist()) == [0, 3]


def test_long_prompts_keep_their_end(task, tokenizer):
    problems, message = fit(task, tokenizer, 'truncate_left')
    assert problems.places.tolist() == [0, 1, 2, 3] and message == f'{COUNT}: cut to their last 6'
    assert problems.lengths.tolist() == [6, 6, 6, 6]
    batch = batches.encode_prompts(task, tokenizer, EXAMPLES, 6, truncate=True)
    texts = [tokenizer.decode(row) for row in batch.prompt]
    assert texts == ['3 2 1 = 7 :', '3 2 1 = 7 :', '3 2 1 = 7 :', '9 1 1 = 7 :']
    assert batch.prompt_mask.all()
    problems, _ = fit(task, tokenizer, 'truncate_left', length=4)
    iterator = batches.prompts(
        task, tokenizer, problems, batch_size=4, buckets=(4,), seed=0, truncate=True
    )
    assert {tokenizer.decode(row) for row in next(iterator).prompt} == {'1 = 7 :'}


@pytest.mark.parametrize(
    ('rule', 'length', 'message'),
    [
        ('error', 6, "tokens; set it to at least 9, or .* to 'truncate_left' or 'drop'$"),
        ('drop', 5, "^4 of 4 .*_length 5, up to 9 tokens; set .* to 'truncate_left'$"),
    ],
)
def test_long_prompts_are_refused(task, tokenizer, rule, length, message):
    with pytest.raises(ValueError, match=message) as error:
        fit(task, tokenizer, rule, length)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('rule', batches.LONG_PROMPTS)
def test_nothing_is_said_where_all_fit(task, tokenizer, rule):
    problems, message = fit(task, tokenizer, rule, length=9)
    assert message == '' and problems.places.tolist() == [0, 1, 2, 3]
    assert problems.lengths.tolist() == [6, 7, 9, 6]


def test_a_batch_is_padded_to_the_shortest_bucket_that_fits_it(task, tokenizer):
    """The length does not depend on which part of the batch a process reads."""
    problems, _ = fit(task, tokenizer, 'error', length=9)
    settings = dict(batch_size=2, buckets=(6, 8, 9), seed=0)
    whole = batches.prompts(task, tokenizer, problems, **settings)
    parts = [
        batches.prompts(task, tokenizer, problems, **settings, local_prompts=np.array([row]))
        for row in (0, 1)
    ]
    seen = set()
    for _ in range(20):
        batch, *rows = [next(iterator) for iterator in (whole, *parts)]
        longest = max(problems.lengths[batch.index % 4])
        assert batch.prompt.shape[1] == {6: 6, 7: 8, 9: 9}[longest]
        for name in ('prompt', 'prompt_mask', 'index'):
            joined = np.concatenate([getattr(row, name) for row in rows])
            np.testing.assert_array_equal(joined, getattr(batch, name))
        seen.add(batch.prompt.shape[1])
    assert seen == {6, 8, 9}


def test_a_prompt_drawn_again_is_another_one(task, tokenizer):
    """Batches of three cross the ends of the four problems, within which none comes twice."""
    problems, _ = fit(task, tokenizer, 'error', length=9)
    stream = batches.prompts(task, tokenizer, problems, batch_size=3, buckets=(9,), seed=0)
    drawn = [next(stream) for _ in range(8)]
    index = np.concatenate([batch.index for batch in drawn])
    assert sorted(index) == list(range(24))
    for batch in drawn:
        assert [example['index'] for example in batch.examples] == (batch.index % 4).tolist()
    state = stream.get_state()
    after = next(stream).index
    stream.set_state(state)
    np.testing.assert_array_equal(next(stream).index, after)


def test_prompts_past_every_bucket_have_room_in_few_lengths():
    assert [batches.padded_length(n, (6, 9)) for n in (1, 6, 7, 9, 10, 64, 65)] == [
        *(6, 6, 9, 9),
        *(64, 64, 128),
    ]


def test_rows_are_padded_on_the_left():
    tokens, valid = batches.left_pad([[5], [], [7, 8, 9]], 3, pad_id=2)
    np.testing.assert_array_equal(tokens, [[2, 2, 5], [2, 2, 2], [7, 8, 9]])
    np.testing.assert_array_equal(valid, [[0, 0, 1], [0, 0, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match='4 tokens, more than sampling.prompt_length 3'):
        batches.left_pad([[1, 2, 3, 4]], 3, pad_id=2)


def test_records_that_do_not_fit_are_refused_before_training(task, tokenizer):
    fits = (EXAMPLES[0], '<answer> 1 </answer>')
    batch = encode_pairs(task, tokenizer, [fits], 6, 4)
    assert tokenizer.decode(batch.completion[0]) == fits[1]
    with pytest.raises(ValueError, match='7 tokens, more than sampling.prompt_length 6'):
        encode_pairs(task, tokenizer, [fits, (EXAMPLES[1], '')], 6, 4)
    with pytest.raises(ValueError, match='more than sampling.length 3; set it to at least 4'):
        encode_pairs(task, tokenizer, [fits], 6, 3)


def test_the_stage_after_the_largest_seed_has_a_seed(task, tokenizer):
    """The second stage of a base policy has the seed after that of the first."""
    lessons = Lessons(
        task=task,
        tokenizer=tokenizer,
        problems=[],
        records=[(example, '<answer> 1 </answer>') for example in EXAMPLES],
        batch_size=4,
        local_rows=np.arange(4),
        prompt_length=9,
        length=4,
    )
    orders = [next(lessons.batches(1.0, seed)).index.tolist() for seed in (2**32, 0, 2**32 - 1)]
    assert orders[0] == orders[1] and sorted(orders[2]) == [0, 1, 2, 3]

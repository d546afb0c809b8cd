"""Published tokenizers: prompts against templates written by hand, and files that are refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spg_jax.data.hf_tokenizer import HFTokenizer
from spg_jax.models.weights import read_config
from tests.published import (
    END,
    HEADER,
    MASK,
    OWN_TEMPLATE,
    SIZE,
    SPECIALS,
    START,
    TURN_END,
    asked,
    byte_pairs,
    save_tokenizer,
)

TEXT = ' Use 3, 44 and 7.\nReach 26: '


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokenizer')
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope='module')
def tokenizer(folder):
    return HFTokenizer(folder, MASK, END, END)


@pytest.mark.parametrize('prefill', ['', '<reasoning>', '<reasoning>\n'])
def test_a_prompt_is_one_user_turn_and_the_opening_of_the_answer(tokenizer, prefill):
    ids = tokenizer.encode_prompt(TEXT, prefill)
    assert ids == asked(byte_pairs(), TEXT, prefill)
    assert ids.count(START) == 1 and ids.count(HEADER) == 2


def test_our_own_template_writes_the_same(tokenizer, tmp_path):
    save_tokenizer(tmp_path, chat_template=OWN_TEMPLATE)
    with_own_template = HFTokenizer(tmp_path, MASK, END, END)
    assert with_own_template.encode_prompt(TEXT, 'x') == tokenizer.encode_prompt(TEXT, 'x')


def test_a_template_may_be_a_file_of_its_own(folder, tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / 'read', dirs_exist_ok=True)
    (tmp_path / 'read' / 'chat_template.jinja').write_text(OWN_TEMPLATE)
    settings(chat_template=None)(tmp_path / 'read')
    read = HFTokenizer(tmp_path / 'read', MASK, END, END)
    read.save(tmp_path / 'saved')
    for copy in (read, HFTokenizer(tmp_path / 'saved', MASK, END, END)):
        assert copy.encode_prompt(TEXT, 'x') == tokenizer.encode_prompt(TEXT, 'x')


@pytest.mark.skipif('SPG_JAX_REFERENCE' not in os.environ, reason='needs the published files')
def test_the_published_settings_of_llada_give_its_ids(tmp_path):
    """With as many words as LLaDA has before its special tokens; ids were typed from its files."""
    published = Path(os.environ['SPG_JAX_REFERENCE']) / 'reference' / 'llada_8b_instruct'
    for name in ('config.json', 'tokenizer_config.json', 'special_tokens_map.json'):
        shutil.copy(published / name, tmp_path)
    words = ['hello', 'user', 'assistant', *map(str, range(126080 - 3))]
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: id for id, word in enumerate(words)}, unk_token='hello')
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer_config = json.loads((published / 'tokenizer_config.json').read_text())
    specials = tokenizer_config['added_tokens_decoder']
    backend.add_special_tokens([token['content'] for token in specials.values()])
    backend.save(str(tmp_path / 'tokenizer.json'))
    _, ids = read_config(tmp_path / 'config.json')
    tokenizer = HFTokenizer(tmp_path, *ids)
    opening = [126346, 2, 126347]
    assert tokenizer.encode_prompt('hello') == [126080, 126346, 1, 126347, 0, 126348, *opening]
    allowed = tokenizer.allowed(126464)
    assert allowed.sum() == 126348 and not allowed[126336] and allowed[126081]
    assert not allowed[126349:].any()
    assert tokenizer.decode([5, 126348, 126081, 6]) == '2'


def test_the_tokenizer_of_dream_is_read_without_its_code(tmp_path):
    """Its files are those of Qwen2: vocab.json, merges.txt, and special tokens in the settings."""
    specials = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|beginoftext|>', '<|mask|>')
    backend = byte_pairs(())
    model = json.loads(backend.to_str())['model']
    (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab']))
    merges = [' '.join(pair) for pair in model['merges']]
    (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]))
    first = len(model['vocab'])
    added = {str(first + i): {'content': text, 'special': True} for i, text in enumerate(specials)}
    turn = '<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n'
    declared = {
        'tokenizer_class': 'DreamTokenizer',
        'auto_map': {'AutoTokenizer': ['tokenization_dream.DreamTokenizer', None]},
        'added_tokens_decoder': added,
        'chat_template': turn,
        'unk_token': None,
    }
    declared |= {'eos_token': specials[0], 'pad_token': specials[0], 'mask_token': specials[4]}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(declared))
    tokenizer = HFTokenizer(tmp_path, first + 4, first, first)
    ids = tokenizer.encode('Use 3, 44')
    assert tokenizer.decode(ids) == 'Use 3, 44'
    # Qwen2 splits numbers into digits, and has the ids of its vocabulary.
    assert ids[-2:] == [model['vocab']['4']] * 2 and max(ids) < first
    start, end = first + 1, first + 2
    prompt = tokenizer.encode_prompt('Use 3, 44')
    assert (prompt[0], prompt.count(start), prompt.count(end)) == (start, 2, 1)
    assert not tokenizer.allowed(first + 8)[first + 4]
    tokenizer.save(tmp_path / 'copy')
    assert HFTokenizer(tmp_path / 'copy', first + 4, first, first).encode_prompt('x')


def test_text_comes_back_as_it_was(tokenizer):
    for text in ('', ' a  b ', TEXT, '<answer>\n(44 - 3) / 7 = 5.9\n</answer>', 'don \'t , "x" .'):
        ids = tokenizer.encode(text)
        assert START not in ids
        assert tokenizer.decode(ids) == text


def test_decode_stops_before_eos_and_drops_specials_or_shows_everything(tokenizer):
    first, second = tokenizer.encode('12'), tokenizer.encode(' 3')
    ids = np.array([*first, MASK, TURN_END, *second, END, *first])
    assert tokenizer.decode(ids) == '12 3'
    shown = [*first, TURN_END, *second, END, *first]
    assert tokenizer.decode(shown, keep_specials=True) == '12<|eot_id|> 3<|endoftext|>12'
    assert tokenizer.decode([END, *first]) == ''
    for bad in (SIZE, -1):
        with pytest.raises(ValueError, match=f'token id {bad} is not in the tokenizer'):
            tokenizer.decode([bad])


def test_allowed_is_what_the_tokenizer_has_but_not_mask(folder, tokenizer, tmp_path):
    allowed = tokenizer.allowed(256)
    assert tokenizer.size == SIZE
    assert np.flatnonzero(allowed).tolist() == list(range(SIZE))  # with EOS, which is also PAD
    with pytest.raises(ValueError, match=r'ids up to 239, the embedding of the model has 200 rows'):
        tokenizer.allowed(200)
    # In this tokenizer MASK and PAD are separate tokens, and the ids have a gap.
    save_tokenizer(tmp_path, backend=byte_pairs((*SPECIALS, '<|mdm_mask|>', '<|pad|>')))
    saved = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(saved | {'pad_token': '<|pad|>'}))
    path = tmp_path / 'tokenizer.json'
    backend = json.loads(path.read_text())
    last = max(backend['model']['vocab'], key=backend['model']['vocab'].get)
    backend['model']['vocab'][last] += 3
    path.write_text(json.dumps(backend))
    other = HFTokenizer(tmp_path, mask_id=5, eos_id=END, pad_id=6)
    expected = (set(range(SIZE)) - {5, 6, SIZE - 1}) | {SIZE + 2}
    assert other.size == SIZE + 3
    assert set(np.flatnonzero(other.allowed(256)).tolist()) == expected


def test_saving_copies_the_files_byte_for_byte(folder, tokenizer, tmp_path):
    description = tokenizer.save(tmp_path / 'copy')
    assert description == {'hf_tokenizer': {'mask_id': MASK, 'eos_id': END, 'pad_id': END}}
    copied = {path.name: path.read_bytes() for path in (tmp_path / 'copy').iterdir()}
    assert copied == {path.name: path.read_bytes() for path in folder.iterdir()}
    copy = HFTokenizer(tmp_path / 'copy', MASK, END, END)
    assert copy.encode_prompt(TEXT) == tokenizer.encode_prompt(TEXT)


def test_text_without_an_id_is_refused(tmp_path):
    words = ['<|unk|>', 'x', *SPECIALS, 'a', 'b']
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: id for id, word in enumerate(words)}, unk_token='<|unk|>')
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token='<|unk|>',
        bos_token=SPECIALS[START],
        eos_token=SPECIALS[END],
    )
    hf.save_pretrained(tmp_path)
    settings(chat_template='{{ messages[0].content }}')(tmp_path)
    tokenizer = HFTokenizer(tmp_path, MASK, 3, 3)
    assert tokenizer.encode_prompt('a b', ' x') == [7, 8, 1]
    with pytest.raises(ValueError, match="no id for a part of 'a c'"):
        tokenizer.encode_prompt('a c')


def edit(name, change):
    def edited(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return edited


def remove(name):
    return lambda folder: (folder / name).unlink()


def settings(**changes):
    return edit('tokenizer_config.json', lambda text: json.dumps(json.loads(text) | changes))


@pytest.mark.parametrize(
    ('damage', 'ids', 'message'),
    [
        (remove('tokenizer_config.json'), {}, 'tokenizer_config.json does not exist'),
        (remove('tokenizer.json'), {}, 'the tokenizer cannot be read .*download tokenizer.json'),
        (edit('tokenizer.json', lambda text: text[:50]), {}, 'the tokenizer cannot be read'),
        (settings(chat_template=None), {}, 'tokenizer_config.json has no chat_template'),
        (settings(chat_template='{% if %}'), {}, r'chat_template cannot be used \(Template'),
        (settings(chat_template='{{ 1 / 0 }}'), {}, r'cannot be used \(ZeroDivision'),
        (settings(chat_template='<|im_start|>'), {}, r"writes '<\|im_start\|>', which is no"),
        (settings(), {'eos_id': 3}, r"eos_token is '<\|endoftext\|>', id 1, but .*eos_token_id 3"),
        (settings(), {'pad_id': 3}, r"pad_token is '<\|endoftext\|>', id 1, but .*pad_token_id 3"),
        (settings(mask_token='<|eot_id|>'), {}, 'mask_token is .*, id 4, but .*mask_token_id 250'),
        (settings(eos_token=None), {}, 'eos_token is missing, but .*eos_token_id 1 '),
        (settings(eos_token='<|stop|>'), {}, r"eos_token is '<\|stop\|>', id 240, but"),
        (settings(), {'mask_id': 40}, 'mask_token_id 40 of config.json is the ordinary token'),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(folder, tmp_path, damage, ids, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        HFTokenizer(tmp_path, **({'mask_id': MASK, 'eos_id': END, 'pad_id': END} | ids))
    assert '\n' not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('missing', ['transformers', 'jinja2'])
def test_without_the_extra_it_says_how_to_install_it(folder, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"needs {missing}; pip install -e '\.\[hf\]'"):
        HFTokenizer(folder, MASK, END, END)


def test_code_beside_a_tokenizer_is_never_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\nclass Evil: pass\n')
    settings(auto_map={'AutoTokenizer': ['evil.Evil', None]})(tmp_path)
    assert HFTokenizer(tmp_path, MASK, END, END).encode_prompt('a')
    assert not (tmp_path / 'ran').exists()

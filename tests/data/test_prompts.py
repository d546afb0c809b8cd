"""Lengths of prompts are measured once, and anew where anything that they depend on has changed."""

import shutil

import numpy as np
import pytest

from spg_jax import tasks
from spg_jax.data import prompts
from spg_jax.data.prompts import prompt_lengths, prompt_tokens
from spg_jax.data.tokenizers import WordTokenizer


@pytest.fixture
def sudoku(data_dir, tmp_path):
    """Problems of which nobody has measured the prompts."""
    task = tasks.get('sudoku')
    task.source('test', data_dir)
    is_kept = shutil.ignore_patterns('prompt_lengths-*')
    shutil.copytree(data_dir / 'sudoku', tmp_path / 'sudoku', ignore=is_kept)
    return task, WordTokenizer(task.vocabulary), task.source('test', tmp_path)


def measured(monkeypatch):
    """Notes how often prompts are measured."""
    calls, measure = [], prompts._measure
    monkeypatch.setattr(prompts, '_measure', lambda *given: (calls.append(1), measure(*given))[1])
    return calls


def test_kept_lengths_are_those_of_the_prompts(sudoku, monkeypatch):
    task, tokenizer, source = sudoku
    calls = measured(monkeypatch)
    expected = [len(prompt_tokens(task, tokenizer, example)) for example in source]
    for _ in range(2):
        lengths = prompt_lengths(task, tokenizer, source)
        assert lengths.dtype == np.int32 and lengths.tolist() == expected
    assert len(calls) == 1


def test_other_words_wordings_and_splits_are_measured_anew(sudoku, tmp_path, monkeypatch):
    task, tokenizer, source = sudoku
    prompt_lengths(task, tokenizer, source)
    calls = measured(monkeypatch)
    prompt_lengths(task, WordTokenizer([*task.vocabulary, 'more']), source)
    wording = tmp_path / 'wording.txt'
    wording.write_text('{puzzle} : :')
    longer = prompt_lengths(tasks.get('sudoku', 'compact', str(wording)), tokenizer, source)
    assert longer.tolist() == [18] * len(source)
    prompt_lengths(task, tokenizer, task.source('validation', tmp_path))
    assert len(calls) == 3


def test_a_damaged_file_of_lengths_is_not_believed(sudoku, monkeypatch):
    task, tokenizer, source = sudoku
    expected = prompt_lengths(task, tokenizer, source)
    (file,) = source.directory.glob('prompt_lengths-*.npz')
    other = expected + 1
    with np.load(file) as content:
        np.savez_compressed(file, lengths=other, digest=content['digest'])
    for damage in (file.read_bytes(), file.read_bytes()[:40], b''):
        file.write_bytes(damage)
        assert prompt_lengths(task, tokenizer, source).tolist() == expected.tolist()

"""The interface of every task: names, formats, prompt files, vocabularies, figures."""

import os
import sys

import numpy as np
import pytest

from spg_jax import tasks
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.tasks.task import Score
from tests import processes

EXAMPLES = {
    'countdown': {'numbers': [74, 3, 5], 'target': 37},
    'gsm8k': {'question': 'What is 9 times 2?', 'answer': '18', 'solution': '9 * 2 = 18'},
    'math500': {'question': 'Halve 1.', 'answer': r'\frac12', 'solution': 'It is half.'},
    'sudoku': {'puzzle': '0040423100030104', 'solution': '1342423124133124'},
}


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError,
        match="task is 'sudocu', perhaps sudoku; use one of countdown, gsm8k, math500, sudoku, or",
    ):
        tasks.get('sudocu')
    with pytest.raises(
        ValueError, match="'short'; use one of compact, published_train, published_eval"
    ):
        tasks.get('sudoku', 'short')
    with pytest.raises(ValueError, match="format of task gsm8k is 'compact'; use one of pub"):
        tasks.get('gsm8k')


@pytest.mark.parametrize('name', ['countdown', 'sudoku'])
def test_vocabulary_covers_compact_text(name):
    task, example, rng = tasks.get(name), EXAMPLES[name], np.random.default_rng(0)
    tokenizer = WordTokenizer(task.vocabulary)
    for text in (task.prompt(example), *(task.demonstration(example, rng, p) for p in (0.0, 1.0))):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())  # Every word is one token.
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize('name', sorted(tasks.TASKS))
def test_a_right_demonstration_is_right(name):
    formats = set(tasks.TASKS[name].formats)
    for format in formats - {'published_eval'}:
        task, rng = tasks.get(name, format), np.random.default_rng(0)
        assert task.reward(task.demonstration(EXAMPLES[name], rng, 1.0), EXAMPLES[name]) >= 1
    for format in formats - {'published_train'}:
        task, rng = tasks.get(name, format), np.random.default_rng(0)
        assert task.score(task.demonstration(EXAMPLES[name], rng, 1.0), EXAMPLES[name]).solved


def test_prompt_template_file(tmp_path):
    path = tmp_path / 'prompt.txt'
    path.write_text('Make {target} of {numbers}, inside \\boxed{}, {as usual}.\n')
    task = tasks.get('countdown', 'published_eval', str(path))
    expected = 'Make 37 of 74, 3, 5, inside \\boxed{}, {as usual}.\n'
    assert task.prompt(EXAMPLES['countdown']) == expected
    assert task.prefill == '<reasoning>'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (
            '{numbers}',
            r'placeholder \{target\} is missing; this task needs \{numbers\} and \{target\}',
        ),
        ('{numbers} {target} {goal}', r'unknown placeholder \{goal\}; this task fills in'),
        (None, 'cannot be read .No such file or directory'),
        (b'\xff{numbers}', 'cannot be read .UnicodeDecodeError'),
    ],
)
def test_wrong_prompt_template(tmp_path, text, message):
    path = tmp_path / 'prompt.txt'
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        tasks.get('countdown', prompt_template=str(path))
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_a_prompt_template_in_a_pipe_is_refused():
    """A shell gives such a path for `<(command)`; a run would read nothing the second time."""
    reader, writer = os.pipe()
    os.write(writer, b'{numbers} {target}')
    os.close(writer)
    try:
        with pytest.raises(ValueError, match=f'/dev/fd/{reader} is a pipe, .*; save it in a file'):
            tasks.get('countdown', prompt_template=f'/dev/fd/{reader}')
    finally:
        os.close(reader)


def test_worked_examples(tmp_path):
    with pytest.raises(ValueError, match='task.shots is 4; format published_train of task sudoku'):
        tasks.get('sudoku', 'published_train', shots=4)
    for name, format in (('sudoku', 'compact'), ('countdown', 'published_train')):
        with pytest.raises(ValueError, match=f'shots is 1; format {format} of .* has no worked'):
            tasks.get(name, format, shots=1)
    path = tmp_path / 'prompt.txt'
    path.write_text('Fill {puzzle}!')
    with pytest.raises(ValueError, match=r'placeholder \{examples\} is missing'):
        tasks.get('sudoku', 'published_eval', str(path), shots=1)
    path.write_text('{examples}Fill {puzzle}!')
    bare, worked = (tasks.get('sudoku', 'published_eval', str(path), shots=n) for n in (0, 1))
    assert bare.prompt(EXAMPLES['sudoku']) == 'Fill 0040423100030104!'
    shown = worked.prompt(EXAMPLES['sudoku'])
    assert shown.startswith('Puzzle: 0201130030002140\n<reasoning>\n') and 'Fill 004' in shown
    path.write_text('{examples} {numbers} {target}')
    with pytest.raises(ValueError, match=r'unknown placeholder \{examples\}'):
        tasks.get('countdown', 'published_eval', str(path))


def test_figures_pool_items():
    scores = [Score(8, 8, True), Score(1, 12, False)]
    assert tasks.get('sudoku').figures(scores) == {
        'task': 'sudoku',
        'accuracy': 9 / 20,
        'correct': 9,
        'total': 20,
        'grid_accuracy': 0.5,
        'scorer': 'compact',
    }
    scores = [Score(1, 1, True), Score(0, 1, False), Score(0, 1, False)]
    assert tasks.get('countdown', 'published_eval').figures(scores) == {
        'task': 'countdown',
        'accuracy': 1 / 3,
        'correct': 1,
        'total': 3,
        'scorer': 'published',
    }
    with pytest.raises(ValueError, match='nothing to score'):
        tasks.get('countdown').figures([])


def test_tasks_need_neither_jax_nor_tensorflow():
    code = (
        'import sys; from spg_jax import tasks, score; from spg_jax.data import tokenizers; '
        '[tasks.get(name, "published_train").builder() for name in tasks.TASKS]; '
        'print(sorted({"jax", "flax", "tensorflow"} & set(sys.modules)))'
    )
    done = processes.run([sys.executable, '-c', code])
    assert done.stdout.strip() == '[]', done.stderr

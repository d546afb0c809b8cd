"""The reported faults that a scorer or a reader of files can show, as tests/reference holds them.

`case.verdict` rows are judged here; `command` rows of `spg_jax.score` run as the row says.
"""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import scoring
from spg_jax import tasks
from spg_jax.tasks import judge
from tests.processes import run

FAULTS = Path(__file__).parents[1] / 'reference' / 'faults.jsonl'
ROWS = [json.loads(line) for line in FAULTS.read_text(encoding='utf-8').splitlines()]
CASES = {row['id']: row['case'] for row in ROWS if 'case' in row}
VERDICTS = {name: case['verdict'] for name, case in CASES.items() if 'verdict' in case}
COMMANDS = {
    name: case
    for name, case in CASES.items()
    if case.get('command', {}).get('module') == 'spg_jax.score'
}
# The least reward of a right answer; a wrong one earns less.
RIGHT = {'countdown': 1, 'gsm8k': 2, 'math500': 2}


def test_the_file_has_the_rows_that_are_tested():
    assert len(VERDICTS) == 31 and len(COMMANDS) == 8


@pytest.mark.parametrize('name', VERDICTS)
def test_verdict(name):
    case = VERDICTS[name]
    for format in ('published_train', 'published_eval'):
        task = tasks.get(case['task'], format, rules=case['rules'])
        example = task.read_record(case['question'], case['ground_truth'])
        if case['judge']:
            pytest.importorskip('math_verify')
            task = judge.judged(task)
        assert task.score(case['completion'], example).solved == case['right']
        if case['rules'] == 'mended':
            is_rewarded = task.reward(case['completion'], example) >= RIGHT[case['task']]
            assert is_rewarded == case['right']


@pytest.mark.parametrize('name', COMMANDS)
def test_command(name, tmp_path):
    case = COMMANDS[name]
    command, stdin = case['command'], None
    for file, text in command['files'].items():
        if file == 'stdin':
            stdin = text
        else:
            (tmp_path / file).write_text(text, encoding='utf-8')
    words = shlex.join([sys.executable, '-m', command['module']])
    words += ''.join(
        f' {word}' if word.startswith('>') else f' {shlex.quote(word)}' for word in command['argv']
    )
    done = run(
        ['bash', '-c', words],
        stdin or '',
        cwd=tmp_path,
        env={**os.environ, **command['env'], 'PYTHONPATH': str(Path(__file__).parents[2])},
    )
    expected = case['expect']
    if expected.startswith('refused'):
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, '')
        figures = json.loads(done.stdout)
        assert figures['accuracy'] == 1.0
        if expected.startswith('total '):
            assert figures['total'] == int(expected.removeprefix('total '))
        else:
            assert expected == 'as from a file' and figures['total'] == 1


def test_the_page_shows_the_table_that_its_command_makes():
    pytest.importorskip('math_verify')
    page = (FAULTS.parents[2] / 'docs' / 'scoring.md').read_text(encoding='utf-8')
    assert page.endswith(f'\n{scoring.table(FAULTS)}\n')

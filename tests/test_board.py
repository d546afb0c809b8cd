"""The board: its verdicts are the stored ones, and unlike figures have columns of their own."""

import json
from pathlib import Path

import pytest

from benchmarks import board
from spg_jax import tasks
from spg_jax.tasks.card import VERSIONS
from tests.tasks.conftest import reference  # noqa: F401

pytestmark = pytest.mark.fast

CASES = Path(__file__).parent / 'tasks'


def stored_counts(path):
    """(right, asked for) of each task, counted from the verdicts that a file holds."""
    counts = {}
    for line in path.open():
        case = json.loads(line)
        verdict = case['score']
        right, total = (int(verdict), 1) if isinstance(verdict, bool) else verdict
        before = counts.get(case['task'], (0, 0))
        counts[case['task']] = before[0] + right, before[1] + total
    return counts


def released(rows):
    return [row for row in rows if row['card']['scorer'] == 'published']


@pytest.mark.parametrize('name', tasks.TASKS)
def test_the_verdicts_that_are_counted_are_the_stored_ones(name):
    path = CASES / f'{name}_completions.jsonl'
    (row,) = released(board.rescored(str(path)))
    assert (row['correct'], row['total']) == stored_counts(path)[name]
    assert row['as_stored'] == row['stored'] == len(path.read_text().splitlines())


def test_a_verdict_that_is_not_the_stored_one_is_counted(tmp_path):
    cases = [json.loads(line) for line in (CASES / 'gsm8k_completions.jsonl').open()]
    cases[3]['score'] = not cases[3]['score']
    (tmp_path / 'file.jsonl').write_text('\n'.join(map(json.dumps, cases)))
    (row,) = released(board.rescored(str(tmp_path / 'file.jsonl')))
    assert (row['as_stored'], row['stored']) == (len(cases) - 1, len(cases))


def test_the_records_are_those_of_the_published_completions(reference):  # noqa: F811
    path = reference / 'data' / 'llada_generations.jsonl'
    recorded = [
        row
        for row in board._rows(board.SCORED, board.ScoredRow)
        if row['name'] == board.PUBLISHED_POLICY
    ]
    assert board.rescored(str(path)) == recorded


def test_the_page_is_made_of_its_records():
    rows = board._rows(board.SCORED, board.ScoredRow)
    published = board._rows(board.PUBLISHED, board.PublishedRow)
    assert board.BOARD.read_text() == board.page(rows, published)
    assert {row['card']['scorer'] for row in rows} <= set(VERSIONS)
    assert all(row['card']['version'] == VERSIONS[row['card']['scorer']] for row in rows)


def columns_of(text, heading):
    """The cells of each row of the first table below a heading, without the outer bars."""
    lines = text.partition(f'### {heading}\n')[2].splitlines()
    rows = [line.strip('|').split('|') for line in lines[1:] if line]
    end = next(place for place, line in enumerate(lines[1:]) if not line.startswith('|'))
    return [[cell.strip() for cell in row] for row in rows[:end]]


def test_sudoku_with_and_without_worked_examples_is_apart():
    text = board.page([], board._rows(board.PUBLISHED, board.PublishedRow))
    shots_of = {}
    for line in text.partition('### Sudoku 4 x 4, published')[2].splitlines():
        if line.startswith('- **'):
            shots_of[line[4]] = next((shots for shots in '03' if f'shots {shots}' in line), '')
        if line.startswith('### '):
            break
    header, _, *rows = columns_of(text, 'Sudoku 4 x 4, published')
    shots = {}
    for row in rows:
        for heading, cell in zip(header[1:-2], row[1:-2], strict=True):
            if cell:
                shots[row[0], cell] = shots_of[heading[0]]
                assert heading[1:] == (shots_of[heading[0]] and f', {shots_of[heading[0]]}-shot')
    assert shots['SPG', '94.0'] == shots['DTM', '99.2'] == '3'
    assert shots['EGSPO', '94.3'] == shots['wd1', '25.2'] == '0'
    assert shots['wd1', '32.1'] == '3' and shots['RSPO', '92.1'] == ''
    assert all(sum(map(bool, row[1:-2])) == 1 for row in rows)


def test_new_figures_take_the_place_of_old_ones_of_the_same_protocol():
    row = {'name': 'a', 'card': {'task': 'countdown'}, 'accuracy': 0.5, 'correct': 1, 'total': 2}
    other = row | {'card': {'task': 'countdown', 'length': 8}}
    newer = row | {'accuracy': 1.0, 'correct': 2}
    assert board.merged([row, other], [newer]) == [newer, other]

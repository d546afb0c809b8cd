"""Sudoku: demonstrations, grids, problems; reward and scores against verdicts set by hand."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spg_jax import tasks
from spg_jax.tasks.sudoku import grids, problems, solver

pytestmark = pytest.mark.fast

HERE = Path(__file__).parent
EXAMPLE = {'puzzle': '0040423100030104', 'solution': '1342423124133124', 'index': 0}
UNITS = [
    *([4 * row + column for column in range(4)] for row in range(4)),
    *([4 * row + column for row in range(4)] for column in range(4)),
    *([corner + step for step in (0, 1, 4, 5)] for corner in (0, 2, 8, 10)),
]


@pytest.fixture(scope='module')
def generated():
    return problems.generate()


def valid(grid):
    return all(sorted(grid[cell] for cell in unit) == list('1234') for unit in UNITS)


def solutions(puzzle):
    """Returns every way to fill a puzzle, from all permutations of each row."""
    permutations = list(map(''.join, itertools.permutations('1234')))
    rows = [
        [row for row in permutations if fits(row, puzzle[start : start + 4])]
        for start in range(0, 16, 4)
    ]
    return [grid for grid in map(''.join, itertools.product(*rows)) if valid(grid)]


def fits(row, clues):
    return all(clue in ('0', cell) for clue, cell in zip(clues, row, strict=True))


@pytest.mark.parametrize('line', (HERE / 'sudoku_completions.jsonl').read_text().splitlines())
def test_reward_and_published_score_by_hand(line):
    case = json.loads(line)
    for format in ('published_train', 'published_eval'):
        task = tasks.get('sudoku', format)
        example = task.read_record(case['question'], case['ground_truth'])
        right, total = case['score']
        verdict = task.score(case['completion'], example)
        assert verdict == (right, total, right == total), case['rule']
        assert task.reward(case['completion'], example) == case['reward'], case['rule']


def test_compact_reward_and_score_read_the_same():
    task = tasks.get('sudoku')
    assert task.scorer == 'compact'
    for answer, right in [('1 3 4 2 4 2 3 1 2 4 1 3 3 1 2 4', 8), ('1 3 4 2', 3), ('x', 0)]:
        completion = f'<answer> 0 </answer> <answer> {answer} </answer>'
        assert task.score(completion, EXAMPLE) == (right, 8, right == 8)
        assert task.reward(completion, EXAMPLE) == right / 8
    full = {'puzzle': EXAMPLE['solution'], 'solution': EXAMPLE['solution']}
    # A puzzle without empty cells must not end in a division by zero.
    assert task.reward('<answer>1</answer>', full) == 0


def test_compact_text():
    task, rng = tasks.get('sudoku'), np.random.default_rng(0)
    assert task.prompt(EXAMPLE) == '0 0 4 0 4 2 3 1 0 0 0 3 0 1 0 4 :'
    assert (
        task.demonstration(EXAMPLE, rng, 1.0)
        == '<answer> 1 3 4 2 4 2 3 1 2 4 1 3 3 1 2 4 </answer>'
    )
    # The missing digits of the rows are 1 2 3, none, 1 2 4, and 2 3.
    assert (
        task.demonstration(EXAMPLE, rng, 0.0)
        == '<answer> 1 2 4 3 4 2 3 1 1 2 4 3 2 1 3 4 </answer>'
    )


@pytest.mark.parametrize('shots', [0, 1, 2, 3])
def test_worked_examples_are_the_first_training_puzzles(shots, generated):
    task = tasks.get('sudoku', 'published_eval', shots=shots)
    prompt = task.prompt(EXAMPLE)
    assert prompt.endswith(f'Puzzle: {EXAMPLE["puzzle"]}\n') and task.prefill == '<reasoning>'
    assert tasks.get('sudoku', 'published_train', shots=shots).prefill == ''
    worked = re.findall(
        r'Puzzle: ([0-4]{16})\n<reasoning>.*?<answer>\n([1-4]{16})\n', prompt, re.DOTALL
    )
    assert worked == generated['train'][:shots]


def test_reasoning_gives_one_forced_cell_a_line(generated):
    step_pattern = re.compile(r'.+: row ([1-4]), column ([1-4]) is ([1-4])\.')
    for puzzle, solution in generated['train'][:300]:
        reasoning, grid = solver.work_out(puzzle)
        opening, *steps, closing = reasoning.split('\n')
        rows = [', '.join(text[row : row + 4] for row in (0, 4, 8, 12)) for text in (puzzle, grid)]
        assert opening.endswith(f': {rows[0]}.') and closing.endswith(f': {rows[1]}.')
        cells = list(puzzle)
        for step in steps:
            row, column, digit = map(int, step_pattern.fullmatch(step).groups())
            cell = 4 * row + column - 5
            assert cells[cell] == '0' and forced(cells, cell, str(digit)), (puzzle, step)
            cells[cell] = str(digit)
        assert ''.join(cells) == grid == solution


def forced(cells, cell, digit):
    """Whether the cell can have no other digit, or the digit no other cell in one of its units."""

    def free(place):
        seen = {cells[peer] for unit in UNITS if place in unit for peer in unit}
        return set('1234') - seen if cells[place] == '0' else set()

    alone = [[place for place in unit if digit in free(place)] for unit in UNITS if cell in unit]
    return free(cell) == {digit} or [cell] in alone


def test_two_solutions_cannot_be_worked_out():
    with pytest.raises(ValueError, match='no single step goes on from 0{16}; try another puzzle'):
        solver.work_out('0' * 16)


def test_there_are_288_grids():
    all_grids = grids.all_grids()
    assert len(set(all_grids)) == 288 and list(all_grids) == sorted(all_grids)
    assert all(map(valid, all_grids))


def test_counting_solutions():
    puzzles = ['0' * 16, '1' + '0' * 15, EXAMPLE['puzzle'], '11' + '0' * 14, '1200' + '0' * 12]
    counts = grids.count_solutions(np.array([list(map(int, puzzle)) for puzzle in puzzles]))
    assert counts.tolist() == [288, 72, 1, 0, len(solutions(puzzles[-1]))]


def test_puzzles_are_what_they_should_be(generated):
    assert {split: len(drawn) for split, drawn in generated.items()} == problems.SIZES
    for split, drawn in generated.items():
        empties = Counter(puzzle.count('0') for puzzle, _ in drawn)
        assert set(empties) == set(problems.EMPTIES)
        for number, published in problems.EMPTIES.items():
            assert empties[number] / len(drawn) == pytest.approx(published / 256, abs=0.01)
        for puzzle, solution in drawn[:100]:
            assert solutions(puzzle) == [solution], split


def test_splits_share_no_solution_and_no_published_puzzle(generated):
    grids_of = {
        split: {grids.all_grids().index(solution) for _, solution in drawn}
        for split, drawn in generated.items()
    }
    assert grids_of == {split: set(pool) for split, pool in problems.grids_of_splits().items()}
    assert {split: len(pool) for split, pool in grids_of.items()} == {
        'test': 88,
        'validation': 24,
        'train': 176,
    }
    for first, second in itertools.combinations(grids_of.values(), 2):
        assert not first & second
    assert grids_of['test'] == set(problems.published()['solutions'])
    puzzles = [puzzle for drawn in generated.values() for puzzle, _ in drawn]
    assert len(set(puzzles)) == len(puzzles)
    assert len(problems.published()['puzzles']) == 256
    assert not set(problems.published()['puzzles']) & set(map(problems.identity, puzzles))


def test_a_published_puzzle_is_never_drawn(generated, monkeypatch):
    first, _ = generated['test'][0]
    forbidden = {**problems.published(), 'puzzles': [problems.identity(first)]}
    monkeypatch.setattr(problems, 'published', lambda: forbidden)
    monkeypatch.setattr(problems, 'SIZES', {'test': 256})
    assert first not in {puzzle for puzzle, _ in problems.generate()['test']}


def test_generation_is_the_same_for_ever(generated):
    """Problems are pinned, so that figures of different releases are about the same problems."""
    assert generated['test'][0] == ('1030042040002140', '1234342143122143')
    assert generated['train'][0] == ('0201130030002140', '4231132434122143')
    assert problems.generate() == generated


def test_published_set(reference, generated):
    examples = tasks.get('sudoku').read_published(reference / 'data' / 'sudoku_test.csv')
    assert len(examples) == 256
    assert examples[0] == {'puzzle': '0310200404001043', 'solution': '4312213434211243', 'index': 0}
    published = {grids.all_grids().index(example['solution']) for example in examples}
    assert published == set(problems.published()['solutions'])
    puzzles = {example['puzzle'] for example in examples}
    assert set(map(problems.identity, puzzles)) == set(problems.published()['puzzles'])
    assert not puzzles & {puzzle for drawn in generated.values() for puzzle, _ in drawn}


@pytest.mark.parametrize(
    'line',
    [
        '0310200404001043',
        '0310200404001043,431221343421124',
        '0310200404001045,4312213434211243',
        '1310200404001043,4312213434211243',
        'x,y',
        '\0,' * 50,
        '0310200404001043,4312213434211243,1',
        '"0310200404001043,4312213434211243',
    ],
)
def test_a_wrong_published_line_is_named(tmp_path, line):
    path = tmp_path / 'test.csv'
    right_line = '0310200404001043,4312213434211243\n'
    path.write_text(f'Puzzle,Solution\n{right_line}{line}\n{right_line}')
    with pytest.raises(ValueError) as error:
        tasks.get('sudoku').read_published(path)
    message = str(error.value)
    assert message.startswith(f'{path}:3: found ') and 'expected 16 digits' in message
    assert '\n' not in message and len(message) < 400


def test_a_wrong_header_is_named(tmp_path):
    path = tmp_path / 'test.csv'
    path.write_text('0310200404001043,4312213434211243\n')
    with pytest.raises(
        ValueError, match='test.csv:1: found .* expected the header Puzzle,Solution'
    ):
        tasks.get('sudoku').read_published(path)


def test_blank_lines_and_other_line_ends_do_not_count(tmp_path):
    path = tmp_path / 'test.csv'
    right_line = b'0310200404001043,4312213434211243\r\n'
    path.write_bytes(b'Puzzle,Solution\r\n\r\n  \r\n' + right_line + b'\r\n,\r\n')
    with pytest.raises(ValueError, match='test.csv:6: found .* expected 16 digits'):
        tasks.get('sudoku').read_published(path)
    path.write_bytes(path.read_bytes().removesuffix(b',\r\n'))
    (example,) = tasks.get('sudoku').read_published(path)
    assert example == {'puzzle': '0310200404001043', 'solution': '4312213434211243', 'index': 0}


def test_a_line_too_long_for_python_is_named(tmp_path):
    path = tmp_path / 'test.csv'
    path.write_text('Puzzle,Solution\n' + '1' * 200_000)
    with pytest.raises(ValueError, match='test.csv:2: found .* expected Puzzle,Solution') as error:
        tasks.get('sudoku').read_published(path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 400

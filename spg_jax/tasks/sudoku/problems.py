"""Sudoku puzzles of 4 x 4, each with exactly one solution.

`generate` draws them by seed, and `read_published` reads those of the published test set.
"""

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from spg_jax.tasks import reading
from spg_jax.tasks.source import Example
from spg_jax.tasks.sudoku.grids import all_grids, count_solutions, grid_array

CELLS = 16
SIZES = {'test': 256, 'validation': 256, 'train': 20_000}
SEED = 20251009
VALIDATION_GRIDS = 24
# Number of empty cells: number of such puzzles in the published test set. Every split has this mix.
EMPTIES = {7: 82, 8: 83, 9: 76, 11: 12, 12: 3}
PUBLISHED = Path(__file__).with_name('published_problems.json')
# The keys of a problem in files: the columns of the published test set come first.
COLUMNS = {
    'puzzle': ('Puzzle', 'puzzle', 'question'),
    'solution': ('Solution', 'solution', 'answer'),
}
_TRIES = 1 << 12  # puzzles tried in a round of drawing


def identity(puzzle: str) -> str:
    """Returns a short hash of a puzzle."""
    return hashlib.sha256(puzzle.encode()).hexdigest()[:12]


@functools.cache
def published() -> dict[str, Any]:
    """Returns the published test: 'solutions', 88 grid indices; 'puzzles', 256 identities."""
    return json.loads(PUBLISHED.read_text(encoding='ascii'))


def read_published(path: str | Path, columns: reading.Columns = COLUMNS) -> list[Example]:
    """Reads a table with the columns Puzzle and Solution, or records with those keys.

    An empty cell is 0 or a point. `reading.records` says which forms of files are read.

    Raises:
      ValueError: a line is wrong; the message names file and line, and quotes the line.
    """
    examples = []
    for where, record in reading.records(path, columns, table=True):
        puzzle, solution = (cells_of(reading.pick(record, keys)) for keys in columns.values())
        if None in record or not is_problem(puzzle, solution):
            raise ValueError(
                f'{where}: found {reading.shown(record)}, {another_size(puzzle, solution)}expected '
                '16 digits of 0-4, some of them 0, a comma and 16 of 1-4 that agree with them'
            )
        examples.append({'puzzle': puzzle, 'solution': solution, 'index': len(examples)})
    return examples


def cells_of(value: Any) -> str:
    """Returns a grid as its cells in reading order, 0 where empty; rows may be lists or lines."""
    if isinstance(value, list | tuple):
        value = ''.join(map(cells_of, value))
    return ''.join(str(value).split()).replace('.', '0')


def is_problem(puzzle: str, solution: str) -> bool:
    """Whether these are a puzzle with empty cells and a filled grid that keeps its digits.

    A puzzle without empty cells asks for nothing, and every completion would be right.
    """
    return (
        len(puzzle) == len(solution) == CELLS
        and '0' in puzzle
        and set(puzzle) <= set('01234')
        and set(solution) <= set('1234')
        and all(clue in ('0', cell) for clue, cell in zip(puzzle, solution, strict=True))
    )


def another_size(*grids: str) -> str:
    """Returns the part of an error message that says a grid is not of 4 x 4, or ''."""
    for grid in grids:
        side = math.isqrt(len(grid))
        if side > 4 and side * side == len(grid) and grid.isdigit():
            return f'a grid of {side} x {side}, and this task has grids of 4 x 4; '
    return ''


def grids_of_splits() -> dict[str, list[int]]:
    """Returns the indices of the grids that each split uses: 88, 24 and 176 of the 288.

    The test split has the grids of the published test, so that no solution of that test can be
    learnt in training.
    """
    held_out = published()['solutions']
    # NumPy promises that the stream of a RandomState never changes; that of a Generator may.
    random = np.random.RandomState(SEED)
    others = random.permutation(np.setdiff1d(np.arange(len(all_grids())), held_out)).tolist()
    return {
        'test': held_out,
        'validation': sorted(others[:VALIDATION_GRIDS]),
        'train': sorted(others[VALIDATION_GRIDS:]),
    }


def generate() -> dict[str, list[tuple[str, str]]]:
    """Returns the (puzzle, solution) pairs of each split; puzzles differ and none is published."""
    pools = grids_of_splits()
    return {
        split: _draw(pools[split], size, np.random.RandomState([SEED, place]))
        for place, (split, size) in enumerate(SIZES.items())
    }


def _draw(pool: list[int], size: int, random: np.random.RandomState) -> list[tuple[str, str]]:
    """Fixes each puzzle's grid and number of empty cells, then draws until one solution fits."""
    mix = np.repeat(list(EMPTIES), list(EMPTIES.values()))
    empties = random.permutation(np.resize(mix, size))
    grids = grid_array()[pool]
    solutions = random.permutation(np.resize(np.arange(len(pool)), size))
    seen = set(published()['puzzles'])
    drawn: list[tuple[str, str] | None] = [None] * size
    pending = np.arange(size)
    while pending.size:
        # A puzzle with few clues seldom has one solution, so the last ones get many tries a round.
        tries = np.repeat(pending, max(1, _TRIES // pending.size))
        filled = grids[solutions[tries]]
        rank = random.random_sample(filled.shape).argsort(axis=1).argsort(axis=1)
        puzzles = np.where(rank < empties[tries][:, None], 0, filled)
        for place in np.flatnonzero(count_solutions(puzzles) == 1):
            puzzle = _text(puzzles[place])
            if drawn[tries[place]] is None and identity(puzzle) not in seen:
                seen.add(identity(puzzle))
                drawn[tries[place]] = (puzzle, _text(filled[place]))
        pending = np.array([place for place in pending if drawn[place] is None], dtype=int)
    return drawn


def _text(cells: np.ndarray) -> str:
    return ''.join(map(str, cells.tolist()))

"""Sudoku puzzles of 4 x 4, each with exactly one solution.

`generate` draws them by seed, and `read_published` reads those of the published test set.
"""

import functools
import hashlib
import json
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
_TRIES = 1 << 12  # puzzles tried in a round of drawing


def identity(puzzle: str) -> str:
    """Returns a short hash of a puzzle."""
    return hashlib.sha256(puzzle.encode()).hexdigest()[:12]


@functools.cache
def published() -> dict[str, Any]:
    """Returns the published test: 'solutions', 88 grid indices; 'puzzles', 256 identities."""
    return json.loads(PUBLISHED.read_text(encoding='ascii'))


def read_published(path: str | Path) -> list[Example]:
    """Reads a CSV file with the columns Puzzle and Solution.

    Raises:
      ValueError: a line is wrong; the message names file and line, and quotes the line.
    """
    examples = []
    for where, record in reading.csv_lines(path, ('Puzzle', 'Solution')):
        puzzle, solution = record['Puzzle'], record['Solution']
        if len(record) != 2 or not _consistent(puzzle, solution):
            expected = '16 digits of 0-4, a comma and 16 of 1-4 that agree with them'
            raise ValueError(f'{where}: found {reading.shown(record)}, expected {expected}')
        examples.append({'puzzle': puzzle, 'solution': solution, 'index': len(examples)})
    return examples


def _consistent(puzzle: str, solution: str) -> bool:
    """Whether these are a puzzle and a filled grid that keeps the puzzle's digits."""
    return (
        len(puzzle) == len(solution) == CELLS
        and set(puzzle) <= set('01234')
        and set(solution) <= set('1234')
        and all(clue in ('0', cell) for clue, cell in zip(puzzle, solution, strict=True))
    )


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

"""Sudoku puzzles of 4 x 4, drawn by seed, each with exactly one solution."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from spg_jax.tasks.sudoku.grids import all_grids, count_solutions, grid_array

SIZES = {'test': 256, 'validation': 256, 'train': 20_000}
SEED = 20251009
VALIDATION_GRIDS = 24
# Empty cells -> puzzles of that kind in the published test set, whose mix every split has.
EMPTIES = {7: 82, 8: 83, 9: 76, 11: 12, 12: 3}
PUBLISHED = Path(__file__).with_name('published_problems.json')
_TRIES = 1 << 12


def identity(puzzle: str) -> str:
    """Returns a short hash of a puzzle."""
    return hashlib.sha256(puzzle.encode()).hexdigest()[:12]


@functools.cache
def published() -> dict[str, Any]:
    """Returns the published test: 'solutions', 88 grid indices; 'puzzles', 256 identities."""
    return json.loads(PUBLISHED.read_text(encoding='ascii'))


def grids_of_splits() -> dict[str, list[int]]:
    """Returns the indices of the grids behind each split: 88, 24 and 176 of the 288.

    Testing is on the grids of the published test, so that nothing learnt in training can be one of
    its solutions.
    """
    held_out = published()['solutions']
    # RandomState and not Generator: NumPy promises that its stream never changes.
    random = np.random.RandomState(SEED)
    others = random.permutation(np.setdiff1d(np.arange(len(all_grids())), held_out)).tolist()
    return {
        'test': held_out,
        'validation': sorted(others[:VALIDATION_GRIDS]),
        'train': sorted(others[VALIDATION_GRIDS:]),
    }


def generate() -> dict[str, list[tuple[str, str]]]:
    """Returns the (puzzle, solution) pairs of each split: all different, none published."""
    pools = grids_of_splits()
    return {
        split: _draw(pools[split], size, np.random.RandomState([SEED, place]))
        for place, (split, size) in enumerate(SIZES.items())
    }


def _draw(pool: list[int], size: int, random: np.random.RandomState) -> list[tuple[str, str]]:
    """Fixes each puzzle's grid and number of empty cells, then draws cells until they will do."""
    mix = np.repeat(list(EMPTIES), list(EMPTIES.values()))
    empties = random.permutation(np.resize(mix, size))
    grids = grid_array()[pool]
    solutions = random.permutation(np.resize(np.arange(len(pool)), size))
    seen = set(published()['puzzles'])
    drawn: list[tuple[str, str] | None] = [None] * size
    pending = np.arange(size)
    while pending.size:
        # Few clues seldom do, so the last puzzles to be found get many tries a round.
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

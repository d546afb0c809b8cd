"""The 288 Sudoku grids of 4 x 4 with boxes of 2 x 2, and which of them fit a puzzle."""

import functools

import numpy as np

# For each cell i, the cells before it in reading order that must differ from it.
_PEERS = tuple(
    tuple(
        j
        for j in range(i)
        if j // 4 == i // 4 or j % 4 == i % 4 or (j // 8 == i // 8 and j % 4 // 2 == i % 4 // 2)
    )
    for i in range(16)
)


@functools.cache
def all_grids() -> tuple[str, ...]:
    """Returns every grid as 16 digits in reading order, sorted; a grid's place is its index."""
    partial = ['']
    for cell in range(16):
        partial = [
            grid + digit
            for grid in partial
            for digit in '1234'
            if all(grid[peer] != digit for peer in _PEERS[cell])
        ]
    return tuple(partial)


@functools.cache
def grid_array() -> np.ndarray:
    """Returns every grid as [288, 16] digits, in the order of `all_grids`."""
    return np.array([list(map(int, grid)) for grid in all_grids()])


def count_solutions(puzzles: np.ndarray) -> np.ndarray:
    """Returns how many grids agree with each puzzle.

    Args:
      puzzles: [N, 16] digits, 0 where a cell is empty.

    Returns:
      [N] int.
    """
    digits = np.arange(1, 5)
    # A grid fits if it agrees with the puzzle in as many cells as the puzzle has clues. One matrix
    # product counts the agreements of all pairs.
    agreements = _one_hot(puzzles, digits) @ _one_hot(grid_array(), digits).T
    clues = (puzzles > 0).sum(axis=1)
    return (agreements == clues[:, None]).sum(axis=1)


def _one_hot(cells: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Returns [N, 16] digits as [N, 64] float32 indicators."""
    return (cells[:, :, None] == digits).reshape(len(cells), -1).astype(np.float32)

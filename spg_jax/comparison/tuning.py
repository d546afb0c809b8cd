"""The choice of a learning rate: a climb over a grid, on validation problems.

The best validation of a run is taken to rise with the learning rate up to one summit and to fall
after it. The climb begins at the middle of the grid and tries the next larger rate. It goes on up
while that is better, and otherwise down from the middle while that is better. Of three rates it
needs two where the largest is the best, and three otherwise.
"""

from collections.abc import Mapping, Sequence

Score = tuple[float, float]  # accuracy and reward of the best validation; more is better


def next_rate(grid: Sequence[float], scores: Mapping[float, Score | None]) -> float | None:
    """The learning rate to try next; None if the best one is known.

    Args:
      grid: learning rates, ascending.
      scores: of the rates that were tried; None for a run that failed, which is worse than any.
    """
    if len(grid) == 1:
        return None
    middle = len(grid) // 2
    # An even grid has two in the middle, of which the lower one leaves a larger rate to try.
    start = middle - 1 if len(grid) % 2 == 0 else middle
    if grid[start] not in scores:
        return grid[start]
    for steps in (range(start + 1, len(grid)), range(start - 1, -1, -1)):
        best = start
        for place in steps:
            if grid[place] not in scores:
                return grid[place]
            if not _better(scores[grid[place]], scores[grid[best]]):
                break
            best = place
        if best != start:
            break  # The summit lies on this side.
    return None


def best_rate(grid: Sequence[float], scores: Mapping[float, Score | None]) -> float | None:
    """The best of the rates that were tried, the smallest of equal ones; None if all failed."""
    if len(grid) == 1:
        return grid[0]
    best = None
    for rate in grid:
        if scores.get(rate) is not None and (best is None or _better(scores[rate], scores[best])):
            best = rate
    return best


def _better(score: Score | None, than: Score | None) -> bool:
    return score is not None and (than is None or score > than)

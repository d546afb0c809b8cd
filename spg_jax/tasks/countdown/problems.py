"""Countdown problems, drawn by seed: three numbers of 1..100, a target of 1..100 they can make."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

SIZES = {'test': 256, 'validation': 256, 'train': 100_000}
SEED = 20251009
PUBLISHED = Path(__file__).with_name('published_problems.txt')

Problem = tuple[tuple[int, ...], int]  # (numbers in the order of the prompt, target)
_DRAWS = 1 << 17


def identity(numbers: tuple[int, ...], target: int) -> str:
    """Returns a short hash of a problem, the same whatever the order of its numbers."""
    text = f'{sorted(numbers)}={target}'
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def published() -> frozenset[str]:
    """Returns the identities of the 256 published test problems."""
    return frozenset(PUBLISHED.read_text(encoding='ascii').split())


def generate() -> dict[str, list[Problem]]:
    """Returns the problems of each split, all different, none of them a published one.

    The evaluation splits are drawn first, so that they stay what they are whatever the size of
    'train'.
    """
    problems = _distinct()
    return {split: list(islice(problems, size)) for split, size in SIZES.items()}


def _distinct() -> Iterator[Problem]:
    """Yields problems without end, each once, leaving out the published ones."""
    # RandomState and not Generator: NumPy promises that its stream never changes.
    random = np.random.RandomState(SEED)
    seen = set(published())
    while True:
        for numbers, target in _draw(random):
            key = identity(numbers, target)
            if key not in seen:
                seen.add(key)
                yield numbers, target


def _draw(random: np.random.RandomState) -> list[Problem]:
    """Returns the problems among a batch of random expressions.

    Every step is an exact integer and the target is in 1..100.
    """
    numbers = random.randint(1, 101, size=(_DRAWS, 3)).astype(np.int64)
    operators = random.randint(4, size=(_DRAWS, 2))
    a, b, c = numbers.T
    first, exact_first = _apply(operators[:, 0], a, b)
    swapped = random.randint(2, size=_DRAWS).astype(bool)
    left, right = np.where(swapped, c, first), np.where(swapped, first, c)
    target, exact = _apply(operators[:, 1], left, right)
    # The prompt must not give away which number came first in the expression.
    order = random.random_sample(numbers.shape).argsort(axis=1)
    shown = np.take_along_axis(numbers, order, axis=1)
    good = exact_first & exact & (target >= 1) & (target <= 100)
    return [
        (tuple(row), goal)
        for row, goal in zip(shown[good].tolist(), target[good].tolist(), strict=True)
    ]


def _apply(
    operators: np.ndarray, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (value, is it an exact integer) of left + - * / right, by `operators` 0..3."""
    divisor = np.where(right == 0, 1, right)
    quotient, remainder = np.divmod(left, divisor)
    value = np.choose(operators, [left + right, left - right, left * right, quotient])
    return value, (operators != 3) | ((right != 0) & (remainder == 0))

"""Countdown problems: three numbers of 1..100 and a target of 1..100 that they can make.

`generate` draws them by seed, and `read_published` reads those of the published test set.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from spg_jax.tasks import reading
from spg_jax.tasks.source import Example

SIZES = {'test': 256, 'validation': 256, 'train': 100_000}
SEED = 20251009
PUBLISHED = Path(__file__).with_name('published_problems.txt')

Problem = tuple[tuple[int, ...], int]  # (numbers in the order of the prompt, target)
_DRAWS = 1 << 17  # random expressions drawn at once
# The keys of a problem in files: those of the published test set, then TinyZero's.
COLUMNS = {'numbers': ('input', 'nums', 'numbers'), 'target': ('output', 'target')}
_LARGEST = 10**9


def identity(numbers: tuple[int, ...], target: int) -> str:
    """Returns a short hash of a problem that does not depend on the order of its numbers."""
    text = f'{sorted(numbers)}={target}'
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def published() -> frozenset[str]:
    """Returns the identities of the 256 published test problems."""
    return frozenset(PUBLISHED.read_text(encoding='ascii').split())


def read_published(path: str | Path, columns: reading.Columns = COLUMNS) -> list[Example]:
    """Reads `{"input": "30,100,93", "output": "23"}` records, or those with keys of `columns`.

    Numbers may be a list or text. `reading.records` says which forms of files are read.

    Raises:
      ValueError: a record is wrong; the message names file and line, and quotes the record.
    """
    examples = []
    for where, record in reading.records(path, columns):
        numbers = reading.integers_of(reading.pick(record, columns['numbers']))
        target = reading.integer_of(reading.pick(record, columns['target']))
        if (
            numbers is None
            or target is None
            or not all(0 <= number < _LARGEST for number in [*numbers, target])
        ):
            expected = '{"input": "30,100,93", "output": "23"}'
            raise ValueError(f'{where}: found {reading.shown(record)}, expected {expected}')
        examples.append({'numbers': numbers, 'target': target, 'index': len(examples)})
    return examples


def generate() -> dict[str, list[Problem]]:
    """Returns the problems of each split; all are different and none is published.

    The evaluation splits are drawn first, so that they do not change with the size of 'train'.
    """
    problems = _distinct()
    return {split: list(islice(problems, size)) for split, size in SIZES.items()}


def _distinct() -> Iterator[Problem]:
    """Yields problems without end; none is published and none is yielded twice."""
    # NumPy promises that the stream of a RandomState never changes; that of a Generator may.
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
    # The numbers are shuffled: their order must not tell which came first in the expression.
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

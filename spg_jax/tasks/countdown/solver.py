"""The one canonical answer of a Countdown problem with three numbers.

What a demonstrator writes decides what a small model can learn. The same problem always gets the
same answer, and problems alike in structure get answers alike in form: sums and differences before
anything else, as nine problems in ten allow them; operands in the order of the prompt wherever that
is free; no bracket that is not needed; no division that leaves a remainder.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import permutations, product

# Signs of the three numbers in the order tried: the last number is the first to be negated.
SIGNS = tuple(product((1, -1), repeat=3))


def _quotient(dividend: int, divisor: int) -> int | None:
    """Returns the exact quotient, or None."""
    return dividend // divisor if divisor and dividend % divisor == 0 else None


def _plus(value: int | None, addend: int) -> int | None:
    return None if value is None else value + addend


# Every other expression over three positive numbers, up to order: what it looks like and what it is
# worth. None where a division is not exact. Tried in this order, each over all orders of the
# numbers.
SHAPES: tuple[tuple[str, Callable[[int, int, int], int | None]], ...] = (
    ('{} * {} + {}', lambda a, b, c: a * b + c),
    ('{} * {} - {}', lambda a, b, c: a * b - c),
    ('{} - {} * {}', lambda a, b, c: a - b * c),
    ('{} / {} + {}', lambda a, b, c: _plus(_quotient(a, b), c)),
    ('{} / {} - {}', lambda a, b, c: _plus(_quotient(a, b), -c)),
    ('{} - {} / {}', lambda a, b, c: _plus(_quotient(-b, c), a)),
    ('( {} + {} ) * {}', lambda a, b, c: (a + b) * c),
    ('( {} - {} ) * {}', lambda a, b, c: (a - b) * c),
    ('( {} + {} ) / {}', lambda a, b, c: _quotient(a + b, c)),
    ('( {} - {} ) / {}', lambda a, b, c: _quotient(a - b, c)),
    ('{} / ( {} + {} )', lambda a, b, c: _quotient(a, b + c)),
    ('{} / ( {} - {} )', lambda a, b, c: _quotient(a, b - c)),
    ('{} * {} * {}', lambda a, b, c: a * b * c),
    ('{} * {} / {}', lambda a, b, c: _quotient(a * b, c)),
    ('{} / {} / {}', lambda a, b, c: _quotient(a, b * c)),
)


def _signed(numbers: Sequence[int], signs: Sequence[int]) -> str:
    """Returns the sum with its positive terms first, each kind in the order of the prompt."""
    plus = [str(number) for number, sign in zip(numbers, signs, strict=True) if sign > 0]
    minus = [str(number) for number, sign in zip(numbers, signs, strict=True) if sign < 0]
    return ' - '.join([' + '.join(plus), *minus])


@functools.lru_cache(maxsize=1 << 18)
def solve(numbers: tuple[int, int, int], target: int) -> str | None:
    """Returns the canonical expression, words separated by spaces, or None if there is none.

    Args:
      numbers: three positive integers, in the order of the prompt.
      target: a positive integer.
    """
    for signs in SIGNS:
        if sum(number * sign for number, sign in zip(numbers, signs, strict=True)) == target:
            return _signed(numbers, signs)
    for shape, value in SHAPES:
        for ordered in permutations(numbers):
            if value(*ordered) == target:
                return shape.format(*ordered)
    return None

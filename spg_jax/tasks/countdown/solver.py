"""The canonical answer of a Countdown problem with three numbers.

The demonstrations decide what a small model can learn. The same problem therefore always has the
same answer, and problems of the same structure have answers of the same form. Sums and differences
come first, since nine problems in ten have such an answer. Operands are in the order of the prompt
wherever the order is free. No bracket is superfluous, and no division leaves a remainder.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import permutations, product

# The signs of the three numbers, in the order tried: the last number is the first to be negated.
SIGNS = tuple(product((1, -1), repeat=3))


def _quotient(dividend: int, divisor: int) -> int | None:
    """Returns the quotient if the division leaves no remainder, or else None."""
    return dividend // divisor if divisor and dividend % divisor == 0 else None


def _plus(value: int | None, addend: int) -> int | None:
    return None if value is None else value + addend


# Every other expression over three positive numbers, up to order: its text, and a function that
# returns its value, or None if a division leaves a remainder. `solve` tries them in this order, and
# each of them over all orders of the numbers.
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
    """Returns the sum as text: positive terms, then negative ones, both in the prompt's order."""
    plus = [str(number) for number, sign in zip(numbers, signs, strict=True) if sign > 0]
    minus = [str(number) for number, sign in zip(numbers, signs, strict=True) if sign < 0]
    return ' - '.join([' + '.join(plus), *minus])


@functools.lru_cache(maxsize=1 << 18)
def solve(numbers: tuple[int, int, int], target: int) -> str | None:
    """Returns the canonical expression with spaces between its words, or None if there is none.

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

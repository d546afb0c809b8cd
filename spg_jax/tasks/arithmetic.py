"""Arithmetic written by a model: parsed as Python reads it, bounded in size, never executed."""

import ast
import math
import operator
import re
from collections.abc import Callable

# Far above anything an answer needs, far below anything slow: the worst expression within all three
# takes about a millisecond.
MAX_CHARACTERS = 1000
MAX_DEPTH = 100  # nested operations; brackets alone add none
MAX_BITS = 8192  # of any intermediate integer

Number = int | float

# ASCII only: the parser would refuse other digits too, but warns or fails in ways that differ
# between Python versions.
_ALLOWED = re.compile(r'[0-9+\-*/(). \t\n\r\f\v]+')


def _power(base: Number, exponent: Number) -> Number:
    """Returns base**exponent, unless its size alone would make it slow."""
    integers = isinstance(base, int) and isinstance(exponent, int)
    if integers and abs(base) > 1 and exponent * base.bit_length() > MAX_BITS:
        raise OverflowError
    return base**exponent


_BINARY: dict[type, Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
}
_UNARY: dict[type, Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def _value(node: ast.expr, depth: int) -> Number:
    """Evaluates one node; raises ValueError or ArithmeticError unless real and bounded."""
    if depth > MAX_DEPTH:
        raise ValueError
    match node:
        case ast.Constant(value=int() | float() as value):
            result = value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            result = _UNARY[type(op)](_value(operand, depth + 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            result = _BINARY[type(op)](_value(left, depth + 1), _value(right, depth + 1))
        case _:  # a call such as 2(3), an empty tuple, an ellipsis
            raise ValueError
    if isinstance(result, complex) or (isinstance(result, int) and result.bit_length() > MAX_BITS):
        raise ValueError
    return result


def evaluate(expression: str) -> float | None:
    """Returns the value of an arithmetic expression, or None if it has none.

    Digits, + - * / ( ) . and white space only, read as Python reads them: `**` and `//` are
    operators, leading zeros and implicit products are errors. Never raises and never hangs,
    whatever the text: what a model wrote is hostile input.
    """
    if len(expression) > MAX_CHARACTERS or not _ALLOWED.fullmatch(expression):
        return None
    try:
        value = float(_value(ast.parse(expression.strip(), mode='eval').body, depth=1))
    except (ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None

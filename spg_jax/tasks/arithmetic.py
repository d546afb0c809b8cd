"""Arithmetic written by a model: parsed as Python reads it, bounded in size, never executed."""

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

# These limits are far above what an answer needs and far below what is slow: the slowest expression
# within all three takes about a millisecond.
MAX_CHARACTERS = 1000
MAX_DEPTH = 100  # nested operations; brackets do not count
MAX_BITS = 8192  # the size of any intermediate integer

Number = int | float

# Only ASCII is allowed. The parser refuses other digits too, but the warnings and errors that it
# gives for them differ between Python versions.
_ALLOWED = re.compile(r'[0-9+\-*/(). \t\n\r\f\v]+')

# Two operators in a row, or one at the start that is not a minus sign. Among them are `**`, `//`
# and chains of signs.
_MISPLACED = re.compile(r'[+\-*/]\s*[+\-*/]|(?:^|\()\s*[+*/]')
_EXACT = re.compile(r'[0-9+\-*/() ]+')


def _power(base: Number, exponent: Number) -> Number:
    """Returns base**exponent; raises OverflowError if the result would be too large to be fast."""
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
_RATIONAL: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type, Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def _value(node: ast.expr, depth: int) -> Number:
    """Evaluates a node; raises ValueError or ArithmeticError unless it is real and bounded."""
    if depth > MAX_DEPTH:
        raise ValueError
    match node:
        case ast.Constant(value=int() | float() as value):
            result = value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            result = _UNARY[type(op)](_value(operand, depth + 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            result = _BINARY[type(op)](_value(left, depth + 1), _value(right, depth + 1))
        case _:  # for example a call such as 2(3), an empty tuple or an ellipsis
            raise ValueError
    if isinstance(result, complex) or (isinstance(result, int) and result.bit_length() > MAX_BITS):
        raise ValueError
    return result


def evaluate(expression: str) -> float | None:
    """Returns the value of an arithmetic expression, or None if it has none.

    An expression holds only digits, + - * / ( ) . and white space, and is read as Python reads it:
    `**` and `//` are operators, leading zeros and implicit products are errors. The function never
    raises and never hangs, because text that a model wrote is hostile input.
    """
    if len(expression) > MAX_CHARACTERS or not _ALLOWED.fullmatch(expression):
        return None
    try:
        value = float(_value(ast.parse(expression.strip(), mode='eval').body, depth=1))
    except (ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None


def exact_value(expression: str) -> Fraction | None:
    """Returns the exact value of school arithmetic, or None if the text is anything else.

    Only integers, + - * / and brackets count; a minus sign may stand at the start or after an
    opening bracket. A decimal point, `**`, `//` and chains of signs have no value here, because
    they make numbers that a problem does not give. Like `evaluate`, the function never raises and
    never hangs.
    """
    text = ' '.join(expression.split())
    if len(text) > MAX_CHARACTERS or not _EXACT.fullmatch(text) or _MISPLACED.search(text):
        return None
    try:
        return _exact(ast.parse(text, mode='eval').body, depth=1)
    except (ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _exact(node: ast.expr, depth: int) -> Fraction:
    """Evaluates a node exactly; raises ValueError or ZeroDivisionError unless it has a value."""
    if depth > MAX_DEPTH:
        raise ValueError
    match node:
        case ast.Constant(value=int() as value):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_exact(operand, depth + 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _RATIONAL:
            return _RATIONAL[type(op)](_exact(left, depth + 1), _exact(right, depth + 1))
    raise ValueError  # for example a call such as 2(3), or an empty tuple

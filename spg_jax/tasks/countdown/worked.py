"""The steps of a Countdown expression, line by line, for demonstrations that show their work.

Partial results up to LARGEST are single words of a small model. One expression in a hundred has a
larger one, a product; it is written in hundreds, as `45 * 100 + 12`.
"""

import ast

LARGEST = 300  # the largest sum of three numbers up to 100
_SIGNS = {ast.Add: '+', ast.Sub: '-', ast.Mult: '*', ast.Div: '/'}


def lines(expression: str) -> str:
    """Returns the steps in the order of evaluation: '93 + 30 = 123 ; 123 - 100 = 23 ;'.

    Args:
      expression: over positive integers, with spaces between its words, such as `solver.solve`
        returns. No step may leave a remainder.
    """
    steps: list[str] = []
    _work(ast.parse(expression, mode='eval').body, steps)
    return ' '.join(steps)


def _work(node: ast.expr, steps: list[str]) -> int:
    """Returns the value of a node and appends the lines that lead to it."""
    match node:
        case ast.Constant(value=int() as value):
            return value
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _work(left, steps), _work(right, steps)
            sign = _SIGNS[type(op)]
            value = {'+': a + b, '-': a - b, '*': a * b, '/': a // b if sign == '/' else 0}[sign]
            steps.append(f'{_operand(a)} {sign} {_operand(b)} = {_written(value)} ;')
            return value
    raise ValueError(f'{ast.unparse(node)!r} is no operation on integers with + - * /')


def _written(value: int) -> str:
    return str(value) if value <= LARGEST else f'{value // 100} * 100 + {value % 100}'


def _operand(value: int) -> str:
    return str(value) if value <= LARGEST else f'( {_written(value)} )'

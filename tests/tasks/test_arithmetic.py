"""The evaluator agrees with Python on arithmetic, and returns None for every other text."""

import random
import time

import pytest

from spg_jax.tasks.arithmetic import evaluate
from tests.processes import LINEAR_SECONDS

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ('expression', 'value'),
    [
        ('2*4-3', 5),
        ('30 + 93 - 100', 23),
        ('2**3-4', 4),
        ('2**3**0', 2),
        ('7//2', 3),
        ('-7//2', -4),
        ('1/3*3', 1),
        ('--3', 3),
        ('+.5 + 2.', 2.5),
        ('  (1\n+ 2)  ', 3),
        ('2**-1', 0.5),
        ('1**99999', 1),
        ('0**0', 1),
    ],
)
def test_value(expression, value):
    assert evaluate(expression) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    'expression',
    [
        *('', ' ', '()', '1 2', '2(3)', '(1)(2)', '02*4', '1e3', '0x1', '1_0', '...', '1,2', '1;2'),
        *('1/0', '1//0', '0**-1', '(-8)**.5', '1\n+2', '5 if 1 else 2', '__import__("os")', 'True'),
        *('9**9**9', '2**8192', '9' * 400 + '.0', '1%2', '1@2', '~1', '1<2', '3!', '1=1'),
        *('\uff12*4', '\u0663+1', '\u00b2', '2\u00d74', '1\0', '\0', '1\u00a0+1'),
    ],
)
def test_no_value(expression):
    assert evaluate(expression) is None


@pytest.mark.parametrize(
    'expression',
    [
        '1' * 100_000,
        '(' * 100_000,
        '(' * 50_000 + '1' + ')' * 50_000,
        '-' * 100_000 + '1',
        '1+' * 50_000 + '1',
        '9**' * 30_000 + '9',
        '\0' * 100_000,
        # These are within the length allowed and as slow as such text can be.
        '(' * 499 + '1' + ')' * 499,
        '-' * 999 + '1',
        '1+' * 499 + '1',
        '9**9**9**9**9',
        '(9**2000)' + '*9' * 400,
        '9**2500//7' * 60,
        '**'.join('9' * 300),
        '9' * 999,
    ],
    ids=lambda expression: f'{expression[:8]!r} x{len(expression)}',
)
def test_hostile_text_ends_fast_without_value(expression):
    start = time.process_time()
    assert evaluate(expression) is None
    assert time.process_time() - start < LINEAR_SECONDS


@pytest.mark.filterwarnings('ignore::SyntaxWarning')
def test_agrees_with_python_on_random_expressions():
    """The independent truth is Python's own eval, on text of digits and operators only."""
    draw, answered = random.Random(0), 0
    for _ in range(5000):
        pieces = draw.choices(
            ['1', '2', '10', '3.5', '+', '-', '*', '/', '(', ')', ' '], k=draw.randint(1, 9)
        )
        text = ''.join(pieces)
        try:
            truth = float(eval(text.strip(), {'__builtins__': {}}))
        except Exception:
            truth = None
        value = evaluate(text)
        assert (value is None) == (truth is None or abs(truth) == float('inf')), text
        if value is not None:
            assert value == truth, text
            answered += 1
    assert answered > 500

"""Mended rules: the neighbours of the reported faults, and that reward and score agree on all."""

import random
from fractions import Fraction

import pytest

from spg_jax import tasks
from spg_jax.tasks.arithmetic import exact_value

RIGHT = {'countdown': 1, 'gsm8k': 2, 'math500': 2, 'sudoku': 1}
PUZZLE, SOLUTION = '0040423100030104', '1342423124133124'


def verdict(name, truth, completion, question='q'):
    """Returns whether a completion is right; in every format reward and score say the same."""
    verdicts = set()
    for format in tasks.TASKS[name].formats:
        task = tasks.get(name, format, rules='mended')
        example = task.read_record(question, truth)
        solved = task.score(completion, example).solved
        assert (task.reward(completion, example) >= RIGHT[name]) == solved
        verdicts.add(solved)
    (solved,) = verdicts
    return solved


@pytest.mark.parametrize(
    ('numbers', 'target', 'answer', 'right'),
    [
        ([30, 100, 93], 23, '30+93-100', True),
        ([30, 100, 93], 23, '(30 + 93) − 100', True),
        ([30, 100, 93], 23, '30+93-100 = 23', True),
        ([30, 100, 93], 23, '23 = 30+93-100', True),
        ([30, 100, 93], 23, '30+93-100 = 123-100 = 23', True),
        ([30, 100, 93], 23, '30+93-100.', True),
        ([30, 100, 93], 23, '$30+93-100$', True),
        ([30, 100, 93], 23, r'\(30+93-100\)', True),
        ([30, 100, 93], 23, r'\text{30+93-100}', True),
        ([30, 100, 93], 23, '-100+30+93', True),
        ([30, 100, 93], 23, '30+93-100=99', False),
        ([30, 100, 93], 23, '30+93-100 = 23 = 24', False),
        ([30, 100, 93], 23, '30+93-100 =', False),
        ([30, 100, 93], 23, '30+93-100 or 30+93+100', False),
        ([30, 100, 93], 23, '23', False),
        ([30, 100, 93], 23, '30+93-100-0', False),
        ([5, 3], 15, r'5 \times 3', True),
        ([5, 3], 15, r'5\cdot3', True),
        ([5, 3], 15, '5·3', True),
        ([5, 3], 15, r'\left(5\right)*3', True),
        ([5, 3], 15, '[5]*3', True),
        ([5, 3], 15, '5(3)', False),
        ([5, 3], 15, '5x3', False),
        ([6, 3], 2, r'\frac{6}{3}', True),
        ([6, 3], 2, '6÷3', True),
        ([6, 3], 2, r'6 \div 3', True),
        ([6, 3, 4], Fraction(8), r'\dfrac{6}{3}\cdot 4', True),
        ([6, 3, 2], 4, r'\frac{6}{\frac{3}{2}}', True),
        ([1, 3, 3], 1, '1/3*3', True),
        ([7, 2], 3, '7//2', False),
        ([7, 2], 3, '7/ /2', False),
        ([2, 3], 8, '2**3', False),
        ([2, 3], 8, '2^3', False),
        ([2, 3], 8, '2* *3', False),
        ([3, 5], 8, '3+-+5', False),
        ([3, 5], -2, '3+-5', False),
        ([3, 5], 8, '3--5', False),
        ([3, 5], 8, '+3+5', False),
        ([3, 5], 8, '3+5.0', False),
        ([3, 5], 8, '3.+5', False),
        ([3, 5], 8, '03+5', False),
        ([1, 5], 15, '1 5', False),
        ([1, 5], 15, r'1\,5', False),
        ([1, 0], 0, '0/1', True),
        ([1, 0], 0, '1/0', False),
        ([200001, 200000], 1, '200001/200000', False),
        ([10**14, 10**14 - 1], 1, f'{10**14}/{10**14 - 1}', False),
    ],
)
def test_countdown(numbers, target, answer, right):
    truth = [numbers, int(target)]
    assert verdict('countdown', truth, f'<answer>{answer}</answer>') == right
    assert verdict('countdown', truth, rf'<answer>\boxed{{{answer}}}</answer>') == right
    assert verdict('countdown', truth, rf'It is \boxed{{{answer}}}') == right
    assert not verdict('countdown', truth, answer)


def test_exact_values_agree_with_fractions():
    """The truth is Python's eval of the same text, with every integer as a Fraction."""
    draw, count = random.Random(0), 0
    for _ in range(3000):
        text = ''.join(draw.choices(['1', '2', '10', '+', '-', '*', '/', '(', ')'], k=5))
        value = exact_value(text)
        if value is None:
            continue
        wrapped = ''.join(f'F({part})' if part.isdigit() else part for part in split(text))
        assert value == eval(wrapped, {'F': Fraction, '__builtins__': {}}), text
        count += 1
    assert count > 60


def split(text):
    """Returns the integers and the other characters of an expression."""
    parts = []
    for letter in text:
        if parts and letter.isdigit() and parts[-1].isdigit():
            parts[-1] += letter
        else:
            parts.append(letter)
    return parts


MINUS_18 = (
    '-$18',
    '-(18)',
    '-"18"',
    '- USD 18',
    '-US$18',
    '-Rs. 18',
    'minus 18',
    'negative $18.00',
)
MINUS_18 += ('(-18)', 'Total: -18', 'a loss of - 18', 'Minus 18')
NOT_18 = ('18 thousands', '18 millions', '18 dozens', '18 halves', '18M', '$18 M', '18 mil', '18bn')
NOT_18 += ('NOT 18', 'NO 18')
NOT_18 += (
    'twice 18',
    'double 18',
    '18 squared',
    'square root of 18',
    'more than 18',
    'at least 18',
)


@pytest.mark.parametrize(
    ('truth', 'answer', 'right'),
    [
        ('2,125', '2125', True),
        ('2,125', '2,125', True),
        ('2,125', r'\$2{,}125', True),
        ('2,125', r'2\,125', True),
        ('2,125', '2,125.00', True),
        ('2,125', '2', False),
        ('2,125', '125', False),
        ('2,125', '2,1255', False),
        ('2,125', '21,25', False),
        ('2,125', '2 125', False),
        (18, '18', True),
        (18, '18.', True),
        (18, '$18', True),
        (18, '**18**', True),
        (18, '18 apples', True),
        (18, r'18\text{ apples}', True),
        (18, 'The answer is 18', True),
        (18, 'x = 18', True),
        (18, '9*2 = 18', True),
        (18, r'9 \times 2 = \$18', True),
        (18, '20-18', False),
        (2, '20-18', False),
        (-18, '20-18', False),
        (-18, '-18', True),
        (-18, '18', False),
        (18, '-18', False),
        *((truth, answer, truth < 0) for truth in (-18, 18) for answer in MINUS_18),
        (18, '-(-18)', False),
        (-18, '-(-18)', False),
        (18, 'A-18', False),
        (-18, 'A-18', False),
        (18, 'minus 20 and 18', False),
        (18, '18 minus', False),
        (18, 'USD 18', True),
        *((18, answer, False) for answer in NOT_18),
        (18, '18 m', True),
        (18, '18 more than Bob', True),
        (18, '18 square feet', True),
        (18, '18 quarters', True),
        (18, '9*3 = 18', False),
        (18, '17, 18', False),
        (18, '17 or 18', False),
        (18, '18 or nineteen', False),
        (18, 'not 18', False),
        (18, '18 thousand', False),
        (18, '18!', False),
        (18, '18^1', False),
        (18, '>18', False),
        (18, '1e1', False),
        (18, r'\sqrt{18}', False),
        (18, '18 18', False),
        (18, '', False),
        (0.5, '0.5', True),
        (0.5, '.5', True),
        (0.5, '1/2', True),
        (0.5, r'\frac{1}{2}', True),
        (0.5, '2/4', False),
        (1e-7, '0.0000002', False),
        (0.1, '0.1', True),
        (None, '18', False),
    ],
)
def test_gsm8k(truth, answer, right):
    assert verdict('gsm8k', truth, f'<answer>{answer}</answer>') == right
    assert verdict('gsm8k', truth, rf'<answer>\boxed{{{answer}}}</answer>') == right
    assert verdict('gsm8k', truth, rf'so \boxed{{{answer}}}') == right
    assert not verdict('gsm8k', truth, answer)


@pytest.mark.parametrize(
    ('truth', 'answer', 'right'),
    [
        ('5', '5', True),
        ('5', 'x = 5', True),
        ('5', 'x_1=5', True),
        ('x=5', '5', True),
        ('x=5', 'y=5', False),
        ('5', '6=5', False),
        ('5', r'5\text{ million}', False),
        ('5', r'5\text{ dozens}', False),
        (r'5\text{ million}', r'5\text{ million}', True),
        (r'11,\! 111,\! 111,\! 100', '11,111,111,100', True),
        (r'11,\! 111,\! 111,\! 100', '11111111100', True),
        (r'11,\! 111,\! 111,\! 100', r'11,\!111,\!111,\!100', True),
        (r'1234\sqrt{2}', r'1,234\sqrt{2}', True),
        (r'(10080,5)', r'(10{,}080, 5)', True),
        ('(1,234)', '(1234)', False),
        ('(1234)', '(1,234)', False),
        (r'\{1,234\}', r'\{1234\}', False),
        ('[1,234]', '[1, 234]', True),
        ('100,200', '100, 200', True),
        ('100, 200', '100,200', True),
        ('100, 200', '100200', False),
        ('100200', '100, 200', False),
        ('-5', '−5', True),
        (r'-\frac{1}{2}', r'−\frac{1}{2}', True),
        (r'2\times3', '2×3', True),
        (r'6\div 2', '6÷2', True),
        ('5', '2x=5', False),
        ('5', '=5', False),
        ('5', r'5\text{ or 6}', False),
        ('5', r'5\text{ or six}', False),
        ('5', r'5\text{ cm}', True),
        ('5', r'5\text{cm}', True),
        (r'5\text{ cm}', '5', True),
        (r'5\text{ cm}', r'5\text{ miles}', False),
        (r'5\text{ cm}^2', r'5\text{ cm}^3', False),
        (r'5\text{ cm}^2', r'5\mbox{ cm}^{2}', True),
        (r'5\text{ inches}', r'5\text{ inch}', False),
        (r'5\text{ hours}', r'5\text{ hour}', True),
        (r'60\%', r'\$60', False),
        (r'60\%', '60%', True),
        (r'60^\circ', r'60^{\circ}', True),
        (r'60^\circ', r'60\%', False),
        (r'60^\circ', '60', True),
        (r'\text{ odd}', r'\text{ even}', False),
        (r'\text{ odd}', r'\text{odd}', True),
        (r'\text{Monday}', r'\text{Friday}', False),
        (r'\text{Monday}', 'Monday', True),
        (r'\text{Monday}', r'\textbf{monday}', True),
        (r'\text{Monday}', '', False),
        (r'\text{Monday}', r'\text{}', False),
        (r'\text{(E)}', '(E)', True),
        ('x', 'X', False),
        ('2,125', '2125', True),
        ('10080', r'10\,080', True),
        ('10080', r'10{,}080', True),
        ('10,080', r'10,\!080', True),
        ('(1,234)', '1234', False),
        ('5', '5, 6', False),
        ('5', '5 or 6', False),
        ('18', '20-18', False),
        ('2', '20-18', False),
        (r'\frac{1}{2}', '0.5', True),
        (r'\frac{1}{2}', '.5', True),
        (r'\frac12', '1/2', True),
        (r'\frac{1}{2}', r'\frac{2}{4}', False),
        (r'-\frac{24}{25}', '-24/25', True),
        (r'-\frac{24}{25}', r'\frac{-24}{25}', True),
        (r'\frac{3}{2}', '1.5', True),
        (r'\frac{1}{3}', '0.333333', False),
        ('0.0000001', '0.0000002', False),
        (r'\sqrt{2}', r'\sqrt 2', True),
        (r'\sqrt{2}', r'\sqrt3', False),
        ('x^2', 'x^{2}', True),
        (r'\left( 3, \frac{\pi}{2} \right)', r'(3,\frac{\pi}2)', True),
        (r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', r'\begin{pmatrix}1\\2\end{pmatrix}', True),
        (r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', r'\begin{pmatrix}12\end{pmatrix}', False),
        ('52_8', '52_9', False),
        ('[0,1)', '[0,1]', False),
        (r'1 \text{ m} 2 \text{ cm}', r'1 \text{ m}', False),
    ],
)
def test_math500(truth, answer, right):
    """Fault F50 is among these: `6=5`, `5\\text{ or 6}`, even for odd, and nothing for odd."""
    assert verdict('math500', truth, rf'<answer>\boxed{{{answer}}}</answer>') == right
    assert verdict('math500', truth, f'<answer>{answer}</answer>') == right
    assert verdict('math500', truth, rf'\boxed{{1}}, no, \boxed{{{answer}}}') == right


@pytest.mark.parametrize(
    ('name', 'truth', 'answer'),
    [('countdown', [[2, 3], 5], '2+3'), ('gsm8k', 5, '5'), ('math500', '5', '5')],
)
def test_an_answer_has_to_be_given_once(name, truth, answer):
    box = rf'\boxed{{{answer}}}'
    assert verdict(name, truth, f'<answer>{box}, that is {box}</answer>')
    for completion in (
        rf'<answer>{box} \boxed{{7}}</answer>',
        rf'<answer>\boxed{{7}} {box}</answer>',
        rf'{box} \boxed{{}}',
        rf'{box} \boxed{{{answer}',
        f'{answer} <answer></answer>',
        f'{box}<answer>7</answer>',
        f'<answer>{answer}</answer><answer>7</answer>',
    ):
        assert not verdict(name, truth, completion), completion


@pytest.mark.parametrize(
    ('answer', 'right'),
    [
        (r'\boxed{\frac{1}{2}} or \boxed{\frac{1}{3}}', False),
        (r'\boxed{\frac{1}{3}} or \boxed{\frac{1}{2}}', False),
        (r'\boxed{\frac{1}{3}}, that is \boxed{ \frac{1}{3} }', True),
        (r'\boxed {\frac{1}{3}}, that is \boxed{\frac{1}{3}}', True),
        (r'\boxed {\frac{1}{2}}, that is \boxed{\frac{1}{3}}', False),
        (r'$\boxed \frac{1}{3}$, that is $\boxed \frac{1}{3}$', True),
        (r'$\boxed \frac{1}{2}$, that is $\boxed \frac{1}{3}$', False),
        (r'$\boxed \frac{1}{2}$, that is \boxed{\frac{1}{3}}', False),
        (r'\boxed{\boxed{\frac{1}{3}}}', False),
        (r'\boxed{\frac{1}{2} or \boxed{\frac{1}{3}}', False),
    ],
)
def test_boxes_are_compared_up_to_the_brace_that_closes_them(answer, right):
    assert verdict('math500', r'\frac{1}{3}', f'<answer>{answer}</answer>') == right


@pytest.mark.parametrize(
    ('answer', 'right_cells'),
    [
        (SOLUTION, 8),
        ('1342\n4231\n2413\n3124', 8),
        ('1 3 4 2 | 4 2 3 1 | 2 4 1 3 | 3 1 2 4', 8),
        ('```\n1342\n4231\n2413\n3124\n```', 8),
        ('[[1,3,4,2],[4,2,3,1],[2,4,1,3],[3,1,2,4]]', 8),
        (r'\boxed{1342423124133124}', 8),
        ('1342423124133120', 0),  # A clue, the last 4, is gone.
        ('2342423124133124', 7),  # 2 stands twice in the first row.
        ('0342423124133124', 7),
        ('.342423124133124', 7),
        ('3142423124133124', 6),
        (PUZZLE, 0),
        ('134242312413312', 0),
        (SOLUTION + '4', 0),
        ('1342423124133125', 0),
        ('The 1st row is 342, then 4231 and 2413 and 3124', 0),
        ('１３４２４２３１２４１３３１２４', 0),
        ('4231134224133124', 0),  # A valid grid of another puzzle.
        ('', 0),
    ],
)
def test_sudoku(answer, right_cells):
    """Fault F51 is the sentence whose words hold the digits, and the grid with other clues."""
    for format in tasks.TASKS['sudoku'].formats:
        task = tasks.get('sudoku', format, rules='mended')
        example = task.read_record(PUZZLE, SOLUTION)
        completion = f'<answer>{answer}</answer>'
        solved = right_cells == 8
        assert task.score(completion, example) == (right_cells, 8, solved)
        assert task.reward(completion, example) == right_cells / 8
    assert verdict('sudoku', SOLUTION, f'<answer>{answer}</answer>', PUZZLE) == solved


def test_every_solution_of_a_sudoku_is_right():
    task = tasks.get('sudoku', rules='mended')
    example = {'puzzle': '1000000000000000', 'solution': SOLUTION}
    assert task.reward('<answer>1234341221434321</answer>', example) == 1
    full = {'puzzle': SOLUTION, 'solution': SOLUTION}
    assert task.reward(f'<answer>{SOLUTION}</answer>', full) == 0

"""math-verify as a judge: kept from its slips, in time, and for GSM8K too."""

import re
import resource
import time
from pathlib import Path

import pytest

from spg_jax import tasks
from spg_jax.tasks import judge

pytest.importorskip('math_verify')


@pytest.fixture(scope='module')
def judged():
    """Returns a function (task, reference, completion) -> verdict; the judge has started."""
    known = {name: judge.judged(tasks.get(name, 'published_eval')) for name in ('math500', 'gsm8k')}
    assert all(task.scorer == 'math-verify' for task in known.values())

    def verdict(name, reference, completion):
        return known[name].score(completion, known[name].read_record('q', reference)).solved

    assert verdict('math500', '1', r'\boxed{1}')
    return verdict


@pytest.mark.parametrize(
    ('reference', 'box', 'right'),
    [
        # Number bases.
        ('52_8', '52_{8}', True),
        ('52_8', '(52)_8', True),
        ('52_8', '52', True),
        ('52_8', '42', False),
        ('52_8', '101010_2', False),
        ('52', '52_8', False),
        ('52', '52_{10}', True),
        ('A1_{16}', 'A1_{15}', False),
        (r'52_{\text{eight}}', r'52_{\text{nine}}', False),
        # Numbers that are close.
        ('1/2^{99}', '1/2^{98}', False),
        (r'\frac{1}{2^{99}}', '2^{-99}', True),
        ('10^{-20}', r'2\cdot 10^{-20}', False),
        (r'\{10^{-9},1\}', r'\{2\cdot10^{-9},1\}', False),
        (r'\frac{1}{3}', '0.333333', True),
        (r'2\pi', '6.283185', True),
        (r'\frac{\sqrt2}{2}', r'\frac{1}{\sqrt2}', True),
        (r'60\%', '60', True),
        # Lists with dots.
        (r'1, 2, \ldots, n', r'1, 2, \ldots, n', True),
        (r'1, 2, \dots, n', r'1, 3, \dots, n', False),
        ('1, 2, 3, ...', '1, 2, 4, ...', False),
        # Thin spaces and commas between thousands.
        ('10080', r'10\,080', True),
        ('10080', '10,080', True),
        (r'10\,080', '10080', True),
        ('10080', r'10\,08', False),
        # What the judge is for.
        ('x+1', '1+x', True),
        (r'\{1,2\}', r'\{2,1\}', True),
        ('(1,2)', '(2,1)', False),
        (r'\text{Monday}', r'\text{Friday}', False),
    ],
)
def test_math500(judged, reference, box, right):
    assert judged('math500', reference, rf'so \boxed{{{box}}}') == right


@pytest.mark.parametrize(
    ('completion', 'right'),
    [
        (r'12 apples and 5 pears. \boxed{}', False),
        (r'12 apples and 5 pears. \boxed{ }', False),
        (r'12 apples and 5 pears. \boxed{', False),
        (r'\boxed{5} and \boxed{', False),
        (r'\boxed{5} and \boxed{}', False),
        (r'\boxed{4} and \boxed{5}', True),
        ('<answer>5</answer>', True),
        ('the answer is $5$', True),
        ('', False),
    ],
)
def test_the_answer_is_what_stands_in_the_last_box(judged, completion, right):
    assert judged('math500', '5', completion) == right


@pytest.mark.parametrize(
    ('reference', 'completion', 'right'),
    [
        ('2,125', '<answer>2125</answer>', True),
        (2125, r'\boxed{2{,}125}', True),
        (18, r'\boxed{36/2}', True),
        (18, r'\boxed{17}', False),
        (18, r'\boxed{}', False),
        (None, r'\boxed{18}', False),
    ],
)
def test_gsm8k(judged, reference, completion, right):
    assert judged('gsm8k', reference, completion) == right


def test_no_completion_takes_more_than_a_second_beyond_the_limit(judged, monkeypatch):
    """The limit holds for one hostile completion after another, and good ones between them."""
    assert judge.TIMEOUT <= 4
    monkeypatch.setattr(judge, 'TIMEOUT', 2)
    for box in (r'10!!!!!', '9^{9^{9^{9}}}', '5', r'\frac{' * 400, '9' * 100_000, '(' * 1000, '5'):
        started = time.monotonic()
        assert judged('math500', '5', rf'\boxed{{{box}}}') == (box == '5')
        assert time.monotonic() - started < 3


@pytest.mark.skipif(not Path('/proc/self/limits').exists(), reason='the system tells no limits')
def test_the_memory_of_the_judging_process_is_bounded(judged):
    assert judged('math500', '2', r'\boxed{2}')
    process = Path(f'/proc/{judge._judge()._copy}')
    (limit,) = re.findall(r'Max address space +(\S+)', (process / 'limits').read_text())
    in_use = int((process / 'statm').read_text().split()[0]) * resource.getpagesize()
    assert in_use < int(limit) < in_use + 2 * judge.MOST_BYTES

"""Answer tags and boxes: every rule has an example that was worked by hand."""

import time

import pytest

from spg_jax.tasks import extraction
from tests.processes import LINEAR_SECONDS

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ('text', 'first', 'last'),
    [
        ('', None, None),
        ('<answer>1', None, None),
        ('1</answer>', None, None),
        ('</answer>1<answer>', None, None),
        ('<answer> 1 </answer>', '1', '1'),
        ('<answer>\n1\n2\n</answer>', '1\n2', '1\n2'),
        ('<answer></answer>', '', ''),
        ('<answer>1</answer><answer>2</answer>', '1', '2'),
        ('<answer>1</answer><answer>2', '1', '1'),
        ('<answer>1<answer>2</answer>', '1<answer>2', '1<answer>2'),
    ],
)
def test_answers(text, first, last):
    assert extraction.first_answer(text) == first
    assert extraction.last_answer(text) == last


@pytest.mark.parametrize(
    ('text', 'content'),
    [
        ('no box', 'no box'),
        (r'\boxed{1} \boxed{2}', '2'),
        (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
        (r'\boxed{}', ''),
        (r'\boxed{1', None),
        (r'\boxed{1} \boxed{{2}', None),
        (r'\boxed', None),
        (r'\boxed 7$ and \boxed{8}', '7'),
        (r'\boxed 7$ \boxed 8', '8'),
        (r'\boxed {8}', '{8}'),
        (r'\fbox{3}', r'\fbox{3}'),
        (r'\boxed{1} \fbox{3}', '1'),
        ('\\boxed\n{3}', '\\boxed\n{3}'),
    ],
)
def test_last_box(text, content):
    assert extraction.last_box(text) == content


@pytest.mark.parametrize(
    'piece', ['<answer>', '</answer>', '\\boxed{', '\\boxed ', '\\fbox', '{', '}', '```', '\0']
)
def test_time_is_linear(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    extraction.first_answer(text), extraction.last_answer(text), extraction.last_box(text)
    assert time.process_time() - start < LINEAR_SECONDS

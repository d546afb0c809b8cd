"""MATH: equivalence, prompts, files; rewards and scores against values worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from spg_jax import tasks
from spg_jax.tasks.equivalence import NotNormal, equivalent, normal_form

pytestmark = pytest.mark.fast

HERE = Path(__file__).parent
EXAMPLE = {'question': 'Halve 1.', 'answer': r'\frac12', 'solution': 'It is half.', 'index': 0}


@pytest.mark.parametrize('line', (HERE / 'math500_completions.jsonl').read_text().splitlines())
def test_reward_and_score_by_hand(line):
    case = json.loads(line)
    for format in ('published_train', 'published_eval'):
        task, mended = (tasks.get('math500', format, rules=r) for r in ('released', 'mended'))
        example = task.read_record(case['question'], case['ground_truth'])
        assert task.score(case['completion'], example).solved == case['score'], case['rule']
        # A wrong answer earns at most 1 by the mended rules, and a right one at least 2.
        assert mended.score(case['completion'], example).solved == (case['mended'] >= 2)
        assert task.reward(case['completion'], example) == case['reward'], case['rule']
        assert mended.reward(case['completion'], example) == case['mended'], case['rule']


@pytest.mark.parametrize('name', sorted(tasks.TASKS))
def test_rules_are_released_or_mended(name):
    with pytest.raises(ValueError, match=f"rules of {name} is 'new'; use one of released, mended"):
        tasks.get(name, 'published_train', rules='new')
    assert tasks.get(name, 'published_eval', rules='mended').scorer == 'mended'


@pytest.mark.parametrize(
    ('answer', 'normal'),
    [
        ('', ''),
        ('4', '4'),
        ('\n', ''),
        (r'1\!0', '10'),
        (r'\\frac12', r'\frac{1}{2}'),
        (r'\tfrac12 + \dfrac34', r'\frac{1}{2}+\frac{3}{4}'),
        (r'\frac1{72}x', r'\frac{1}{72}x'),
        (r'\frac{1}2', r'\frac{1}2'),
        (r'\frac1', r'\frac1'),
        # A fraction without a denominator leaves all fractions unchanged.
        (r'\frac12\frac3', r'\frac12\frac3'),
        (r'\left(1\right]', '(1]'),
        (r'\leftarrow', 'arrow'),  # The released code does this too.
        (r'30^\circ', '30'),
        (r'30^{\circ}', '30'),
        (r'\$1\%', '1'),
        (r'5\text{ m}', '5'),
        (r'\text{m}', r'\text{m}'),
        ('.5', r'\frac{1}{2}'),
        ('0.50', '0.50'),
        ('-.5', '-.5'),  # A zero is added only at the start, after a space or after a brace.
        ('x .5{.5', 'x0.5{0.5'),
        ('x=5', '5'),
        ('abc=5', 'abc=5'),
        ('x=y=5', 'x=y=5'),
        ('==', '=='),
        (r'\sqrt3x', r'\sqrt{3}x'),
        (r'\sqrt{3}', r'\sqrt{3}'),
        (r'\sqrt 3', r'\sqrt{}3'),
        ('1/2', r'\frac{1}{2}'),
        (' 1 / 2 ', r'\frac{1}{2}'),
        ('-1/-2', r'\frac{-1}{-2}'),
        ('01/2', '01/2'),
        ('+1/2', '+1/2'),
        ('1/2/3', '1/2/3'),
    ],
)
def test_normal_form(answer, normal):
    assert normal_form(answer) == normal


@pytest.mark.parametrize(
    'answer',
    [
        *('x/2', '/', '1/', '9' * 5000 + '/1', r'\frac', r'1\frac\frac12', r'\sqrt', r'\sqrt\sqrt'),
        r'1\text{ m}2\text{ m}',
    ],
)
def test_what_cannot_be_normalised_is_compared_as_it_stands(answer):
    with pytest.raises(NotNormal):
        normal_form(answer)
    assert equivalent(answer, answer)
    assert not equivalent(f'{answer} ', answer) and not equivalent('1', answer)


def test_prompt_and_demonstrations():
    rng = np.random.default_rng(0)
    for name, prefill in (('train', ''), ('eval', '<reasoning>')):
        task = tasks.get('math500', f'published_{name}')
        prompt = task.prompt(EXAMPLE)
        assert prompt.startswith('Halve 1.\n') and r'\boxed{}' in prompt
        for tag in ('<reasoning>', '</reasoning>', '<answer>', '</answer>'):
            assert tag in prompt
        assert task.prefill == prefill
        right = prefill + task.demonstration(EXAMPLE, rng, 1.0)
        assert right == (
            '<reasoning>\nIt is half.\n</reasoning>\n<answer>\n\\boxed{\\frac12}\n</answer>'
        )
        assert task.reward(right, EXAMPLE) == 2.75 and task.score(right, EXAMPLE).solved
        assert task.reward(task.demonstration(EXAMPLE, rng, 0.0), EXAMPLE) == 0.75


def test_published_file(tmp_path):
    path = tmp_path / 'test.jsonl'
    solution = r'We halve: $\boxed{3}$, no, $\boxed{\frac{1}{2}}$.'
    records = [
        {'problem': 'Halve 1.', 'answer': r'\frac12', 'solution': solution, 'level': 1},
        {'problem': 'Halve 1.', 'answer': r'\frac12'},
        {'problem': 'Halve 1.', 'solution': solution},
    ]
    path.write_text('\n'.join(map(json.dumps, records)))
    both, bare, worked = tasks.get('math500', 'published_eval').read_published(path)
    assert both == EXAMPLE | {'solution': solution}
    assert bare == EXAMPLE | {'solution': '', 'index': 1}
    assert worked == both | {'answer': r'\frac{1}{2}', 'index': 2}


@pytest.mark.parametrize(
    'line',
    [
        '{"problem": "Halve 1."}',
        '{"problem": "Halve 1.", "answer": true}',
        '{"problem": "Halve 1.", "answer": ["0.5", "1"]}',
        '{"problem": "Halve 1.", "solution": "0.5"}',
        '{"problem": "Halve 1.", "solution": "\\\\boxed{0.5"}',
        '{"answer": "0.5"}',
        '[1]',
        'nonsense',
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / 'test.jsonl'
    path.write_text('{"problem": "Halve 1.", "answer": "0.5"}\n' + line + '\n')
    with pytest.raises(ValueError) as error:
        tasks.get('math500', 'published_eval').read_published(path)
    message = str(error.value)
    assert message.startswith(f'{path}:2: found ') and 'expected' in message
    assert '\n' not in message and len(message) < 400


@pytest.mark.parametrize('truth', ['', ' ', None, True, [], ['1', '2'], {}, float('nan'), 10**400])
def test_a_reference_is_text_or_a_number(truth):
    with pytest.raises(ValueError, match='found ground_truth .*, expected text that is not empty'):
        tasks.get('math500', 'published_eval').read_record('', truth)


@pytest.mark.parametrize(
    ('truth', 'answer'), [('x', 'x'), (0.5, '0.5'), (5.0, '5'), (7, '7'), (['x'], 'x'), ([7], '7')]
)
def test_a_reference_may_be_a_number_or_a_list_of_one(truth, answer):
    example = tasks.get('math500', 'published_eval').read_record('q', truth)
    assert example == {'question': 'q', 'answer': answer, 'solution': ''}

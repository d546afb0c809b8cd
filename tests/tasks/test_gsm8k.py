"""GSM8K: prompts, demonstrations, files; rewards and scores against values worked by hand."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from spg_jax import tasks
from spg_jax.tasks.gsm8k import task as gsm8k

pytestmark = pytest.mark.fast

HERE = Path(__file__).parent
EXAMPLE = {'question': 'What is 9 times 2?', 'answer': '18', 'solution': '9 * 2 = 18', 'index': 0}


@pytest.mark.parametrize('line', (HERE / 'gsm8k_completions.jsonl').read_text().splitlines())
def test_reward_and_score_by_hand(line):
    case = json.loads(line)
    for format in ('published_train', 'published_eval'):
        task = tasks.get('gsm8k', format)
        example = task.read_record(case['question'], case['ground_truth'])
        assert task.score(case['completion'], example).solved == case['score'], case['rule']
        reward = task.reward(case['completion'], example)
        assert reward == pytest.approx(case['reward'], abs=1e-9), case['rule']


def test_both_forms_agree_with_their_patterns():
    """The truth is the published patterns, on short texts since they are slow on long ones."""
    soft = re.compile(r'<reasoning>.*?</reasoning>\s*<answer>.*?</answer>')
    strict = re.compile(r'^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$')
    draw, match_counts = random.Random(0), [0, 0]
    pieces = ['<reasoning>', '</reasoning>', '<answer>', '</answer>', '\n', ' ', '7', '']
    for _ in range(20_000):
        end = draw.choice(['\n', ''])  # the end of every line of the form
        text = ['<reasoning>', end, '7', end, '</reasoning>', end, '<answer>', end, '7', end]
        text += ['</answer>', end]
        for _ in range(draw.randint(0, 4)):
            text[draw.randrange(len(text))] = draw.choice(pieces)
        text = ''.join(text)
        expected = bool(soft.match(text)), bool(strict.match(text))
        assert (gsm8k.has_soft_form(text), gsm8k.has_strict_form(text)) == expected, text
        match_counts = [sum(pair) for pair in zip(match_counts, expected, strict=True)]
    assert min(match_counts) > 200


def test_training_asks_for_what_is_rewarded_and_evaluation_for_what_is_scored():
    train, evaluation = (tasks.get('gsm8k', f'published_{name}') for name in ('train', 'eval'))
    for task in (train, evaluation):
        prompt = task.prompt(EXAMPLE)
        assert prompt.startswith('What is 9 times 2?\n') and '{question}' not in prompt
        for tag in ('<reasoning>', '</reasoning>', '<answer>', '</answer>'):
            assert tag in prompt
        assert task.scorer == 'published'
    assert '\\boxed' not in train.prompt(EXAMPLE) and train.prefill == ''
    assert r'\boxed{}' in evaluation.prompt(EXAMPLE) and evaluation.prefill == '<reasoning>'


def test_demonstrations():
    rng = np.random.default_rng(0)
    train, evaluation = (tasks.get('gsm8k', f'published_{name}') for name in ('train', 'eval'))
    right = train.demonstration(EXAMPLE, rng, 1.0)
    assert right == '<reasoning>\n9 * 2 = 18\n</reasoning>\n<answer>\n18\n</answer>'
    assert train.reward(right, EXAMPLE) == pytest.approx(2.989)
    shortcut = train.demonstration(EXAMPLE, rng, 0.0)
    assert '<answer>\n2\n</answer>' in shortcut and train.reward(shortcut, EXAMPLE) < 1
    boxed = evaluation.demonstration(EXAMPLE, rng, 1.0)
    assert boxed == '\n9 * 2 = 18\n</reasoning>\n<answer>\n\\boxed{18}\n</answer>'
    assert evaluation.score(boxed, EXAMPLE).solved


def test_published_file(tmp_path):
    path = tmp_path / 'test.jsonl'
    solution = 'Half is 4/2=<<4/2=2>>2.\nAll is 1,798+2=<<1798+2=1800>>1,800.\n#### 1,800'
    records = [
        {'question': 'How many?', 'answer': solution},
        {'question': 'How cold?', 'answer': '#### -10'},
    ]
    path.write_text('\n\n'.join(map(json.dumps, records)))
    task = tasks.get('gsm8k', 'published_eval')
    many, cold = task.read_published(path)
    assert many == {
        'question': 'How many?',
        'answer': '1,800',
        'solution': 'Half is 4/2=2.\nAll is 1,798+2=1,800.',
        'index': 0,
    }
    assert cold == {'question': 'How cold?', 'answer': '-10', 'solution': '', 'index': 1}
    assert task.score('\\boxed{1800}', many).solved and task.score('\\boxed{-10}', cold).solved
    # The text is right, but its comma is not a digit.
    assert task.reward('<answer>1,800</answer>', many) == 2


@pytest.mark.parametrize(
    'line',
    [
        '{"question": "How many?", "answer": "it is 18"}',
        '{"question": "How many?", "answer": "#### many"}',
        '{"question": "How many?", "answer": true}',
        '{"question": "How many?", "answer": [18, 19]}',
        '{"question": " ", "answer": "#### 18"}',
        '{"question": "\\ud800", "answer": "#### 18"}',
        '{"question": "How many?", "answer": "#### nan"}',
        '{"answer": "#### 18"}',
        '[1]',
        'nonsense',
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / 'test.jsonl'
    path.write_text('{"question": "How many?", "answer": "#### 18"}\n' + line + '\n')
    with pytest.raises(ValueError) as error:
        tasks.get('gsm8k', 'published_eval').read_published(path)
    message = str(error.value)
    assert message.startswith(f'{path}:2: found ') and 'expected' in message
    assert '\n' not in message and len(message) < 400


@pytest.mark.parametrize(
    'truth',
    ['many', '', True, [18, 19], [[18]], float('nan'), float('inf'), 'nan', 10**400, '9' * 400],
)
def test_a_reference_is_a_number_or_null(truth):
    with pytest.raises(ValueError, match='found ground_truth .*, expected a number or null'):
        tasks.get('gsm8k', 'published_eval').read_record('', truth)


@pytest.mark.parametrize(
    ('truth', 'answer'),
    [
        (18, '18'),
        (18.0, '18'),
        (0.5, '0.5'),
        (-3, '-3'),
        ('18', '18'),
        ('2,125', '2,125'),
        ([18], '18'),
        (['18'], '18'),
        ('9 * 2 = 18\n#### 18', '18'),
        (None, ''),
    ],
)
def test_a_reference_may_be_a_number_text_or_a_list_of_one(truth, answer):
    example = tasks.get('gsm8k', 'published_eval').read_record('q', truth)
    assert example == {'question': 'q', 'answer': answer, 'solution': ''}

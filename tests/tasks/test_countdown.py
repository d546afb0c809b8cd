"""Countdown: formats, demonstrations, problems; reward and scores against verdicts set by hand."""

import itertools
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from configs.countdown import get_config
from spg_jax import tasks
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.tasks.countdown import problems, solver

pytestmark = pytest.mark.fast

HERE = Path(__file__).parent
EXAMPLE = {'numbers': [30, 100, 93], 'target': 23, 'index': 0}
SMALL = {'numbers': [2, 4, 3], 'target': 5, 'index': 0}


@pytest.fixture(scope='module')
def generated():
    return problems.generate()


def reachable(numbers, target):
    """Whether three numbers make the target: tries every expression tree in exact fractions."""

    def apply(a, b):
        yield from (a + b, a - b, a * b)
        if b:
            yield a / b

    for a, b, c in itertools.permutations(map(Fraction, numbers)):
        for first in apply(a, b):
            if first.denominator == 1 and target in (*apply(first, c), *apply(c, first)):
                return True
    return False


@pytest.mark.parametrize('line', (HERE / 'countdown_completions.jsonl').read_text().splitlines())
def test_reward_and_published_score_by_hand(line):
    case = json.loads(line)
    for format in ('published_train', 'published_eval'):
        task = tasks.get('countdown', format)
        example = task.read_record(case['question'], case['ground_truth'])
        assert task.score(case['completion'], example).solved == case['score'], case['rule']
        assert task.reward(case['completion'], example) == case['reward'], case['rule']


@pytest.mark.parametrize('format', ['published_train', 'published_eval'])
def test_the_two_published_functions_differ(format):
    task = tasks.get('countdown', format)
    bare, boxed = '<answer>2*4-3</answer>', r'<answer>\boxed{2*4-3}</answer>'
    assert (task.reward(bare, SMALL), task.score(bare, SMALL)) == (1, (0, 1, False))
    assert (task.reward(boxed, SMALL), task.score(boxed, SMALL)) == (0.1, (1, 1, True))
    assert task.scorer == 'published'


def test_compact_reward_and_score_read_the_same():
    task = tasks.get('countdown')
    assert task.scorer == 'compact'
    for answer, reward in [('2 * 4 - 3', 1), (r'\boxed{2*4-3}', 0.1), ('2 + 4 - 3', 0.1)]:
        completion = f'<answer> {answer} </answer>'
        assert task.reward(completion, SMALL) == reward
        assert task.score(completion, SMALL) == (int(reward == 1), 1, reward == 1)
    assert task.reward('2 * 4 - 3', SMALL) == 0


def test_compact_text():
    task = tasks.get('countdown')
    assert task.prompt(EXAMPLE) == '100 93 30 = 23 :'
    rng = np.random.default_rng(0)
    assert task.demonstration(EXAMPLE, rng, 1.0) == '<answer> 93 + 30 - 100 </answer>'
    assert task.demonstration(EXAMPLE, rng, 0.0) == '<answer> 100 + 93 + 30 </answer>'
    assert task.prefill == ''


def test_worked_demonstrations_are_right_line_by_line_and_fit(generated):
    """Their lines are two operations over the numbers, and lead to the value of the answer."""
    task, rng = tasks.get('countdown', 'worked'), np.random.default_rng(0)
    assert task.prompt(EXAMPLE) == '100 93 30 = 23 :'
    assert task.demonstration(EXAMPLE, rng, 1.0) == (
        '93 + 30 = 123 ; 123 - 100 = 23 ; <answer> 93 + 30 - 100 </answer>'
    )
    tokenizer, length = WordTokenizer(task.vocabulary), get_config('worked').sampling.length
    # 90 * 80 is no word of the vocabulary.
    for numbers, target in [((72, 90, 80), 100), *generated['test'], *generated['validation']]:
        example = {'numbers': list(numbers), 'target': target}
        for right_share in (0.0, 1.0):
            text = task.demonstration(example, rng, right_share)
            work, answer = re.fullmatch(r'(.*) ; <answer> (.*) </answer>', text).groups()
            left, right = zip(*(line.split(' = ') for line in work.split(' ; ')), strict=True)
            values = [eval(side) for side in left]
            assert values == [eval(side) for side in right] and values[-1] == eval(answer)
            written = re.sub(r'\d+ \* 100 \+ \d+', lambda n: str(eval(n[0])), ' '.join(left))
            operands = Counter(map(int, re.findall(r'\d+', written)))
            assert operands == Counter([*numbers, values[0]])
            assert (task.reward(text, example) == 1) >= right_share
            ids = tokenizer.encode(text)
            assert len(ids) < length and tokenizer.decode(ids) == text
        assert values[-1] == target
    assert '( 72 * 100 + 0 ) / 72 = 100' in task.demonstration(
        {'numbers': [72, 90, 80], 'target': 100}, rng, 1.0
    )


def test_published_text():
    train, evaluation = (tasks.get('countdown', f'published_{name}') for name in ('train', 'eval'))
    for task in (train, evaluation):
        prompt = task.prompt(EXAMPLE)
        assert '30, 100, 93' in prompt and '23' in prompt
        for tag in ('<reasoning>', '</reasoning>', '<answer>', '</answer>'):
            assert tag in prompt
        assert '{numbers}' not in prompt and '{target}' not in prompt
    assert '\\boxed' not in train.prompt(EXAMPLE) and train.prefill == ''
    assert r'\boxed{}' in evaluation.prompt(EXAMPLE) and evaluation.prefill == '<reasoning>'


def test_right_demonstrations_earn_what_their_format_asks():
    rng = np.random.default_rng(0)
    train, evaluation = (tasks.get('countdown', f'published_{name}') for name in ('train', 'eval'))
    assert train.reward(train.demonstration(EXAMPLE, rng, 1.0), EXAMPLE) == 1
    assert evaluation.score(evaluation.demonstration(EXAMPLE, rng, 1.0), EXAMPLE).solved


@pytest.mark.parametrize(
    ('numbers', 'target', 'answer'),
    [
        ((30, 100, 93), 23, '30 + 93 - 100'),
        ((1, 2, 3), 6, '1 + 2 + 3'),
        ((50, 2, 3), 45, '50 - 2 - 3'),
        ((2, 3, 50), 45, '50 - 2 - 3'),
        ((2, 4, 3), 5, '4 + 3 - 2'),
        ((3, 7, 8), 29, '3 * 7 + 8'),
        ((7, 8, 3), 29, '7 * 3 + 8'),
        ((74, 3, 5), 37, '74 / ( 5 - 3 )'),
        ((2, 3, 4), 24, '2 * 3 * 4'),
    ],
)
def test_canonical_answer(numbers, target, answer):
    assert solver.solve(numbers, target) == answer


def test_no_answer():
    assert solver.solve((1, 1, 1), 100) is None
    with pytest.raises(ValueError, match='cannot make 100'):
        tasks.get('countdown').right_answer({'numbers': [1, 1, 1], 'target': 100})


def test_canonical_answers_are_right_and_found_whenever_there_is_one(generated):
    task = tasks.get('countdown')
    for numbers, target in [*generated['test'], *generated['train'][:3000]]:
        example = {'numbers': list(numbers), 'target': target}
        assert task.reward(f'<answer>{task.right_answer(example)}</answer>', example) == 1
    draw = np.random.default_rng(0)
    for *numbers, target in draw.integers(1, 30, size=(1000, 4)).tolist():
        answer = solver.solve(tuple(numbers), target)
        assert (answer is not None) == reachable(numbers, target), (numbers, target)


def test_right_share_is_the_share_of_right_answers():
    task, rng = tasks.get('countdown'), np.random.default_rng(0)
    right = [task.reward(task.demonstration(EXAMPLE, rng, 0.35), EXAMPLE) == 1 for _ in range(4000)]
    # The tolerance is four standard errors.
    assert np.mean(right) == pytest.approx(0.35, abs=0.03)


def test_problems_are_what_they_should_be(generated):
    assert {split: len(drawn) for split, drawn in generated.items()} == problems.SIZES
    for drawn in generated.values():
        numbers = np.array([numbers for numbers, _ in drawn])
        targets = np.array([target for _, target in drawn])
        assert numbers.shape == (len(drawn), 3)
        assert 1 <= numbers.min() and numbers.max() <= 100
        assert 1 <= targets.min() and targets.max() <= 100
    for numbers, target in generated['train'][:300]:
        assert reachable(numbers, target)


def test_no_problem_occurs_twice_in_or_across_splits_nor_in_the_published_set(generated):
    keys = [
        (tuple(sorted(numbers)), target)
        for drawn in generated.values()
        for numbers, target in drawn
    ]
    assert len(set(keys)) == len(keys) == sum(problems.SIZES.values())
    assert not problems.published() & {problems.identity(*key) for key in keys}
    assert len(problems.published()) == 256


def test_generation_is_the_same_for_ever(generated):
    """Problems are pinned, so that figures of different releases are about the same problems."""
    assert generated['test'][0] == ((3, 26, 69), 46)
    assert generated['train'][0] == ((74, 3, 5), 37)
    assert problems.generate() == generated


def test_published_set(reference, generated):
    examples = tasks.get('countdown').read_published(reference / 'data' / 'countdown_test.jsonl')
    assert examples[0] == EXAMPLE and len(examples) == 256
    keys = {problems.identity(tuple(example['numbers']), example['target']) for example in examples}
    assert keys == problems.published()
    generated_keys = {
        (tuple(sorted(numbers)), target)
        for drawn in generated.values()
        for numbers, target in drawn
    }
    assert not generated_keys & {(tuple(sorted(e['numbers'])), e['target']) for e in examples}


@pytest.mark.parametrize(
    'line',
    [
        '{"input": "1,2,x", "output": "3"}',
        '{"input": "1,2,3"}',
        '{"input": "1,2,3", "output": "1.5"}',
        '{"input": [1, 2, true], "output": "3"}',
        '{"input": [1, 2, 1.5], "output": "3"}',
        '{"input": [1, 2, [3]], "output": "3"}',
        '{"input": [], "output": "3"}',
        '[1, 2]',
        'nonsense',
        '{"input": "1,2,3", "output": "' + '9' * 5000 + '"}',
    ],
)
def test_a_wrong_published_line_is_named(tmp_path, line):
    path = tmp_path / 'test.jsonl'
    path.write_text('{"input": "30,100,93", "output": "23"}\n' + line + '\n')
    with pytest.raises(ValueError) as error:
        tasks.get('countdown').read_published(path)
    message = str(error.value)
    assert message.startswith(f'{path}:2: found ') and 'expected' in message
    assert '\n' not in message and len(message) < 400

"""The tasks in `examples/`: built by their settings, with prompts, rewards and scores."""

import importlib.util
import math

import numpy as np
import pytest

from configs import countdown
from spg_jax import tasks
from spg_jax.assembly import assemble, check_base
from spg_jax.data.prompts import prompt_tokens
from spg_jax.data.tokenizers import word_tokenizer
from spg_jax.runs.preparation import read_problems
from tests.tasks.test_hostile import CONTENTS, WRAPPERS


@pytest.mark.fast
def test_the_example_of_an_own_task():
    config = countdown.get_config('tiny')
    config.task.name = 'examples.own_task'
    parts = assemble(config)
    check_base(config, parts)
    task, tokenizer = parts.task, word_tokenizer(parts.task)
    problems = read_problems(config, parts, tokenizer)
    sizes = [len(part) for part in (problems.train.source, problems.validation, problems.test)]
    assert sizes == [576, config.evaluation.problems, 72]  # 10 * 9 * 8 problems, a tenth each
    assert problems.digest
    example = {'digits': [7, 2, 5], 'index': 0}
    assert task.prompt(example) == '7 2 5 :'
    assert tokenizer.decode(prompt_tokens(task, tokenizer, example)) == '7 2 5 :'
    rewards = {'2 5 7': 1, '2 7 5': 1 / 3, '7 2 5': 0, '': 0, '2 5 7 9 9 9': 1 / 2, '2': 1 / 3}
    assert {text: task.reward(text, example) for text in rewards} == pytest.approx(rewards)
    assert [task.score(text, example) for text in ('2 5 7', '2 5 7 9')] == [(1, 1, 1), (0, 1, 0)]
    rng = np.random.default_rng(0)
    assert [task.demonstration(example, rng, share) for share in (1, 0)] == ['2 5 7', '7 2 5']
    figures = task.figures([task.score('2 5 7', example), task.score('', example)])
    assert figures['task'] == 'examples.own_task' and figures['accuracy'] == 1 / 2


@pytest.mark.skipif(
    importlib.util.find_spec('reasoning_gym') is None, reason='needs the extra reasoning-gym'
)
def test_the_example_of_a_task_of_reasoning_gym():
    task = tasks.get('examples.reasoning_gym_task', 'published_train')
    source = task.source('test', 'unused')
    assert len(source) == 100
    example = source[0]
    answer = task.right_answer(example)
    assert example['question'] in task.prompt(example)
    assert task.reward(answer, example) == 1 and task.score(answer, example) == (1, 1, True)
    wrong = answer.replace('1', '9')
    assert 0 < task.reward(wrong, example) < 1 and task.score(wrong, example) == (0, 1, False)
    for content in CONTENTS.values():
        for wrapper in WRAPPERS:
            reward = task.reward(wrapper.format(content), example)
            assert math.isfinite(reward) and 0 <= reward < 1

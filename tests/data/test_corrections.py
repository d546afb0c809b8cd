"""Answers to correct: the mistakes that tasks make, and batches that are the same without them."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import sharding, tasks
from spg_jax.data.demonstrations import Corrections, Demonstrations, Lessons
from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.diffusion.denoising import random_tokens
from spg_jax.models.policy import Policy
from spg_jax.models.transformer import TransformerConfig
from spg_jax.random import Purpose, example_keys
from spg_jax.tasks.countdown.task import is_right
from spg_jax.training import optimizers
from spg_jax.training.supervised import make_step
from spg_jax.training.train_state import initial_state, shardings_of
from tests.meshes import mesh_of
from tests.parameters import random_params

PUZZLE = {'puzzle': '0000423100030104', 'solution': '1342423124133124', 'index': 0}
SUM = {'numbers': [30, 100, 93], 'target': 23, 'index': 0}
PRODUCT = {'numbers': [3, 20, 7], 'target': 41, 'index': 1}
BRACKETS = {'numbers': [9, 5, 7], 'target': 28, 'index': 2}


def kind_of_row(wrong, right):
    """What happened to the cells of a row, by the plainest description that fits."""
    changed = [i for i in range(4) if wrong[i] != right[i]]
    if wrong == sorted(right):
        return 'ascending'
    if wrong == [*right[1:], right[0]]:
        return 'shift'
    if len(changed) == 2 and sorted(wrong) == sorted(right):
        return 'swap'
    return 'copy' if len(changed) == 1 and wrong[changed[0]] in right else 'other'


def test_mistakes_of_sudoku_leave_the_clues_and_change_one_row():
    task, rng = tasks.get('sudoku'), np.random.default_rng(0)
    kinds = Counter()
    for _ in range(400):
        cells = task.wrong_answer(PUZZLE, rng).split()
        assert len(cells) == 16 and set(cells) <= set('1234')
        differs = [i for i in range(16) if cells[i] != PUZZLE['solution'][i]]
        assert differs and all(PUZZLE['puzzle'][i] == '0' for i in differs)
        assert len({i // 4 for i in differs}) == 1
        if differs[0] < 4:  # the row without a clue
            kinds[kind_of_row(cells[:4], list(PUZZLE['solution'][:4]))] += 1
    assert {'ascending', 'shift', 'swap', 'copy'} <= kinds.keys() and 'other' not in kinds
    full = {'puzzle': PUZZLE['solution'], 'solution': PUZZLE['solution']}
    assert task.wrong_answer(full, rng).split() == list(PUZZLE['solution'])  # nothing may change


def kind_of_words(wrong, right):
    changed = [(a, b) for a, b in zip(wrong, right, strict=True) if a != b]
    if all(b.isdigit() for _, b in changed):
        if len(changed) == 1:
            return 'off by one' if abs(int(changed[0][0]) - int(changed[0][1])) == 1 else 'other'
        return 'swap' if sorted(wrong) == sorted(right) else 'other'
    return 'operator' if len(changed) == 1 else 'other'


@pytest.mark.parametrize('example', [SUM, PRODUCT, BRACKETS], ids=['sum', 'product', 'brackets'])
def test_mistakes_of_countdown_are_wrong_and_have_as_many_words(example):
    task, rng = tasks.get('countdown'), np.random.default_rng(0)
    tokenizer, right = WordTokenizer(task.vocabulary), task.right_answer(example).split()
    shortcut, kinds = task.shortcut_answer(example), Counter()
    for _ in range(200):
        answer = task.wrong_answer(example, rng)
        words = answer.split()
        assert len(words) == len(right) == len(tokenizer.encode(answer))
        assert not is_right(answer, example)
        kinds['shortcut' if answer == shortcut else kind_of_words(words, right)] += 1
    assert {'off by one', 'operator', 'swap'} <= kinds.keys() and 'other' not in kinds
    assert ('shortcut' in kinds) == (example is not BRACKETS)  # which has two words fewer


def lessons(**options):
    task = tasks.get('countdown')
    options = {'problems': [SUM, PRODUCT, BRACKETS] * 4, 'records': None} | options
    return Lessons(
        task=task,
        tokenizer=WordTokenizer(task.vocabulary),
        batch_size=12,
        local_rows=np.arange(12),
        prompt_length=9,
        length=12,
        **options,
    )


def test_corrections_come_beside_the_same_demonstrations():
    plain, both = (next(lessons(wrong_share=share).batches(0.5, 3)) for share in (None, 0.5))
    assert plain.corrections is None
    for name in ('prompt', 'prompt_mask', 'completion', 'index'):
        np.testing.assert_array_equal(getattr(both, name), getattr(plain, name))
    wrong, right = both.corrections
    task = tasks.get('countdown')
    tokenizer = WordTokenizer(task.vocabulary)
    rewards = {'right': [], 'wrong': []}
    for row in range(12):
        numbers = tokenizer.decode(both.prompt[row][both.prompt_mask[row]]).split()
        example = {'numbers': list(map(int, numbers[:3])), 'target': int(numbers[4])}
        for name, tokens in (('right', right), ('wrong', wrong)):
            rewards[name].append(task.reward(tokenizer.decode(tokens[row]), example))
    assert rewards['right'] == [1.0] * 12 and 0 < rewards['wrong'].count(1.0) < 12


def test_recorded_answers_are_corrected_to_themselves():
    records = [(SUM, '<answer> 1 </answer>')] * 12
    batch = next(lessons(problems=[], records=records, wrong_share=0.5).batches(1.0, 0))
    for tokens in batch.corrections:
        np.testing.assert_array_equal(tokens, batch.completion)


def test_a_task_without_wrong_answers_says_so():
    task = tasks.get('gsm8k', 'published_train')
    task.check_corrections(0.0)
    with pytest.raises(ValueError, match='wrong_share is 0.5, but task gsm8k has no wrong_answer'):
        task.check_corrections(0.5)


def test_wrong_answers_of_countdown_have_no_steps_to_write():
    """`100 - 30 / 93` has a remainder, and `9 / ( 7 - 7 )` has no value at all."""
    task = tasks.get('countdown', 'worked')
    task.check_corrections(0.0)
    tasks.get('countdown').check_corrections(0.5)
    with pytest.raises(ValueError, match='^base.edit_weight .*task.format worked.*; use ') as error:
        task.check_corrections(0.5)
    assert '\n' not in str(error.value)


class TokenTable(Policy):
    """Logits at a position are the row of the embedding table that its token names."""

    def completion_logits(self, variables, prompt, valid, completion, dropout=None):
        return variables['params']['embedding'][completion]


def test_answers_to_correct_are_read_without_a_mask_at_all_positions():
    """The loss is the sum of two, of which the second is over the right tokens of wrong answers."""
    rng, mesh = np.random.default_rng(0), mesh_of()
    policy = TokenTable(TransformerConfig(8, 8, 1, 1, 1, 8), 0, 1, np.arange(8) > 2)
    params = random_params(policy.model)
    logp = np.asarray(jax.nn.log_softmax(params['embedding']))
    optimizer = optimizers.for_pretraining(0.1, 0.0, 1.0, 10)
    state = initial_state({'params': params}, optimizer, policy, mesh, average=True)
    completion, wrong = rng.integers(3, 8, (2, 6, 5)).astype(np.int32)
    index = np.arange(6, dtype=np.uint32)
    batch = Demonstrations(
        wrong[:, :2], np.ones((6, 2), bool), completion, index, Corrections(wrong, completion)
    )
    step = make_step(policy, optimizer, 7, 0.9, shardings_of(state), 0.5, 0.6, 2.0)
    keys = example_keys(7, Purpose.EDIT, 0, index)
    seen = np.asarray(random_tokens(keys, jnp.asarray(wrong), policy.allowed, 0.6))
    expected = -logp[seen, completion].mean()
    assert (seen != wrong).any() and (seen == wrong).any()
    _, metrics = step(state, sharding.put_batch(mesh, batch))
    assert_allclose(metrics['edit_loss'][0], expected, 1e-5)
    first = metrics['denoising_loss'][0] + 2.0 * metrics['keep_loss'][0]
    assert_allclose(metrics['loss'][0], first + 0.5 * expected, 1e-5)

"""JustGRPO against its released code, the exact likelihood, cases by hand, and its sampler."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion.corruption import Draws
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.rl.objectives.trajectory import replay
from tests.rl.objectives.published import (
    advantage_of,
    assert_published,
    draws_over_updates,
    loss_of,
    objective_of,
    published,
    published_rollout,
)

pytestmark = pytest.mark.numerical
PROMPT = published()['prompt'].shape[1]
ONE_BY_ONE = SamplingConfig(32, 32, block_length=1, temperature=1.0)


def on_the_diagonal(values):
    """[B, C], a number for each token, -> readouts [B, C, C] of its draw; the rest is arbitrary."""
    values = np.asarray(values)
    return np.where(np.eye(values.shape[1], dtype=bool), values[:, None], -77.0)


def first_draws(objective, rollout):
    return jax.tree.map(lambda x: x[0], draws_over_updates(objective, rollout, 1))


@pytest.mark.parametrize(('case', 'epsilon'), [('', 0.0), ('/formula/old_eps0.2', 0.2)])
def test_loss_and_gradient_are_the_published_ones(case, epsilon):
    arrays = published()
    objective = objective_of('just_grpo', sampling=ONE_BY_ONE, epsilon=epsilon)
    advantage = advantage_of(objective, np.asarray(arrays['just_grpo/rewards']), 6)
    assert_allclose(advantage, arrays['just_grpo/advantages'], rtol=1e-5, atol=1e-7)
    assert (advantage != 0).sum() == arrays['just_grpo/valid_samples']
    rollout = published_rollout(advantage=arrays['just_grpo/advantages'])
    metrics = assert_published(
        f'just_grpo{case}',
        objective,
        rollout,
        first_draws(objective, rollout),
        behaviour=on_the_diagonal(arrays['just_grpo/old_logp']),
    )
    # The log-probabilities of the draws are those of the released code.
    logp = arrays['just_grpo/logp']
    assert_allclose(metrics['token_log_prob'][0], logp.sum(), rtol=1e-5)
    if epsilon:
        assert metrics['clip_share'][0] > 0


def test_draw_i_sees_what_is_before_token_i_and_scores_that_token():
    objective, rollout = objective_of('just_grpo', sampling=ONE_BY_ONE), published_rollout()
    commit_step = rollout.commit_step.copy()
    commit_step[2, 8:] = -1  # Row 2 was ended after its first block.
    draws = first_draws(objective, rollout.replace(commit_step=commit_step))
    assert objective.draws == 32
    assert not draws.masked[..., :PROMPT].any()
    for i in (0, 1, 31):
        expected = np.broadcast_to(np.arange(32) >= i, (6, 32))
        assert_array_equal(draws.masked[:, i, PROMPT:], expected)
    # This is what a sampler saw that committed token i at step i.
    order = np.arange(32, dtype=np.int32)
    seen, chosen = replay(order, order, order + 1)
    assert_array_equal(draws.masked[0, :, PROMPT:], seen)
    assert_array_equal(draws.target[0], chosen)
    covered = np.ones((6, 32))
    covered[2, 8:] = 0  # Nobody chose these tokens.
    assert_array_equal(draws.target.sum(axis=1), covered)
    assert_array_equal(draws.target[:, np.arange(32), np.arange(32)], covered)


def two_rows(advantage, scored):
    rollout = jax.tree.map(lambda x: x[:2], published_rollout()).replace(
        completion=np.array([[5, 6], [1, 1]]),
        scored=np.asarray(scored),
        advantage=np.asarray(advantage),
        commit_step=np.array([[0, 1], [0, 1]]),
    )
    target = np.broadcast_to(np.eye(2, dtype=bool), (2, 2, 2))
    return rollout, Draws(masked=np.ones((2, 2, PROMPT + 2), bool), target=target)


def test_two_sequences_by_hand():
    """C is 2; both tokens of the row that ends at its first count, and so does its advantage."""
    sampler = dataclasses.replace(ONE_BY_ONE, length=2, steps=2)
    rollout, draws = two_rows([2.0, -1.0], [[True, True], [True, False]])
    logp = on_the_diagonal(np.log([[0.8, 0.4], [0.2, 0.5]]))
    old = on_the_diagonal(np.log([[0.5, 0.5], [0.5, 0.5]]))
    objective = objective_of('just_grpo', group_size=2, sampling=sampler, epsilon=0.2)
    loss, _ = loss_of(objective, logp, rollout, draws, behaviour=old)
    # Ratios 1.6 (clipped to 1.2), 0.8, 0.4 (clipped to 0.8 for A = -1) and 1.
    expected = -(2 * 1.2 + 2 * 0.8 - 0.8 - 1) / (2 * (2 + 1e-5))
    assert_allclose(loss, expected, rtol=1e-5)
    without_ratio = objective_of('just_grpo', group_size=2, sampling=sampler)
    loss, _ = loss_of(without_ratio, logp, rollout, draws)
    assert_allclose(loss, -(2 * 2 - 1 * 2) / (2 * (2 + 1e-5)), rtol=1e-5)
    # A row without an advantage leaves the divisor.
    rollout, draws = two_rows([2.0, 0.0], [[True, True], [True, False]])
    loss, _ = loss_of(without_ratio, logp, rollout, draws)
    assert_allclose(loss, -2 * 2 / (2 * (1 + 1e-5)), rtol=1e-5)


def test_groups_are_averaged_each_by_its_rows_with_an_advantage():
    objective = objective_of('just_grpo', group_size=3, sampling=ONE_BY_ONE, epsilon=0.2)
    arrays = published()
    rollout = published_rollout(advantage=[1.0, -1.0, 0.0, 1.0, 0.5, -1.5])
    draws = first_draws(objective, rollout)
    logp, old = (on_the_diagonal(arrays[f'just_grpo/{name}']) for name in ('logp', 'old_logp'))
    parts = [
        loss_of(objective, logp, rollout, draws, rows, behaviour=old)[0]
        for rows in (slice(3), slice(3, 6))
    ]
    loss, _ = loss_of(objective, logp, rollout, draws, behaviour=old)
    assert_allclose(loss, np.mean(parts), rtol=1e-5)


def test_other_orders_of_sampling_are_refused():
    with pytest.raises(ValueError, match="sampling.commit is 'low_confidence' in blocks of 8, but"):
        objective_of('just_grpo')
    two_a_step = dataclasses.replace(ONE_BY_ONE, steps=16, block_length=2)
    with pytest.raises(ValueError, match='steps is 16 for 32 tokens, .* use sampling.steps 32'):
        objective_of('just_grpo', sampling=dataclasses.replace(two_a_step, commit='left_to_right'))
    blocks = SamplingConfig(32, 32, 8, temperature=1.0, commit='left_to_right')
    assert objective_of('just_grpo', sampling=blocks).draws == 32
    uneven = dataclasses.replace(blocks, schedule='timesteps')
    with pytest.raises(ValueError, match="'timesteps', .* use sampling.schedule 'even'"):
        objective_of('just_grpo', sampling=uneven)

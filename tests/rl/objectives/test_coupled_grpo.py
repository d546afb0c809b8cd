"""Coupled GRPO against its released code, a case by hand, its three views and its reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.learner import kept_policies
from tests.rl.objectives.published import (
    MASK,
    advantage_of,
    assert_published,
    draws_from,
    draws_over_updates,
    loss_of,
    objective_of,
    published,
    published_rollout,
)

pytestmark = pytest.mark.numerical
PROMPT = published()['prompt'].shape[1]


def published_draws():
    arrays = published()
    weight = np.tile(arrays['coupled_grpo/weights'], (len(arrays['prompt']), 1))
    return draws_from(arrays['coupled_grpo/noisy'] == MASK, weight=weight)


def views(estimates):
    """Readouts [B, 3, C] whose combination is the estimates [B, C].

    The goldens hold estimates of the other policies and no views of them.
    """
    return np.stack([2 * estimates, 0 * estimates, 0 * estimates], axis=1)


@pytest.mark.parametrize('case', ['published', 'eps0.2_beta0'])
def test_loss_and_gradient_are_the_published_ones(case):
    arrays = published()
    epsilon = float(arrays[f'coupled_grpo/{case}/epsilon'])
    kl = float(arrays[f'coupled_grpo/{case}/beta_kl'])
    metrics = assert_published(
        f'coupled_grpo/{case}',
        objective_of('coupled_grpo', epsilon=epsilon, kl=kl),
        published_rollout(),
        published_draws(),
        behaviour=views(arrays['coupled_grpo/old_logp']),
        reference=views(arrays['coupled_grpo/ref_logp']),
    )
    clipped, tokens = metrics['clip_share']
    assert_allclose(clipped / tokens, arrays[f'coupled_grpo/{case}/clip_fraction'], rtol=1e-6)


def test_two_sequences_by_hand():
    """t = 1/4; the second view masks the first token of the first row, none of the second row."""
    objective = objective_of('coupled_grpo', group_size=2, epsilon=0.2, kl=0.5)
    rollout = jax.tree.map(lambda x: x[:2], published_rollout(advantage=[1, -1, 0, 0, 0, 0]))
    rollout = rollout.replace(
        completion=np.array([[5, 6], [1, 1]]), scored=np.array([[True, True], [True, False]])
    )
    masked = np.zeros((2, 3, PROMPT + 2), bool)
    masked[..., PROMPT:] = [
        [[True, True], [True, False], [False, True]],
        [[True, True], [False, False], [True, True]],
    ]
    draws = Draws(masked=np.asarray(masked), weight=np.tile(np.array([1, 4, 4 / 3]), (2, 1)))
    # Entries of 99 belong to tokens that a view does not mask.
    logp = np.array(
        [[[-1.0, -2.0], [-0.5, 99], [99, -0.6]], [[-1.0, -7.0], [99, 99], [-0.3, -8.0]]]
    )
    # Estimates (-1 - 2) / 2, (-2 - 0.8) / 2 and (-1 - 0.4) / 2.
    others = {
        'behaviour': np.array(
            [[[-1.0, -2.0], [-1.0, 99], [99, -0.6]], [[-1.0, -7.0], [99, 99], [-1.5, -8.0]]]
        ),
        'reference': logp + np.array([[[0.4, 0.0]] * 3, [[0.0, 5.0]] * 3]),
    }
    loss, _ = loss_of(objective, logp, rollout, draws, **others)
    # Log ratios 1 (clipped to 1.2), 0, and 0.8 (not clipped, for A = -1); the second row's tail
    # does not count. The reference moves one estimate by 0.4 (1 + 4) / 2 = 1.
    expected = (-1.2 - 1 + np.exp(0.8) + 0.5 * (np.e - 2)) / 3
    assert_allclose(loss, expected, rtol=1e-5)


def test_each_token_is_masked_in_the_first_view_and_in_one_of_the_others():
    objective, rollout = objective_of('coupled_grpo'), published_rollout()
    draws = draws_over_updates(objective, rollout, 300)
    full, masked, complement = (draws.masked[..., view, PROMPT:] for view in range(3))
    assert not draws.masked[..., :PROMPT].any()
    assert full.all()
    assert_array_equal(masked, ~complement)
    # One t for all rows, in (0.2, 0.8), by which the views are weighted.
    assert_array_equal(draws.weight, np.broadcast_to(draws.weight[:, :1], draws.weight.shape))
    weight = draws.weight[:, 0]
    ratio = 1 / weight[:, 1]
    assert_allclose(weight[:, 2], 1 / (1 - ratio), rtol=1e-5)
    assert_array_equal(weight[:, 0], 1)
    assert 0.2 <= ratio.min() < 0.22
    assert 0.78 < ratio.max() <= 0.8
    deviation = masked.mean(axis=(1, 2)) - ratio  # of 192 tokens
    assert np.abs(deviation).max() < 5 * np.sqrt(0.25 / 192)
    assert abs(deviation.mean()) < 4 * np.sqrt(0.25 / 192 / 300)
    assert (masked[:, 0] != masked[:, 1]).any(axis=-1).all()  # Rows have masks of their own.


def test_groups_are_averaged_and_advantages_leave_the_row_out():
    objective, arrays = objective_of('coupled_grpo', group_size=3, kl=0.0), published()
    rewards = arrays['advantage/formula/rewards']
    advantage = advantage_of(objective_of('coupled_grpo'), np.asarray(rewards.reshape(-1)), 6)
    expected = arrays['advantage/formula/leave_one_out'].reshape(-1)
    assert_allclose(advantage, expected, rtol=1e-5, atol=1e-6)
    rollout, logp = published_rollout(), arrays['coupled_grpo/logp_views']
    others = {'behaviour': views(arrays['coupled_grpo/old_logp'])}
    parts = [
        loss_of(objective, logp, rollout, published_draws(), rows, **others)[0]
        for rows in (slice(3), slice(3, 6))
    ]
    loss, _ = loss_of(objective, logp, rollout, published_draws(), **others)
    assert_allclose(loss, np.mean(parts), rtol=1e-5)


def test_the_reference_takes_in_six_tenths_of_the_policy_every_64_updates():
    refresh = objective_of('coupled_grpo').kept['reference']
    kept, trained = {'params': np.array([1.0, 2.0])}, {'params': np.array([2.0, -8.0])}
    for step in (1, 63, 65, 127):
        assert_array_equal(refresh(jnp.int32(step), kept, trained)['params'], kept['params'])
    for step in (64, 128):
        found = refresh(jnp.int32(step), kept, trained)['params']
        assert_allclose(found, [1.6, -4.0], rtol=1e-6)


def test_a_reference_that_changes_is_kept_beside_new_adapters_too():
    objective = objective_of('coupled_grpo')
    for new_adapters in (True, False):
        assert kept_policies(objective, new_adapters) == ['reference']
    unchanged = objective_of('coupled_grpo', refresh_every=0)
    assert kept_policies(unchanged, new_adapters=True) == []
    assert kept_policies(unchanged, new_adapters=False) == ['reference']


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match='coupled_grpo.lowest 0.0 and coupled_grpo.highest 0.8'):
        objective_of('coupled_grpo', lowest=0.0)
    with pytest.raises(ValueError, match='coupled_grpo.refresh_share 1.5; use 0 or more'):
        objective_of('coupled_grpo', refresh_share=1.5)

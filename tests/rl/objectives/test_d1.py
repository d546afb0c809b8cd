"""d1 against its released code, a case by hand, and REINFORCE."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.objectives import Batch, Loss
from tests.rl.objectives.published import (
    MASK,
    assert_published,
    draws_from,
    gradient_of,
    objective_of,
    published,
    published_rollout,
)

pytestmark = pytest.mark.numerical


def published_draws(noisy='d1/noisy'):
    return draws_from(published()[noisy][:, None] == MASK)


@pytest.mark.parametrize('case', ['published', 'eps0.2_beta0'])
def test_loss_and_gradient_are_the_published_ones(case):
    arrays = published()
    epsilon, kl = float(arrays[f'd1/{case}/epsilon']), float(arrays[f'd1/{case}/beta_kl'])
    rollout = published_rollout()
    metrics = assert_published(
        f'd1/{case}',
        objective_of('d1', epsilon=epsilon, kl=kl),
        rollout,
        published_draws(),
        behaviour=arrays['d1/old_logp'][:, None],
        reference=arrays['d1/ref_logp'][:, None],
    )
    # (The stored clip_fraction is the released metric, which counts where the clip does nothing.)
    ratio, advantage = np.exp(arrays['d1/logp'] - arrays['d1/old_logp']), rollout.advantage[:, None]
    stopped = ((ratio > 1 + epsilon) & (advantage > 0)) | ((ratio < 1 - epsilon) & (advantage < 0))
    assert metrics['clip_share'][0] == (stopped & rollout.scored).sum() > 0


def test_on_policy_it_is_reinforce_on_one_step_log_probabilities():
    """With equal policies and no divergence, the gradient is that of -sum A l / sum 1."""
    arrays, rollout = published(), published_rollout()
    case, draws = 'd1/on_policy', published_draws('d1/on_policy/noisy')
    kl = float(arrays[f'{case}/beta_kl'])
    logp = arrays[f'{case}/logp'][:, None]
    others = {'behaviour': logp, 'reference': arrays['d1/ref_logp'][:, None]}
    assert_published(case, objective_of('d1', kl=kl), rollout, draws, **others)
    _, gradient, _ = gradient_of(objective_of('d1', kl=0.0), rollout, draws, **others)
    scored = rollout.scored.astype(jnp.float32)
    reinforce = dataclasses.replace(
        objective_of('d1'),
        loss=lambda logp, batch: Loss(
            -(batch.advantage[:, None] * scored * logp[:, 0]).sum(), scored.sum(), {}
        ),
    )
    _, expected, _ = gradient_of(reinforce, rollout, draws)
    for found, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert_allclose(found, leaf, rtol=0, atol=1e-5 * np.abs(leaf).max())


def test_two_sequences_by_hand():
    """Two rows of two tokens, the second of which ends at once; both signs are clipped once."""
    objective = objective_of('d1', group_size=2, epsilon=0.2, kl=0.5)
    rollout = jax.tree.map(lambda x: x[:2], published_rollout()).replace(
        completion=np.array([[5, 6], [1, 1]]),
        scored=np.array([[True, True], [True, False]]),
        advantage=np.array([1.0, -1.0]),
    )
    draws = Draws(masked=np.ones((2, 1, rollout.prompt.shape[1] + 2), bool))
    others = {
        'behaviour': np.log(np.array([[[0.5, 0.5]], [[0.5, 0.5]]])),
        'reference': np.log(np.array([[[0.8, 0.8]], [[0.2, 0.9]]])),
    }
    logp = np.log(np.array([[[0.8, 0.4]], [[0.2, 0.9]]]))
    loss = objective.loss(logp, Batch(rollout, draws, others, jnp.int32(0)))
    # Ratios 1.6 (clipped to 1.2), 0.8, and 0.4 (clipped to 0.8 for A = -1): -1.2 - 0.8 + 0.8.
    # k3 is 0 but for log 2 at the second token: 2 - log 2 - 1.
    expected = (-1.2 - 0.8 + 0.8 + 0.5 * (1 - np.log(2))) / 3
    assert_allclose(loss.total / loss.weight, expected, rtol=1e-5)
    assert loss.metrics['clip_share'][0] == 2

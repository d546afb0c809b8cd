"""DMPO against its released code, a case by hand, its two likelihoods, and its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.rl.objectives.dmpo import LOG_RATIO
from spg_jax.rl.scores import corrupt, moments
from tests.rl.objectives.published import (
    assert_published,
    draws_from,
    objective_of,
    published,
    published_rollout,
)
from tests.rl.objectives.sequences import (
    assert_mean_over_groups,
    hand_batch,
    many_draws,
    value_and_gradient,
    with_draws,
)

pytestmark = pytest.mark.numerical


def with_extras(batch, **extras):
    """The batch with extras of its rows."""
    extras = {name: np.asarray(value, np.float32) for name, value in extras.items()}
    return batch.replace(rows=batch.rows.replace(extras=extras))


@pytest.mark.parametrize('case', ['published', 'alpha1'])
def test_loss_and_gradient_are_the_published_ones(case):
    arrays = published()
    masked = np.moveaxis(arrays['dmpo/masked'], 0, 1)  # [B, M, C]
    log_ratio = arrays['dmpo/elbo_ref'] - arrays['dmpo/elbo_behaviour']
    metrics = assert_published(
        f'dmpo/{case}',
        objective_of('dmpo', alpha=float(arrays[f'dmpo/{case}/alpha'])),
        published_rollout(reward=arrays['dmpo/rewards'], **{LOG_RATIO: log_ratio}),
        draws_from(masked, target=masked, weight=(1 / (4 * masked.sum(-1))).astype(np.float32)),
    )
    effective = 1 / np.square(arrays[f'dmpo/{case}/w_plus']).sum() / 6
    assert_allclose(metrics['effective_share'][0], effective, rtol=1e-4)


def test_two_sequences_by_hand():
    masked = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 1], [0, 0, 0]]], bool)
    batch = hand_batch(masked, reward=[1.0, 0.0])
    batch = with_draws(batch, target=masked, weight=[[1 / 2, 1 / 4], [1 / 6, 1 / 2]])
    batch = with_extras(batch, **{LOG_RATIO: np.log([3.0, 1.0])})
    logp = [[[-2, -9, -9], [-9, -3, -5]], [[-1, -2, -3], [-9, -9, -9]]]
    objective = objective_of('dmpo', 2, alpha=1 / np.log(2), pairs=1)
    loss, gradient = value_and_gradient(objective, logp, batch)
    # Weights are proportional to 3 x 2 and 1 for the better, and to 3 / 2 and 1 for the worse.
    weights = np.array([6 / 7 - 3 / 5, 1 / 7 - 2 / 5])
    # Means over the masked tokens: -2 and -4; -2, and none. Both are averaged over two draws.
    assert_allclose(loss, -(weights[0] * -3 + weights[1] * -1), rtol=1e-5)
    per_token = np.array([[[1 / 2, 0, 0], [0, 1 / 4, 1 / 4]], [[1 / 6] * 3, [0, 0, 0]]])
    assert_allclose(gradient, -weights[:, None, None] * per_token, rtol=1e-5)


def test_the_two_likelihoods_are_taken_of_the_same_draws_which_are_not_those_of_the_loss():
    objective, rollout = objective_of('dmpo'), published_rollout()
    rng = np.random.default_rng(0)
    readouts = {
        name: rng.normal(size=(6, 1, 32)).astype(np.float32) for name in ('reference', 'policy')
    }

    @jax.jit
    def arrive(rollout, first):
        calls = {}

        def read(name, draws):
            calls[name] = draws
            return jnp.broadcast_to(readouts[name], draws.target.shape)

        extras = objective.at_rollout(read, rollout, first)
        return extras, calls, corrupt(objective.corruption, rollout, first)

    first = moments(0, rollout, jnp.int32(4), jnp.int32(0))
    extras, calls, of_loss = jax.device_get(arrive(rollout, first))
    masked = calls['reference'].masked
    assert (masked == calls['policy'].masked).all()
    assert (masked != of_loss.masked).any(-1).all()
    scored = masked[:, :, -32:]
    assert (scored.sum(-1) == 0).any()  # Two draws of this update mask nothing and add nothing.
    elbos = {  # 32 times the mean over the masked tokens, averaged over the draws
        name: np.array(
            [
                np.mean(
                    [32 * values[row, 0, draw].sum() / max(draw.sum(), 1) for draw in scored[row]]
                )
                for row in range(6)
            ]
        )
        for name, values in readouts.items()
    }
    assert_allclose(extras[LOG_RATIO], elbos['reference'] - elbos['policy'], rtol=1e-4, atol=1e-4)


def test_several_groups_are_averaged():
    rng = np.random.default_rng(0)
    masked = rng.random((4, 2, 5)) < 0.7
    masked[..., 0] = True
    batch = hand_batch(masked, reward=[1, 0, 0.5, 0.4])
    batch = with_draws(batch, target=masked, weight=1 / (2 * masked.sum(-1)))
    batch = with_extras(batch, **{LOG_RATIO: [0.1, -0.1, 0.2, 0.0]})
    objective = objective_of('dmpo', 2, alpha=1.0, pairs=1)
    assert_mean_over_groups(objective, rng.normal(size=masked.shape), batch)


def test_masks_and_their_complements_cover_all_positions_at_rates_from_a_tenth_to_one():
    draws = many_draws(objective_of('dmpo'), published_rollout(), 300)
    prompt = published()['prompt'].shape[1]
    assert not draws.masked[..., :prompt].any()
    masked = draws.masked[..., prompt:]
    assert (masked[:, :, :2] ^ masked[:, :, 2:]).all() and (draws.target == masked).all()
    counts = masked.sum(-1)
    assert_allclose(draws.weight, 1 / (4 * np.maximum(counts, 1)), rtol=1e-6)
    # Counts of 32 positions are those of a rate that is uniform over [0.1, 1].
    rng = np.random.default_rng(0)
    expected = rng.binomial(32, 0.1 + 0.9 * rng.random(200_000))
    sizes = counts[:, :, :2].reshape(-1)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        threshold = np.quantile(expected, share)
        assert_allclose((sizes <= threshold).mean(), (expected <= threshold).mean(), atol=0.03)
    assert_allclose(masked[:, :, :2].mean((0, 1, 2)), 0.55, atol=0.04)
    assert (sizes.reshape(300, 6, 2)[..., 0] != sizes.reshape(300, 6, 2)[..., 1]).mean() > 0.9


def test_a_setting_without_a_meaning_is_refused():
    with pytest.raises(ValueError, match='dmpo.alpha is 0.0'):
        objective_of('dmpo', alpha=0.0)

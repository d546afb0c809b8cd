"""ESPO against its released code, a case by hand, SPG's direction, and its pairs of masks."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.rl.objectives.published import (
    advantage_of,
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
    readouts_with,
    value_and_gradient,
    with_draws,
)

pytestmark = pytest.mark.numerical


def published_pairs(uniform_weights=False):
    """The published masks, each followed by its complement."""
    masked = np.moveaxis(published()['espo/masked'], 0, 1)  # [B, pairs, C]
    masked = np.stack([masked, ~masked], axis=2).reshape(len(masked), -1, masked.shape[-1])
    weight = 0.5 * (masked.shape[-1] + 1) / np.maximum(masked.sum(-1), 1)
    weight = np.full_like(weight, 0.5) if uniform_weights else weight
    return draws_from(masked, target=masked, weight=weight.astype(np.float32))


@pytest.mark.parametrize('case', ['sudoku', 'countdown', 'demo', 'no_kl_eps0.02'])
def test_loss_and_gradient_are_the_published_ones(case):
    arrays, draws = published(), published_pairs()
    epsilon, kl = float(arrays[f'espo/{case}/epsilon']), float(arrays[f'espo/{case}/beta_kl'])
    others = {
        name: readouts_with(2 * arrays[f'espo/{key}'][:, None], draws, draws.target)
        for name, key in (('behaviour', 'old_elbo'), ('reference', 'ref_elbo'))
    }
    metrics = assert_published(
        f'espo/{case}',
        objective_of('espo', epsilon=epsilon, kl=kl),
        published_rollout(),
        draws,
        **others if kl else {'behaviour': others['behaviour']},
    )
    assert_allclose(metrics['clip_share'][0] / 6, arrays[f'espo/{case}/clip_fraction'], atol=1e-6)
    assert metrics['clip_share'][0] > 0


def test_the_advantage_is_the_published_one():
    arrays = published()
    rewards = arrays['advantage/formula/rewards']
    advantage = advantage_of(
        objective_of('espo'), np.asarray(rewards.reshape(-1)), rewards.shape[1]
    )
    assert_allclose(advantage, arrays['advantage/formula/leave_one_out'].reshape(-1), atol=1e-6)


def test_two_sequences_by_hand():
    """Two rows of three tokens; of the second row, the first mask hides all and the other none."""
    masked = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 1], [0, 0, 0]]], bool)
    batch = hand_batch(
        masked,
        advantage=[2.0, -1.0],
        behaviour=[[[-3, -9, -9], [-9, -2, -2]], [[-3, -3, -3], [-9, -9, -9]]],
        reference=[[[-2, -9, -9], [-9, -2, -2]], [[-2, -2, -2], [-9, -9, -9]]],
    )
    batch = with_draws(batch, target=masked, weight=[[2, 1], [2 / 3, 2]])  # 4 / 2 |S|
    logp = [[[-2, -9, -9], [-9, -3, -2]], [[-1, -2, -3], [-9, -9, -9]]]
    objective = objective_of('espo', 2, epsilon=0.2, kl=0.5, pairs=1)
    loss, gradient = value_and_gradient(objective, logp, batch)
    # s: 2 (-2) + (-3 - 2) = -9 and 2/3 (-6) = -4; old: -6 - 4 = -10 and -6; reference: -8 and -4.
    # Ratios e^(1/3), clipped to 1.2 for A = 2, and e^(2/3), unclipped for A = -1.
    expected = (-2 * 1.2 + np.exp(2 / 3)) / 2 + 0.5 * (0.5 * 1 / 3 + 0) / 2
    assert_allclose(loss, expected, rtol=1e-5)
    # The first row feels only the divergence, b (s - ref) / C / rows x weight, the second only the
    # ratio, e^(2/3) / C / rows x weight.
    kl = 0.5 * -1 / 3 / 2
    ratio = np.exp(2 / 3) / 3 / 2 * 2 / 3
    expected = [[[2 * kl, 0, 0], [0, kl, kl]], [[ratio] * 3, [0, 0, 0]]]
    assert_allclose(gradient, expected, rtol=1e-5)


def random_batch(rows=4):
    """Pairs of masks over six scored tokens, none of them empty, and random readouts."""
    rng = np.random.default_rng(0)
    masked = np.stack([rng.permutation(6) < count for count in (2, 5, 3, 1)[:rows]])
    masked = np.stack([masked, ~masked], axis=1)
    logp = rng.normal(size=masked.shape)
    batch = hand_batch(masked, [1, -1, 0.5, -0.5][:rows], behaviour=rng.normal(size=masked.shape))
    return logp, with_draws(
        batch, target=masked, weight=0.5 * 7 / masked.sum(-1), block=np.zeros((rows, 2), int)
    )


@pytest.mark.parametrize('epsilon', [0.2, 0.0])
def test_on_policy_its_direction_is_that_of_spg_with_the_elbo(epsilon):
    """Where nothing lies after the EOS, the two gradients differ by the factor (C + 1) / C.

    A clip range of 0, which is published for Countdown, does not change that.
    """
    logp, batch = random_batch()
    batch = batch.replace(others={'behaviour': np.asarray(logp, np.float32)})
    _, gradient = value_and_gradient(
        objective_of('espo', 2, epsilon=epsilon, kl=0.0, pairs=1), logp, batch
    )
    _, spg = value_and_gradient(objective_of('spg', 2, negative='elbo'), logp, batch)
    assert np.abs(spg).max() > 0.01
    assert_allclose(gradient, np.asarray(spg) * 7 / 6, rtol=1e-5)


def test_several_groups_are_averaged():
    logp, batch = random_batch()
    assert_mean_over_groups(objective_of('espo', 2, kl=0.0, pairs=1), logp, batch)


def test_pairs_cover_each_position_once_and_their_counts_are_spread_over_the_batch():
    draws = many_draws(objective_of('espo'), published_rollout(), 300)
    prompt = published()['prompt'].shape[1]
    assert not draws.masked[..., :prompt].any()
    masked = draws.masked[..., prompt:]
    assert (masked[:, :, 0::2] ^ masked[:, :, 1::2]).all()
    assert (draws.target == masked).all()
    counts = masked[:, :, 0::2].sum(-1)  # [steps, B, pairs]
    assert_allclose(draws.weight, 0.5 * 33 / np.maximum(masked.sum(-1), 1), rtol=1e-6)
    # round(k + b 33 / 6) mod 33, where k is the count of the first row; Python rounds to even too.
    spread = np.array([[round(k + b * 33 / 6) % 33 for b in range(6)] for k in range(33)])
    assert (counts == np.moveaxis(spread[counts[:, 0]], -1, 1)).all()
    assert (published()['espo/counts'] == spread[published()['espo/counts'][:, 0]]).all()
    frequency = np.bincount(counts[:, 0].reshape(-1), minlength=33) / 600
    assert_allclose(frequency, 1 / 33, atol=0.025)  # three deviations are 0.021
    assert (counts[:, 0, 0] != counts[:, 0, 1]).mean() > 0.9  # each pair has its own k
    assert_allclose(masked[:, :, 0::2].mean((0, 1, 2)), 0.5, atol=0.05)  # no position is preferred

"""GDSD and GDSD-TLC against their released code, a case by hand, and what the clamp stops."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.rl.advantages import leave_one_out
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
    readouts_with,
    value_and_gradient,
    with_draws,
)

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize(
    ('method', 'case', 'old'),
    [
        ('gdsd', 'gsm8k', 'old_score'),
        ('gdsd', 'wide', 'old_score'),
        ('gdsd', 'near', 'old_score_near'),
        ('gdsd_tlc', 'wide', 'old_score'),
    ],
)
def test_loss_and_gradient_are_the_published_ones(method, case, old):
    arrays = published()
    masked = np.moveaxis(arrays['espo/masked'], 0, 1)  # [B, pairs, C]
    masked = np.stack([masked, ~masked], axis=2).reshape(len(masked), -1, masked.shape[-1])
    tlc = (0.5 * 33 / np.maximum(masked.sum(-1), 1)).astype(np.float32)
    draws = draws_from(masked, target=masked, weight=tlc)
    used = draws.replace(weight=tlc if method == 'gdsd_tlc' else np.full_like(tlc, 0.5))
    epsilon, psi, kl = (
        float(arrays[f'{method}/{case}/{name}']) for name in ('epsilon', 'psi', 'beta_kl')
    )
    others = {'behaviour': readouts_with(arrays[f'{method}/{old}'], used, masked)}
    if kl:
        others['reference'] = readouts_with(arrays[f'{method}/ref_score'], used, masked)
    metrics = assert_published(
        f'{method}/{case}',
        objective_of(
            'gdsd',
            epsilon=epsilon,
            strength=psi,
            kl=kl,
            weights='tlc' if method == 'gdsd_tlc' else 'equal',
        ),
        published_rollout(),
        draws,
        **others,
    )
    change = arrays[f'{method}/score'] - arrays[f'{method}/{old}']
    clamped = (change < np.log(1 - epsilon)) | (change > np.log(1 + epsilon))
    assert metrics['clip_share'] == (clamped.sum(), 12)
    assert metrics['clip_share'][0] == {'gsm8k': 12, 'near': 5}.get(case, clamped.sum()) > 0


def by_hand(behaviour):
    """A row of two tokens with one pair of masks, which hide the first token and the second."""
    masked = np.array([[[1, 0], [0, 1]]] * 2, bool)
    batch = hand_batch(
        masked,
        advantage=[0.5, -0.5],
        behaviour=behaviour,
        reference=[[[-1, -9], [-9, -1]], [[-4, -9], [-9, -4]]],
    )
    return with_draws(batch, target=masked, weight=[[1.5, 1.5]] * 2)  # 3 / 2 |S|


def test_two_sequences_by_hand():
    logp = [[[-2, -9], [-9, -3]], [[-3, -9], [-9, -3]]]
    batch = by_hand([[[-2, -9], [-9, -3.2]], [[-9, -9], [-9, -9]]])
    objective = objective_of('gdsd', 2, epsilon=0.5, strength=2.0, kl=0.1, pairs=1)
    loss, gradient = value_and_gradient(objective, logp, batch)
    # s is -5/2 and -3, of the old policy -2.6 and -9, of the reference -1 and -4. The changes 0.1
    # and 6 become 0.1 and log 1.5; the targets are 1 and -1.
    square = (0.05 - 1) ** 2 + (np.log(1.5) / 2 + 1) ** 2
    kl = (0.5 * 1.5**2 / 2 + 0.5 * 1.0**2 / 2) * 0.1
    assert_allclose(loss, (square + kl) / 2, rtol=1e-5)
    # Of a token of the first row: half of (2 (0.05 - 1) + 0.1 (-1.5)) / 2 tokens / 2 rows; of the
    # second row, which is clamped, half of 0.1 (1.0) / 2 / 2.
    first, second = (2 * (0.05 - 1) - 0.15) / 8, 0.1 / 8
    expected = [[[first, 0], [0, first]], [[second, 0], [0, second]]]
    assert_allclose(gradient, expected, rtol=1e-5)


def test_weights_of_tlc_are_those_of_the_draws():
    logp = [[[-2, -9], [-9, -3]], [[-3, -9], [-9, -3]]]
    batch = by_hand(logp).replace(others={'behaviour': np.array(logp, np.float32) - 0.01})
    settings = {'kl': 0.0, 'epsilon': 0.5, 'strength': 0.1, 'pairs': 1}
    equal, tlc = (
        value_and_gradient(objective_of('gdsd', 2, weights=weights, **settings), logp, batch)[0]
        for weights in ('equal', 'tlc')
    )
    # Every token counts 1/2 or 3/2, so that the changes per token are 0.005 and 0.015.
    assert_allclose(equal, ((0.005 - 0.05) ** 2 + (0.005 + 0.05) ** 2) / 2, rtol=1e-4)
    assert_allclose(tlc, ((0.015 - 0.05) ** 2 + (0.015 + 0.05) ** 2) / 2, rtol=1e-4)


def test_on_policy_its_gradient_is_that_of_reinforce():
    """At s = s_old the gradient is -2 p A / C of the sum over pairs of s_k, averaged over rows."""
    rng = np.random.default_rng(0)
    masked = np.stack([rng.random((4, 5)) < 0.5 for _ in range(2)], axis=1)  # [b, pairs, C]
    masked = np.stack([masked, ~masked], axis=2).reshape(4, 4, 5)
    logp = rng.normal(size=masked.shape)
    batch = hand_batch(masked, [1, -1, 0.5, 0.0], behaviour=logp)
    batch = with_draws(batch, target=masked, weight=np.ones((4, 4)))
    _, gradient = value_and_gradient(objective_of('gdsd', kl=0.0), logp, batch)
    expected = -2 * 10 * batch.advantage[:, None, None] / 5 / 4 * 0.5 * masked
    assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_several_groups_are_averaged():
    rng = np.random.default_rng(0)
    masked = np.stack([rng.random((4, 5)) < 0.5, np.zeros((4, 5), bool)], axis=1)
    masked[:, 1] = ~masked[:, 0]
    batch = hand_batch(masked, [0.2, -0.2, 0.1, -0.1], behaviour=rng.normal(size=masked.shape))
    batch = with_draws(batch, target=masked, weight=np.ones((4, 2)))
    objective = objective_of('gdsd', 2, kl=0.0, epsilon=0.9, pairs=1)
    assert_mean_over_groups(objective, rng.normal(size=masked.shape), batch)


def test_it_takes_the_draws_and_advantages_of_espo():
    ours, espo = (
        many_draws(objective_of(name), published_rollout(), 2) for name in ('gdsd', 'espo')
    )
    assert (ours.masked == espo.masked).all() and (ours.target == espo.target).all()
    assert objective_of('gdsd').advantage is leave_one_out


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: objective_of('gdsd', epsilon=1.0), 'gdsd.epsilon is 1.0'),
        (lambda: objective_of('gdsd', weights='none'), 'gdsd.weights'),
    ],
)
def test_settings_without_a_meaning_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

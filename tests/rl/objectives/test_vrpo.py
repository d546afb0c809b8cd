"""VRPO against a port and the formula of DPO, a case by hand, its pairs, and its spread counts."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.rl.objectives.published import (
    assert_published,
    draws_from,
    objective_of,
    published,
    published_rollout,
)
from tests.rl.objectives.sequences import (
    ends,
    hand_batch,
    many_draws,
    part,
    readouts_with,
    value_and_gradient,
    with_draws,
)

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize(
    ('case', 'score'), [('port_per_token', 'token'), ('formula/per_sequence', 'sequence')]
)
def test_loss_and_gradient_are_the_published_ones(case, score):
    arrays, masked = published(), published()['vrpo/masked']
    reward = np.zeros(6)
    reward[arrays['vrpo/pairs'][:, 0]] = 1.0  # neighbours are the pairs, in either order
    rollout = published_rollout(reward=reward)
    length = np.asarray(rollout.scored).sum(-1, keepdims=True)
    weight = (length / (4 * masked.sum(-1))).astype(np.float32)
    draws = draws_from(masked, weight=weight, valid=np.repeat(ends(rollout)[:, None], 4, axis=1))
    metrics = assert_published(
        f'vrpo/{case}',
        objective_of('vrpo', 2, beta=float(arrays['vrpo/beta']), score=score),
        rollout,
        draws,
        reference=readouts_with(arrays['vrpo/ref_elbo'] / 4, draws, masked),
    )
    change = (arrays['vrpo/elbo'] - arrays['vrpo/ref_elbo']).mean(-1)[arrays['vrpo/pairs']]
    margin = (change[:, 0] - change[:, 1]) / (32 if score == 'token' else 1)
    assert_allclose(metrics['margin'][0], margin.sum(), rtol=1e-3)
    assert metrics['in_order'] == ((margin > 0).sum(), 3)


def by_hand():
    """Two groups of three rows of two tokens; in the second group all rewards are equal."""
    masked = np.tile(np.array([[1, 1], [1, 0]], bool), (6, 1, 1))
    reference = np.full(masked.shape, -2.0)
    batch = hand_batch(masked, reward=[0.5, 1.0, 0.0, 1.0, 1.0, 1.0], reference=reference)
    batch = with_draws(batch, weight=[[1 / 2, 1]] * 6)  # n / 2 draws / |S|
    logp = reference.copy()
    logp[0] += 7.0  # neither the best nor the worst
    logp[1] += [[0.5, 0.1], [0.3, 9.0]]  # s - s_ref = 0.3 + 0.3
    logp[2] += [[-0.2, 0.0], [0.2, 9.0]]  # -0.1 + 0.2
    logp[3] += 7.0
    return logp, batch


@pytest.mark.parametrize('score', ['sequence', 'token'])
def test_a_pair_by_hand_beside_a_group_without_one(score):
    logp, batch = by_hand()
    objective = objective_of('vrpo', 3, beta=2.0, draws=2, score=score)
    loss, gradient = value_and_gradient(objective, logp, batch)
    scale = 2.0 if score == 'sequence' else 1.0  # beta, or beta / C
    assert_allclose(loss, np.log1p(np.exp(-scale * 0.5)), rtol=1e-5)
    slope = scale / (1 + np.exp(scale * 0.5))
    expected = np.zeros((6, 2, 2))
    expected[1] = -slope * np.array([[1 / 2, 1 / 2], [1, 0]])
    expected[2] = -expected[1]
    assert_allclose(gradient, expected, rtol=1e-5)


def test_groups_without_a_pair_have_no_part_in_the_mean():
    logp, batch = by_hand()
    objective = objective_of('vrpo', 3, draws=2)
    both = value_and_gradient(objective, logp, batch)[0]
    first, second = slice(0, 3), slice(3, 6)
    alone = value_and_gradient(objective, logp[first], part(batch, first))[0]
    assert_allclose(both, alone, rtol=1e-6)
    loss = jax.jit(objective.loss)(logp[second], part(batch, second))
    assert loss.total == loss.weight == loss.metrics['groups_with_pair'][0] == 0
    # With another pair the loss is the mean of both.
    reward = np.array([0.5, 1.0, 0.0, 1.0, 0.0, 0.5], np.float32)
    batch = batch.replace(rows=batch.rows.replace(reward=reward))
    logp[3] -= 6.9
    pairs = [
        value_and_gradient(objective, logp[rows], part(batch, rows))[0] for rows in (first, second)
    ]
    assert abs(pairs[0] - pairs[1]) > 0.01
    assert_allclose(value_and_gradient(objective, logp, batch)[0], np.mean(pairs), rtol=1e-6)


def test_counts_are_spread_over_the_draws_of_a_row():
    draws = many_draws(objective_of('vrpo', draws=4), published_rollout(), 300)
    masked, valid = draws.masked[..., 12:], draws.valid
    assert not draws.masked[..., :12].any()
    assert (valid == ends(published_rollout())[None, :, None]).all()
    assert not (masked & ~valid[..., 12:]).any()
    counts = masked.sum(-1)  # [steps, B, M]
    for row, n in enumerate([32, 20, 5, 31, 8, 17]):
        # Python's round goes to the even number at a half too.
        spread = np.array(
            [[(round(k + i * n / 4) - 1) % n + 1 for i in range(4)] for k in range(1, n + 1)]
        )
        assert (counts[:, row] == spread[counts[:, row, 0] - 1]).all()
        stored = published()['vrpo/masked'][row].sum(-1)
        assert (stored == spread[stored[0] - 1]).all()
        assert_allclose(draws.weight[:, row], n / (4 * counts[:, row]), rtol=1e-6)
        frequency = np.bincount(counts[:, row, 0], minlength=n + 1)[1:] / 300
        assert_allclose(frequency, 1 / n, atol=3.5 * np.sqrt(1 / n / 300))
    assert_allclose(masked[:, 2, 0, :5].mean(0), 0.6, atol=0.1)  # no position is preferred


def test_a_setting_without_a_meaning_is_refused():
    with pytest.raises(ValueError, match="vrpo.score is 'word'"):
        objective_of('vrpo', score='word')

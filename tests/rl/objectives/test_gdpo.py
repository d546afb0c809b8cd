"""GDPO against its two ports, a case by hand, and its rule of quadrature."""

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
    assert_mean_over_groups,
    ends,
    hand_batch,
    many_draws,
    readouts_with,
    value_and_gradient,
    with_draws,
)

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize(
    ('case', 'ratio', 'old'),
    [
        ('nemo_eps0.5', 'token', 'old_elbo'),
        ('nemo_eps0.1', 'token', 'old_elbo'),
        ('eq6_eps0.5', 'sequence', 'old_elbo'),
        ('eq6_eps0.1', 'sequence', 'old_elbo'),
        ('eq6_near_eps0.2', 'sequence', 'old_elbo_near'),
    ],
)
def test_loss_and_gradient_are_the_published_ones(case, ratio, old):
    arrays, rollout = published(), published_rollout()
    case, masked = f'gdpo/formula/{case}', arrays['gdpo/formula/masked']
    weight = np.tile(arrays['gdpo/formula/coefficient'], (6, 1))
    # The stored readouts saw the tail of EOS tokens, unlike those of training.
    draws = draws_from(masked, weight=weight)
    epsilon = float(arrays[f'{case}/epsilon'])
    behaviour = readouts_with(arrays[f'gdpo/formula/{old}'][:, None], draws, masked)
    objective = objective_of('gdpo', epsilon=epsilon, ratio=ratio)
    metrics = assert_published(case, objective, rollout, draws, behaviour=behaviour)
    assert_allclose(metrics['clip_share'][0] / 6, arrays[f'{case}/clip_fraction'], atol=1e-6)
    assert metrics['clip_share'][0] > 0


@pytest.mark.parametrize('ratio', ['token', 'sequence'])
def test_two_sequences_by_hand(ratio):
    """Two rows of four tokens, the second of which ends after two; A = 2 is clipped for both."""
    masked = [[[1, 0, 0, 0], [1, 1, 0, 1]], [[0, 1, 0, 0], [1, 1, 0, 0]]]
    batch = hand_batch(
        masked,
        advantage=[2.0, -1.0],
        scored=[[1, 1, 1, 1], [1, 1, 0, 0]],
        behaviour=[[[-3, 0, 0, 0], [-2, -2, 0, -2]], [[0, -2, 0, 0], [-1, -1, 0, 0]]],
    )
    batch = with_draws(batch, weight=[[2.0, 0.5]] * 2)
    logp = [[[-1, 0, 0, 0], [-2, -1, 0, -1]], [[0, -1.9, 0, 0], [-1, -1, 0, 0]]]
    loss, gradient = value_and_gradient(
        objective_of('gdpo', 2, epsilon=0.5, ratio=ratio), logp, batch
    )
    # s changes by 2 (2) + (1 + 1) / 2 = 5 in the first row, and by 2 (0.1) in the second.
    token = (-2 * 1.5 + np.exp(0.2 / 2)) / 2
    sequence = (-2 * 1.5 / 4 + np.exp(0.2) / 2) / 2
    assert_allclose(loss, token if ratio == 'token' else sequence, rtol=1e-5)
    slope = (np.exp(0.2 / 2) if ratio == 'token' else np.exp(0.2)) / 2 / 2  # / n / rows
    expected = [[[0] * 4] * 2, [[0, 2 * slope, 0, 0], [slope / 2, slope / 2, 0, 0]]]
    assert_allclose(gradient, expected, rtol=1e-5)


def test_ratios_too_large_for_a_float_leave_the_gradient_finite():
    masked = np.ones((3, 1, 4), bool)
    batch = hand_batch(masked, [1.0, 0.0, -1.0], behaviour=np.full(masked.shape, -50.0))
    batch = with_draws(batch, weight=np.ones((3, 1)))
    logp = np.full(masked.shape, -0.1)  # Ratios of e^200, and of 1 for the worse row.
    logp[2] = -50.0
    objective = objective_of('gdpo', 3, points=1, ratio='sequence')
    loss, gradient = value_and_gradient(objective, logp, batch)
    assert_allclose(loss, (-1.5 + 1) / 4 / 3, rtol=1e-5)
    assert_allclose(gradient, np.array([0, 0, 1 / 12])[:, None, None] * masked, rtol=1e-4)


def test_several_groups_are_averaged():
    rng = np.random.default_rng(0)
    masked = rng.random((4, 3, 5)) < 0.7
    batch = hand_batch(masked, [1, -1, 0.5, -0.5], behaviour=rng.normal(size=masked.shape))
    batch = with_draws(batch, weight=np.full((4, 3), 0.5))
    assert_mean_over_groups(objective_of('gdpo', 2), rng.normal(size=masked.shape), batch)


@pytest.mark.parametrize('points', [2, 3])
def test_draws_lie_at_the_nodes_of_the_rule_and_end_at_the_eos(points):
    arrays, rollout = published(), published_rollout()
    draws = many_draws(objective_of('gdpo', points=points), rollout, 300)
    times, weights = (arrays[f'gdpo/formula/{name}{points}'] for name in ('times', 'weights'))
    assert_allclose(draws.weight, np.broadcast_to(weights / times, (300, 6, points)), rtol=1e-5)
    # The rule is exact for polynomials of degree 2 points - 1, so that their nodes are these.
    for power in range(2 * points):
        assert_allclose((weights * times**power).sum(), 1 / (power + 1), rtol=1e-5)
    masked, valid = draws.masked[..., 12:], draws.valid
    assert not draws.masked[..., :12].any()
    assert (valid == ends(rollout)[None, :, None]).all()
    assert not (masked & ~valid[..., 12:]).any()
    length = np.array([32, 20, 5, 31, 8, 17])[:, None]
    counts = np.maximum(1, np.floor(np.float64(times) * length))
    assert (masked.sum(-1) == counts).all()
    if points == 3:
        assert (counts == arrays['gdpo/formula/counts']).all()
        assert_allclose(masked[:, 0, 1].mean(0), 0.5, atol=0.1)  # no position is preferred


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: objective_of('gdpo', ratio='word'), "gdpo.ratio is 'word'"),
        (lambda: objective_of('gdpo', points=0), 'gdpo.points is 0'),
    ],
)
def test_settings_without_a_meaning_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""BGPO against a port, a case by hand, its gradient on policy, and its masks."""

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
    ends,
    hand_batch,
    many_draws,
    readouts_with,
    value_and_gradient,
    with_draws,
)

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize('case', ['clip0.2', 'unclipped'])
def test_loss_and_gradient_are_the_published_ones(case):
    arrays, rollout = published(), published_rollout()
    masked = arrays['bgpo/masked']
    length = np.asarray(rollout.scored).sum(-1, keepdims=True)
    valid = np.repeat(ends(rollout)[:, None], 4, axis=1)
    weight = (length / masked.sum(-1)).astype(np.float32)
    draws = draws_from(masked, target=masked, weight=weight, valid=valid)
    metrics = assert_published(
        f'bgpo/{case}',
        objective_of('bgpo', epsilon=float(arrays[f'bgpo/{case}/epsilon']), tokens='eos'),
        rollout,
        draws,
        behaviour=readouts_with(arrays['bgpo/old_elbo'], draws, masked),
    )
    share, tokens = metrics['clip_share']
    assert tokens == length.sum()
    assert_allclose(share / tokens, arrays[f'bgpo/{case}/clip_fraction'], atol=1e-6)


def test_the_advantage_is_divided_by_the_standard_deviation():
    reward = np.array([1.0, 0.0, 0.75, -0.25, 0.5, 1.0], np.float32)
    advantage = advantage_of(objective_of('bgpo'), np.asarray(reward), 6)
    assert_allclose(advantage, (reward - 0.5) / (reward.std(ddof=1) + 1e-6), rtol=1e-5)


def by_hand():
    """Two rows of two tokens with three draws each, which mask the first token and then both.

    The second row ends after one token, which counts where all do.
    """
    masked = np.array([[[1, 0], [1, 1], [1, 1]]] * 2, bool)
    batch = hand_batch(
        masked, [0.5, -1.0], scored=[[1, 1], [1, 0]], behaviour=np.zeros(masked.shape)
    )
    batch = with_draws(batch, target=masked, weight=[[2, 1, 1]] * 2)
    logp = [[[0.1, 9], [0.2, 0.4], [-2.0, -2.0]], [[0.2, 9], [-0.3, -0.3], [1.0, 3.0]]]
    return np.array(logp), batch


@pytest.mark.parametrize('tokens', ['all', 'eos'])
def test_two_sequences_by_hand(tokens):
    logp, batch = by_hand()
    objective = objective_of('bgpo', 2, epsilon=0.2, cap=3.0, tokens=tokens)
    loss, gradient = value_and_gradient(objective, logp, batch)
    # d of the better row: 0.1, 0.3 and -2, whose ratios are 1.1, 1.3 (clipped to 1.2) and -1; of
    # the worse row: 0.2, -0.3 and 2, e^0.2, e^-0.3 = 0.74 (clipped to 0.8) and e^2 (capped at 3).
    rows = np.array([-0.5 * (1.1 + 1.2 - 1.0) / 3, (np.exp(0.2) + 0.8 + 3.0) / 3])
    weights = np.array([2, 2] if tokens == 'all' else [2, 1])
    weights = weights / weights.sum()
    assert_allclose(loss, (weights * rows).sum(), rtol=1e-5)
    expected = np.zeros((2, 3, 2))
    expected[0] = np.array([[2, 0], [0, 0], [1, 1]]) * -0.5 / 2 / 3 * weights[0]
    expected[1] = np.array([[2 * np.exp(0.2), 0], [0, 0], [0, 0]]) / 2 / 3 * weights[1]
    assert_allclose(gradient, expected, rtol=1e-5)


def test_on_policy_its_gradient_is_that_of_the_advantage_times_the_elbo():
    logp, batch = by_hand()
    batch = batch.replace(others={'behaviour': np.asarray(logp, np.float32)})
    _, gradient = value_and_gradient(objective_of('bgpo', 2), logp, batch)
    # -A / C of the mean over draws of weight x sum, averaged over the two rows.
    slope = batch.advantage[:, None, None] * batch.draws.weight[..., None] * batch.target
    assert_allclose(gradient, -slope / 2 / 3 / 2, rtol=1e-5)


def test_several_groups_are_one_mean_over_tokens():
    rng = np.random.default_rng(0)
    masked = np.ones((4, 2, 5), bool)
    lengths = [5, 3, 1, 2]
    batch = hand_batch(
        masked,
        [1, -1, 2, -2],
        scored=np.arange(5) < np.array(lengths)[:, None],
        behaviour=0.1 * rng.normal(size=masked.shape),
    )
    batch = with_draws(batch, target=masked, weight=np.ones((4, 2)))
    logp = np.zeros(masked.shape)
    loss, _ = value_and_gradient(objective_of('bgpo', 2, epsilon=0.9, tokens='eos'), logp, batch)
    change = -batch.others['behaviour'].sum(-1) / 5
    ratio = np.where(batch.advantage[:, None] > 0, 1 + change, np.exp(change)).mean(-1)
    assert_allclose(loss, -(lengths * batch.advantage * ratio).sum() / 11, rtol=1e-5)


@pytest.mark.parametrize('tokens', ['all', 'eos'])
def test_masks_are_drawn_once_a_rollout_with_counts_spread_over_the_draws(tokens):
    rollout = published_rollout()
    draws = many_draws(objective_of('bgpo', draws=4, tokens=tokens), rollout, 400, turns=2)
    assert (draws.masked[0::2] == draws.masked[1::2]).all()
    assert (draws.masked[0::2][:-1] != draws.masked[0::2][1:]).any((-2, -1)).all()
    assert not draws.masked[..., :12].any()
    masked, valid = draws.masked[0::2, ..., 12:], draws.valid[0::2]
    assert (draws.target[0::2] == masked).all()
    end = np.ones((6, 44), bool) if tokens == 'all' else ends(rollout)
    assert (valid == end[None, :, None]).all() and not (masked & ~valid[..., 12:]).any()
    counts = masked.sum(-1)  # [steps, B, M]
    lengths = [32] * 6 if tokens == 'all' else [32, 20, 5, 31, 8, 17]
    for row, n in enumerate(lengths):
        spread = np.array(
            [[(round(k + i * n / 4) - 1) % n + 1 for i in range(4)] for k in range(1, n + 1)]
        )
        assert (counts[:, row] == spread[counts[:, row, 0] - 1]).all()
        assert_allclose(draws.weight[0::2, row], n / counts[:, row], rtol=1e-6)
        if tokens == 'eos':
            stored = published()['bgpo/masked'][row].sum(-1)
            assert (stored == spread[stored[0] - 1]).all()


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: objective_of('bgpo', tokens='none'), "bgpo.tokens is 'none'"),
        (lambda: objective_of('bgpo', cap=0.5), 'bgpo.cap is 0.5'),
    ],
)
def test_settings_without_a_meaning_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

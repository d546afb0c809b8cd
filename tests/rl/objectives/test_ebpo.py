"""EBPO against a port, a case by hand, and its masks, which leave no block out."""

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
    part,
    value_and_gradient,
)

pytestmark = pytest.mark.numerical


def test_loss_and_gradient_are_the_published_ones():
    arrays, rollout = published(), published_rollout()
    masked, rate = arrays['ebpo/masked'], arrays['ebpo/mask_rate']
    # Readouts of the old policy whose score is the stored one: sum_i l_i / rate_i of each draw.
    per_token = arrays['ebpo/old_elbo'][:, None, None] / masked.sum(-1, keepdims=True)
    metrics = assert_published(
        'ebpo',
        objective_of('ebpo', epsilon=float(arrays['ebpo/epsilon'])),
        rollout,
        draws_from(masked, valid=np.repeat(ends(rollout)[:, None], 4, axis=1)),
        behaviour=per_token * rate,
    )
    assert_allclose(metrics['clip_share'][0] / 6, arrays['ebpo/clip_fraction'], atol=1e-6)
    assert metrics['clip_share'][0] > 0


def by_hand():
    """Two rows of a block of eight and one of two or five tokens, with two draws each."""
    masked = np.zeros((2, 2, 16), bool)
    masked[:, 0, [0, 1, 8]] = True  # shares 1/4, and 1/2 or 1/5
    masked[:, 1, [4, 5, 6, 7, 8, 9]] = True  # shares 1/2, and 1 or 2/5
    scored = np.arange(16) < np.array([[10], [13]])
    batch = hand_batch(masked, [-1.0, 2.0], scored=scored, behaviour=np.full(masked.shape, -1.0))
    logp = np.full(masked.shape, 7.0)
    logp[masked] = -1.0
    logp[0, 0, 0] += 0.01
    logp[0, 1, 9] += 0.06
    logp[1, 0, 8] += 0.1
    return logp, batch


def test_two_sequences_by_hand():
    logp, batch = by_hand()
    objective = objective_of('ebpo', 2, epsilon=0.2, draws=2)
    loss, gradient = value_and_gradient(objective, logp, batch)
    # s changes by (0.01 / (1/4) + 0.06) / 2 = 0.05 and by 0.1 / (1/5) / 2 = 0.25 > log 1.2.
    assert_allclose(loss, (np.exp(0.05) - 2 * 1.2) / 2, rtol=1e-5)
    expected = np.zeros((2, 2, 16))
    expected[0, 0, [0, 1, 8]] = 4, 4, 2
    expected[0, 1, [4, 5, 6, 7, 8, 9]] = 2, 2, 2, 2, 1, 1
    assert_allclose(gradient, expected * np.exp(0.05) / 2 / 2, rtol=1e-5)


def test_several_groups_are_averaged():
    logp, batch = by_hand()
    twice = np.concatenate([logp, batch.others['behaviour']])  # the second group is on policy
    batch = part(batch, np.array([0, 1, 0, 1]))
    assert_mean_over_groups(objective_of('ebpo', 2, draws=2), twice, batch)


def levels_fit(counts, size, draws):
    """Whether some offset explains the counts [M, blocks] by floor(u n_b) + 1 on an even grid."""
    reached = len(size)
    grid = np.arange(draws * reached).reshape(draws, reached) / (draws * reached)
    offsets = (np.arange(4000) + 0.5)[:, None, None] / 4000
    expected = np.floor((offsets + grid) % 1 * size).astype(int) + 1
    return (expected == counts).all((1, 2)).any()


def test_every_block_is_partly_masked_at_levels_on_an_even_grid():
    rollout = published_rollout()
    draws = many_draws(objective_of('ebpo', draws=4), rollout, 150)
    masked = draws.masked[..., 12:]
    assert not draws.masked[..., :12].any()
    assert (draws.valid == ends(rollout)[None, :, None]).all()
    scored = np.asarray(rollout.scored)
    assert not (masked & ~scored[None, :, None]).any()
    size = scored.reshape(6, 4, 8).sum(-1)
    counts = masked.reshape(150, 6, 4, 4, 8).sum(-1)  # [steps, B, M, blocks]
    stored = published()['ebpo/masked'].reshape(6, 4, 4, 8).sum(-1)
    for row in range(6):
        blocks = (size[row] > 0).sum()
        assert (counts[:, row, :, :blocks] > 0).all()
        assert levels_fit(stored[row, :, :blocks], size[row, :blocks], 4)
        for step in range(20):
            assert levels_fit(counts[step, row, :, :blocks], size[row, :blocks], 4)
    # Every number of tokens from 1 to 8 is as frequent, and no position is preferred.
    frequency = np.bincount(counts[:, 0].reshape(-1), minlength=9)[1:] / counts[:, 0].size
    assert_allclose(frequency, 1 / 8, atol=0.01)
    assert_allclose(masked[:, 0].mean((0, 1)), 4.5 / 8, atol=0.08)

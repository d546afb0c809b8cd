"""d2 against its released code, a case by hand, and its states."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from spg_jax.diffusion.corruption import Draws
from spg_jax.diffusion.sampling import SamplingConfig
from tests.rl.objectives.published import (
    MASK,
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
    """Four segments; the stored `scored` is all that a segment commits, past the EOS too."""
    arrays = published()
    target = (arrays['d2/scored'] > 0) & (arrays['completion_mask'] > 0)
    return draws_from(
        np.moveaxis(arrays['d2/noisy'] == MASK, 0, 1), target=np.moveaxis(target, 0, 1)
    )


def in_segments(logp):
    """The stored log-probabilities [B, C], each from its segment, as readouts [B, N, C]."""
    return np.repeat(logp[:, None], 4, axis=1)


@pytest.mark.parametrize('case', ['published', 'eps0.2_beta0'])
def test_loss_and_gradient_are_the_published_ones(case):
    arrays = published()
    epsilon, kl = float(arrays[f'd2/{case}/epsilon']), float(arrays[f'd2/{case}/beta_kl'])
    metrics = assert_published(
        f'd2/{case}',
        objective_of('d2', segments=4, epsilon=epsilon, kl=kl),
        published_rollout(),
        published_draws(),
        behaviour=in_segments(arrays['d2/old_logp']),
        reference=in_segments(arrays['d2/ref_logp']),
    )
    ratio = np.exp(arrays['d2/logp'] - arrays['d2/old_logp'])
    advantage = arrays['advantages'][:, None]
    stopped = ((ratio > 1 + epsilon) & (advantage > 0)) | ((ratio < 1 - epsilon) & (advantage < 0))
    assert metrics['clip_share'][0] == (stopped & (arrays['completion_mask'] > 0)).sum() > 0


def test_states_are_the_published_ones_but_for_the_prompt():
    objective, expected = objective_of('d2', segments=4), published_draws()
    draws = draws_over_updates(objective, published_rollout(), 200)
    shape = (200, *expected.target.shape)
    assert_array_equal(draws.target, np.broadcast_to(expected.target, shape))
    completion = np.broadcast_to(expected.masked[..., PROMPT:], shape)
    assert_array_equal(draws.masked[..., PROMPT:], completion)
    prompt = np.asarray(draws.masked[..., :PROMPT])  # [200, B, N, P]
    assert_array_equal(prompt, np.broadcast_to(prompt[:, :, :1], prompt.shape))
    assert_allclose(prompt.mean(), 0.15, atol=0.012)  # four standard errors
    assert (prompt[1:] != prompt[:-1]).any(axis=(2, 3)).mean() > 0.9


def test_uneven_segments_score_each_token_once():
    """Three segments of 16 steps start at 0, 5 and 10."""
    rollout = published_rollout()
    draws = draws_over_updates(objective_of('d2', segments=3), rollout, 1)
    assert_array_equal(draws.target[0].sum(axis=1), rollout.scored)
    segment = np.digitize(rollout.commit_step, [5, 10])
    for k in range(3):
        assert_array_equal(draws.target[0, :, k], (segment == k) & rollout.scored)
        assert_array_equal(draws.masked[0, :, k, PROMPT:], segment >= k)


def test_two_sequences_by_hand():
    objective = objective_of('d2', group_size=2, epsilon=0.2, kl=0.5)
    rollout = jax.tree.map(lambda x: x[:2], published_rollout(advantage=[1, -1, 0, 0, 0, 0]))
    rollout = rollout.replace(
        completion=np.array([[5, 6], [1, 1]]), scored=np.array([[True, True], [True, False]])
    )
    # The second token of the first row is committed first.
    target = np.array([[[False, True], [True, False]], [[True, False], [False, False]]])
    draws = Draws(masked=np.ones((2, 2, PROMPT + 2), bool), target=target)
    others = {
        'behaviour': np.log(np.array([[[0.9, 0.5], [0.5, 0.9]], [[0.5, 0.1], [0.1, 0.9]]])),
        'reference': np.log(np.array([[[0.1, 0.8], [0.8, 0.1]], [[0.2, 0.9], [0.9, 0.1]]])),
    }
    logp = np.log(np.array([[[0.1, 0.4], [0.8, 0.3]], [[0.2, 0.9], [0.9, 0.2]]]))
    loss, _ = loss_of(objective, logp, rollout, draws, **others)
    # Ratios 0.8, 1.6 (clipped to 1.2), and 0.4 (clipped to 0.8 for A = -1); k3 is 0 but for log 2.
    assert_allclose(loss, (-0.8 - 1.2 + 0.8 + 0.5 * (1 - np.log(2))) / 3, rtol=1e-5)


def test_groups_are_averaged():
    objective, arrays = objective_of('d2', group_size=3, segments=4), published()
    rollout, logp = published_rollout(), in_segments(arrays['d2/logp'])
    names = {'behaviour': 'd2/old_logp', 'reference': 'd2/ref_logp'}
    others = {name: in_segments(arrays[key]) for name, key in names.items()}
    parts = [
        loss_of(objective, logp, rollout, published_draws(), rows, **others)[0]
        for rows in (slice(3), slice(3, 6))
    ]
    loss, _ = loss_of(objective, logp, rollout, published_draws(), **others)
    assert_allclose(loss, np.mean(parts), rtol=1e-5)


def test_more_segments_than_steps_are_refused():
    message = 'd2.segments is 16, of the 8 steps of a rollout .*; use 1 to 8'
    with pytest.raises(ValueError, match=message):
        objective_of('d2', sampling=SamplingConfig(32, 8, 8, temperature=1.0))

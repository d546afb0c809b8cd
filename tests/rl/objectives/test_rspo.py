"""RSPO against its formula, a case by hand, its fixed point and its masks."""

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
    value_and_gradient,
    with_draws,
)

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize('strength', [0.01, 1.0])
def test_loss_and_gradient_are_those_of_the_formula(strength):
    arrays = published()
    masked = arrays['rspo/formula/masked']
    metrics = assert_published(
        f'rspo/formula/lambda{strength}',
        objective_of('rspo', strength=strength),
        published_rollout(advantage=arrays['rspo/formula/advantages']),
        draws_from(masked, weight=1 / (4 * masked.sum(-1))),
        reference=arrays['rspo/formula/ref_logp'],
    )
    change = arrays['rspo/formula/score'] - arrays['rspo/formula/ref_score']
    assert_allclose(metrics['log_ratio'][0], change.sum(), rtol=1e-4)


def test_the_advantage_is_the_published_one():
    arrays = published()
    rewards = arrays['advantage/formula/rewards']
    advantage = advantage_of(
        objective_of('rspo'), np.asarray(rewards.reshape(-1)), rewards.shape[1]
    )
    expected = arrays['advantage/formula/std_unbiased_1e-4'].reshape(-1)
    assert_allclose(advantage, expected, rtol=1e-5, atol=1e-6)


def by_hand(advantage):
    """Two rows of two tokens with two draws each, which mask both tokens, and the first."""
    masked = [[[1, 1], [1, 0]]] * 2
    batch = hand_batch(
        masked, advantage=advantage, reference=[[[-2, -4], [-1, -9]], [[-1, -1], [-2, -9]]]
    )
    return with_draws(batch, weight=[[1 / 4, 1 / 2]] * 2)


def test_two_sequences_by_hand():
    logp = [[[-1, -3], [-2, -5]], [[-2, -2], [-2, -5]]]
    batch = by_hand([1.0, -2.0])  # Centred advantages would hide what is not differentiated.
    loss, gradient = value_and_gradient(objective_of('rspo', 2, strength=2.0), logp, batch)
    # d of the first row is the mean of (1 + 1) / 2 and -1, that of the second of -1 and 0: 0 and
    # -1/2, centred 1/4 and -1/4. The weights are 1 - 2/4 and -2 + 2/4.
    assert_allclose(loss, -(0.5 * 0.25 + 1.5 * 0.25) / 2, rtol=1e-5)
    # -w / 2 rows / 2 draws / tokens of the draw; the mean over the group is not differentiated.
    row = np.array([[1 / 16, 1 / 16], [1 / 8, 0]])
    assert_allclose(gradient, [-row, 3 * row], rtol=1e-5)


def test_the_gradient_vanishes_where_the_log_ratio_is_the_advantage_over_lambda():
    batch, objective = by_hand([1.0, -1.0]), objective_of('rspo', 2, strength=2.0)
    target = np.array([0.5, -0.5])[:, None, None]  # A / lambda
    _, gradient = value_and_gradient(objective, batch.others['reference'] + target, batch)
    assert_allclose(gradient, 0.0, atol=1e-7)
    _, gradient = value_and_gradient(objective, batch.others['reference'] + 2 * target, batch)
    assert np.abs(gradient).max() > 0.01


def test_several_groups_are_averaged():
    rng = np.random.default_rng(0)
    masked = rng.random((4, 3, 5)) < 0.6
    masked[..., 0] = True
    batch = hand_batch(masked, [1, -1, 0.5, -0.5], reference=rng.normal(size=masked.shape))
    batch = with_draws(batch, weight=1 / (3 * masked.sum(-1)))
    assert_mean_over_groups(
        objective_of('rspo', 2, strength=0.5), rng.normal(size=(4, 3, 5)), batch
    )


def test_masks_have_the_law_of_a_uniform_rate_drawn_again_where_none_is_masked():
    rollout = published_rollout()
    # The tail of a completion can hold any tokens, which the policy must not see.
    completion = np.array(rollout.completion)
    completion[2, 7:] = 77
    draws = many_draws(
        objective_of('rspo'), rollout.replace(completion=np.asarray(completion)), 300
    )
    prompt = rollout.prompt.shape[1]
    masked = draws.masked[..., prompt:]
    assert not draws.masked[..., :prompt].any()
    assert not (masked & ~np.asarray(rollout.scored)[None, :, None]).any()
    tail = draws.tokens[:, 2, :, prompt:][..., 5:]
    assert (tail == 1).all() and (
        draws.tokens[:, 2, :, prompt:][..., :5] == completion[2, :5]
    ).all()
    counts = masked.sum(-1)
    assert_allclose(draws.weight, 1 / (4 * counts), rtol=1e-6)
    rng = np.random.default_rng(0)
    rates = rng.random(200_000)
    sizes = rng.binomial(5, rates)  # of the third row, of 5 tokens
    expected = np.bincount(sizes[sizes > 0], minlength=6) / (sizes > 0).sum()
    frequency = np.bincount(counts[:, 2].reshape(-1), minlength=6) / counts[:, 2].size
    assert_allclose(frequency, expected, atol=0.04)  # 1200 draws: three deviations are 0.035
    assert_allclose(masked[:, 2].mean((0, 1))[:5], 0.6, atol=0.05)  # 3 of 5 in the mean


def test_a_setting_without_a_meaning_is_refused():
    with pytest.raises(ValueError, match='rspo.strength is 0.0'):
        objective_of('rspo', strength=0.0)

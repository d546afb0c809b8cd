"""wd1 against its released code, a case by hand, and what its weights make of rewards."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax.diffusion.corruption import Draws
from tests.rl.objectives.published import (
    MASK,
    advantage_of,
    assert_published,
    draws_from,
    draws_over_updates,
    loss_of,
    objective_of,
    published,
    published_rollout,
)

pytestmark = pytest.mark.numerical


@pytest.mark.parametrize(('case', 'negative'), [('wd1', True), ('wd1_positive_only', False)])
def test_loss_and_gradient_are_the_published_ones(case, negative):
    arrays = published()
    objective = objective_of('wd1', negative=negative)
    rewards = arrays['advantages'] + 0.3  # A constant does not change the weights of a group.
    weights = advantage_of(objective, np.asarray(rewards), len(rewards))
    expected = arrays['wd1/w_plus'] - (arrays['wd1/w_minus'] if negative else 0)
    assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)
    draws = draws_from(arrays['wd1/noisy'][:, None] == MASK)
    assert_published(case, objective, published_rollout(advantage=weights), draws)


def test_two_sequences_by_hand():
    """Rewards 1 and 0 at temperature 1/2, the second completion ends at its first token."""
    objective = objective_of('wd1', group_size=2, temperature=0.5)
    advantage = advantage_of(objective, np.array([1.0, 0.0]), 2)
    # A / T is 1 and -1: w+ = (e, 1/e) / (e + 1/e), and w- is the same the other way round.
    difference = (np.e - 1 / np.e) / (np.e + 1 / np.e)
    assert_allclose(advantage, [difference, -difference], rtol=1e-6)
    rollout = jax.tree.map(lambda x: x[:2], published_rollout()).replace(
        completion=np.array([[5, 6], [1, 1]]),
        scored=np.array([[True, True], [True, False]]),
        advantage=advantage,
    )
    draws = Draws(masked=np.ones((2, 1, rollout.prompt.shape[1] + 2), bool))
    loss, _ = loss_of(objective, [[[-1.0, -2.0]], [[-4.0, -8.0]]], rollout, draws)
    assert_allclose(loss, -difference * (-1 - 2) + difference * -4, rtol=1e-6)


def test_equal_rewards_give_no_gradient():
    objective = objective_of('wd1', group_size=3)
    advantage = advantage_of(objective, np.array([0.1, 0.1, 0.1, 0.7, 0.7, 0.7]), 3)
    assert_allclose(advantage, 0, atol=1e-7)


def test_weights_are_those_of_each_group_and_groups_are_averaged():
    objective, rewards = objective_of('wd1', group_size=3), np.array([1.0, 0, 0, 0.2, 0.4, 0.9])
    advantage = advantage_of(objective, rewards, 3)
    alone = [advantage_of(objective, rewards[rows], 3) for rows in (slice(3), slice(3, 6))]
    assert_allclose(advantage, np.concatenate(alone), rtol=1e-6)
    rollout = published_rollout(advantage=advantage)
    draws = draws_from(published()['wd1/noisy'][:, None] == MASK)
    logp = published()['wd1/logp'][:, None]
    parts = [loss_of(objective, logp, rollout, draws, rows)[0] for rows in (slice(3), slice(3, 6))]
    loss, weight = loss_of(objective, logp, rollout, draws)
    assert_allclose(loss, np.mean(parts), rtol=1e-5)
    assert weight == 2


def test_all_of_the_completion_is_masked_and_a_fresh_share_of_the_prompt():
    masked = draws_over_updates(objective_of('wd1'), published_rollout(), 200).masked
    prompt = masked[..., : published()['prompt'].shape[1]]  # [200, B, 1, P]
    assert masked[..., prompt.shape[-1] :].all()
    assert_allclose(prompt.mean(), 0.15, atol=0.01)  # four standard errors are 0.012
    assert (prompt[1:] != prompt[:-1]).any(axis=-1).mean() > 0.9


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match='wd1.temperature is 0; use a positive number'):
        objective_of('wd1', temperature=0)

"""Training of toys: its values against enumeration and samples, and when they must not move."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import microscope
from spg_jax.rl import toy_directions, toys
from spg_jax.rl.toy_training import make_training, rewards_of_mass

UPDATES, LOOKS = 40, 2


@pytest.fixture(scope='module')
def params():
    return jax.tree.map(lambda x: x[0], toys.learn(range(1), steps=20))


@pytest.fixture(scope='module')
def parts():
    subject = microscope.Subject('', '', 'spg', microscope.UNIFORM_ELBO, microscope.CONFIDENCE)
    return microscope.parts_of(subject)


@pytest.fixture(scope='module')
def training(params, parts):
    """(reward, rate) -> values; the program is compiled once."""
    train = make_training(
        parts.objective, parts.sampling, parts.batching, parts.optimizer, UPDATES, LOOKS
    )
    reward = toys.rewards('answer', 0)
    compiled = toys.quick(train, params, reward, np.uint32(0), np.float32(0))
    return lambda reward, rate: np.asarray(compiled(params, reward, np.uint32(0), np.float32(rate)))


def test_values_are_the_mean_reward_of_samples(training, params, parts):
    """Before the first update, of 4096 rollouts of two prompts with eight completions each."""
    reward = toys.rewards('answer', 0)
    values = training(reward, 0.0)
    table = toys.table_of_network(toys.network(), params)
    sample = toy_directions.make_sample(parts.sampling, parts.batching)
    keys = jax.random.split(jax.random.key(5), 4096)
    rewards = np.asarray(toys.quick(sample, table, reward, keys)(table, reward, keys).reward)
    error = rewards.mean(-1).std() / np.sqrt(len(rewards))
    assert_allclose(values, rewards.mean(), atol=4 * error)
    assert (values == values[0]).all()  # at a learning rate of 0


def test_training_raises_the_value_and_equal_rewards_move_nothing(training):
    reward = toys.rewards('answer', 0)
    values = training(reward, 1e-2)
    assert len(values) == LOOKS + 1
    assert values[-1] > values[0] + 0.08
    assert_allclose(training(np.ones_like(reward), 1e-2), 1.0, rtol=1e-5)
    worst = training(1 - reward, 1e-2)  # Other rewards are learned as well.
    assert_allclose(worst[0], 1 - values[0], rtol=1e-5)
    assert worst[-1] > worst[0]


@pytest.mark.parametrize('share', [0.02, 0.15, 0.4])
def test_random_rewards_are_earned_with_about_the_given_probability(share):
    law = np.random.default_rng(1).dirichlet(np.full(81, 0.5), size=2)
    reward = rewards_of_mass(law, share, seed=3)
    assert set(np.unique(reward)) == {0.0, 1.0}
    earned = (law * reward).sum(-1)
    assert (earned >= share).all() and (earned <= 1.25 * share).all()
    assert not np.array_equal(reward, rewards_of_mass(law, share, seed=4))

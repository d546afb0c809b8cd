"""Training of toys: its values against enumeration and samples, and when they must not move."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import microscope
from spg_jax.rl import toy_directions, toys
from spg_jax.rl.toy_training import (
    exact_gradient,
    gradient_of_objective,
    make_training,
    rewards_of_mass,
)
from tests.parameters import random_params

UPDATES, LOOKS = 40, 2


@pytest.fixture(scope='module')
def learned():
    """A toy and its parameters. They are random, since what is tested here holds for all, and
    learning them takes a program of its own."""
    params = jax.device_get(random_params(toys.network().model))
    all_params = jax.tree.map(lambda x: x[None], params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys, 'learn', lambda *_: all_params)
        (toy,) = toys.make_toys(range(1), 'answer')
    return toy, params


@pytest.fixture(scope='module')
def params(learned):
    return learned[1]


@pytest.fixture(scope='module')
def parts():
    subject = microscope.Subject('', '', 'spg', microscope.UNIFORM_ELBO, microscope.CONFIDENCE)
    return microscope.parts_of(subject)


@pytest.fixture(scope='module')
def rollouts(learned, parts):
    """4096 rollouts of two prompts with eight completions each."""
    toy, keys = learned[0], jax.random.split(jax.random.key(5), 4096)
    sample = toy_directions.make_sample(parts.sampling, parts.batching)
    compiled = toys.quick(sample, toy.table, toy.reward, keys)
    return jax.device_get(compiled(toy.table, toy.reward, keys))


@pytest.fixture(scope='module')
def training(params, parts):
    """(reward, rate) -> values; the program is compiled once."""
    gradient = gradient_of_objective(parts.objective, parts.batching)
    train = make_training(gradient, parts.sampling, parts.batching, parts.optimizer, UPDATES, LOOKS)
    reward = toys.rewards('answer', 0)
    compiled = toys.quick(train, params, reward, np.uint32(0), np.float32(0))
    return lambda reward, rate: np.asarray(compiled(params, reward, np.uint32(0), np.float32(rate)))


def test_values_are_the_mean_reward_of_samples(training, rollouts):
    """Before the first update."""
    values, rewards = training(toys.rewards('answer', 0), 0.0), rollouts.reward
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


def test_the_exact_gradient_is_that_of_the_enumerated_law(learned, parts, rollouts):
    """Of one rollout, against derivatives of every probability one by one and the chain rule."""
    (toy, params), decoding, batching = learned, parts.sampling, parts.batching
    first = jax.tree.map(lambda x: x[:1], rollouts)
    slopes = toys.quick(lambda table: toys.law_gradients(table, decoding), toy.table)
    law, of_logits = slopes(toy.table)
    of_law = np.asarray(toys.through_jacobian(of_logits, toy))  # [Q - 1, X, W]
    law = np.asarray(law)[..., None]
    of_log_law = np.where(law > 0, of_law / np.maximum(law, 1e-30), 0.0)
    expected = -toy_directions.exact_updates(first, of_log_law, batching.group_size)[0]
    gradient = exact_gradient(decoding, batching, better_only=False)
    rollout = jax.tree.map(lambda x: x[0], first)
    compiled = toys.quick(gradient, params, rollout)
    flat, _ = jax.flatten_util.ravel_pytree(compiled(params, rollout))
    expected /= batching.rows * toys.LENGTH
    assert np.abs(expected).max() > 1e-3
    assert_allclose(flat, expected, atol=1e-4 * np.abs(expected).max())

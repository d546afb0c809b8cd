"""Training of toys: its values against enumeration, and when they must not move."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from spg_jax import microscope
from spg_jax.rl import toy_directions, toys
from spg_jax.rl.rollout import Rollout
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
    """Of a decoder in random order, whose law takes less time to compile than others.

    tests/diffusion/test_law_of_completions.py and tests/test_microscope.py compare the laws of
    decoders with samples.
    """
    decoder = microscope.Decoder('random order', commit='random')
    subject = microscope.Subject('', '', 'spg', microscope.UNIFORM_ELBO, decoder)
    return microscope.parts_of(subject)


@pytest.fixture(scope='module')
def law(learned, parts):
    """The law of completions [Q - 1, X], and its derivative with respect to the table."""
    toy = learned[0]
    slopes = toys.quick(lambda table: toys.law_gradients(table, parts.sampling), toy.table)
    return slopes(toy.table)


@pytest.fixture(scope='module')
def training(params, parts):
    """(reward, rate) -> values; the program is compiled once."""
    gradient = gradient_of_objective(parts.objective, parts.batching)
    train = make_training(gradient, parts.sampling, parts.batching, parts.optimizer, UPDATES, LOOKS)
    reward = toys.rewards('answer', 0)
    compiled = toys.quick(train, params, reward, np.uint32(0), np.float32(0))
    return lambda reward, rate: np.asarray(compiled(params, reward, np.uint32(0), np.float32(rate)))


def test_values_are_the_expected_reward(training, law):
    """Before the first update, as a mean over prompts."""
    reward = toys.rewards('answer', 0)
    values = training(reward, 0.0)
    earned = (np.asarray(law[0]) * reward).sum(-1)  # [Q - 1]
    assert_allclose(values, earned.mean(), rtol=1e-5)
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


def random_rollout(toy, batching):
    """Random completions of each prompt, with their rewards."""
    rows = batching.rows
    prompt = np.repeat(np.arange(toys.PROMPTS, dtype=np.int32), batching.group_size)[:, None]
    completion = np.random.default_rng(2).integers(0, toys.SYMBOLS, (rows, toys.LENGTH))
    return Rollout(
        prompt=prompt,
        prompt_mask=np.ones(prompt.shape, bool),
        completion=completion.astype(np.int32),
        scored=np.ones(completion.shape, bool),
        commit_step=np.zeros(completion.shape, np.int32),
        reward=np.asarray(toy.reward)[prompt[:, 0], toys.completion_index(completion)],
        advantage=np.zeros(rows, np.float32),
        example_id=np.arange(rows, dtype=np.uint32),
    )


def test_the_exact_gradient_is_that_of_the_enumerated_law(learned, parts, law):
    """Of one rollout, against derivatives of every probability one by one and the chain rule."""
    (toy, params), decoding, batching = learned, parts.sampling, parts.batching
    rollout = random_rollout(toy, batching)
    law, of_logits = law
    of_law = np.asarray(toys.through_jacobian(of_logits, toy))  # [Q - 1, X, W]
    law = np.asarray(law)[..., None]
    of_log_law = np.where(law > 0, of_law / np.maximum(law, 1e-30), 0.0)
    rollouts = jax.tree.map(lambda x: x[None], rollout)
    expected = -toy_directions.exact_updates(rollouts, of_log_law, batching.group_size)[0]
    gradient = exact_gradient(decoding, batching, better_only=False)
    compiled = toys.quick(gradient, params, rollout)
    flat, _ = jax.flatten_util.ravel_pytree(compiled(params, rollout))
    expected /= batching.rows * toys.LENGTH
    assert np.abs(expected).max() > 1e-3
    assert_allclose(flat, expected, atol=1e-4 * np.abs(expected).max())

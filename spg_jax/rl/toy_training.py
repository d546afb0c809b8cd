"""Training of toys by the real sampler, corruptions, losses and learner, with exact values.

A value is the expected reward of the decoder that samples, enumerated over all that it may do. It
has no noise, so that a few toys show what would take many runs of a language model.

Letters of axes: `Q` prompts with the masked one, `X` completions, `C` positions, `B` rows, `K`
looks at a training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.rl.advantages import group_advantages
from spg_jax.rl.batching import Batching
from spg_jax.rl.gradient import make_gradient
from spg_jax.rl.objectives import Objective
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import corrupt, moments
from spg_jax.rl.slots import functions_of
from spg_jax.rl.toy_directions import rollout_of
from spg_jax.rl.toys import LENGTH, PROMPTS, completion_index, laws, network, table_of_network
from spg_jax.training.optimizers import AdamW

Params = Any
# (parameters, rollout, seed [], updates done [], updates since the rollout []) -> of a loss
Gradient = Callable[[Params, Rollout, Array, Array, Array], Params]


def gradient_of_objective(objective: Objective, batching: Batching) -> Gradient:
    """The gradient that training takes.

    Args:
      objective: which looks at no policy but the trained one.
      batching: the rows of a rollout.
    """
    # A loop that ends early would have to wait for the slowest of many toys.
    objective = dataclasses.replace(objective, idle=None)
    gradient_of = make_gradient(
        network(),
        objective,
        microbatch=batching.rows,
        draws_per_pass=0,
        group_size=batching.group_size,
    )

    def gradient(params: Params, rollout: Rollout, seed: Array, step: Array, turn: Array) -> Params:
        advantage = objective.advantage(rollout.reward, batching.group_size)
        rollout = rollout.replace(advantage=advantage)
        draws = corrupt(objective.corruption, rollout, moments(seed, rollout, step, turn))
        return gradient_of({'params': params}, {}, rollout, draws, step=step)[1]['params']

    return gradient


def exact_gradient(decoding: SamplingConfig, batching: Batching, better_only: bool) -> Gradient:
    """The gradient of -sum_j A_j log p(x_j) / sum_j n_j, with p the law of the decoder.

    Args:
      decoding: the decoder that sampled.
      batching: the rows of a rollout.
      better_only: whether rows with A_j < 0 are left out.
    """
    policy = network()

    def loss(params: Params, rollout: Rollout) -> Array:
        advantage = group_advantages(rollout.reward, batching.group_size)
        if better_only:
            advantage = jnp.maximum(advantage, 0.0)
        law = laws(table_of_network(policy, params), decoding)  # [Q - 1, X]
        law = law[rollout.prompt[:, 0], completion_index(rollout.completion)]  # [B]
        log_prob = jnp.log(jnp.maximum(law, 1e-30))
        return -(advantage * log_prob).sum() / (batching.rows * LENGTH)

    def gradient(params: Params, rollout: Rollout, *_: Array) -> Params:
        return jax.grad(loss)(params, rollout)

    return gradient


def make_training(
    gradient_of: Gradient,
    decoding: SamplingConfig,
    batching: Batching,
    optimizer: AdamW,
    updates: int,
    looks: int,
) -> Callable[[Params, Array, Array, Array], Array]:
    """A function (parameters, reward [Q - 1, X], seed [], learning rate []) -> values [K + 1].

    The values are those before the first update and after each K-th part of the updates.

    Args:
      gradient_of: of the loss.
      decoding: of rollouts, and of the values.
      batching: the rows of a rollout, and the updates on it.
      optimizer: its moments and its largest gradient; the learning rate is that of the call.
      updates: of a training.
      looks: K, which divides `updates`.
    """
    policy = network()
    direction = optax.chain(
        optax.clip_by_global_norm(optimizer.grad_clip),
        optax.scale_by_adam(optimizer.b1, optimizer.b2),
    )

    def value(params: Params, reward: Array) -> Array:
        law = laws(table_of_network(policy, params), decoding)  # [Q - 1, X]
        return (law * reward).sum() / PROMPTS

    def train(params: Params, reward: Array, seed: Array, rate: Array) -> Array:
        turns = batching.inner_updates
        keys = jax.random.split(jax.random.key(seed), updates // turns)

        def learn(carry: tuple[Params, Any], index: Array) -> tuple[tuple[Params, Any], None]:
            """The updates on one rollout."""
            hidden, unembed, _ = functions_of(policy, {'params': carry[0]})
            rollout = rollout_of(
                hidden, unembed, reward, keys[index], decoding, batching.group_size
            )

            def update(turn: Array, carry: tuple[Params, Any]) -> tuple[Params, Any]:
                params, state = carry
                gradient = gradient_of(params, rollout, seed, index * turns + turn, turn)
                change, state = direction.update(gradient, state)
                return jax.tree.map(lambda x, change: x - rate * change, params, change), state

            return jax.lax.fori_loop(0, turns, update, carry), None

        def look(carry: tuple[Params, Any], indices: Array) -> tuple[tuple[Params, Any], Array]:
            carry, _ = jax.lax.scan(learn, carry, indices)
            return carry, value(carry[0], reward)

        start = params, direction.init(params)
        indices = jnp.arange(len(keys), dtype=jnp.int32).reshape(looks, -1)
        _, values = jax.lax.scan(look, start, indices)
        return jnp.concatenate([value(params, reward)[None], values])

    return train


def rewards_of_mass(law: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A reward [Q - 1, X] of 0 or 1 that a policy earns with about a given probability.

    Random completions of each prompt are right until their probabilities sum up to the share. One
    that would take the sum above it by more than a quarter is left out.

    Args:
      law: [Q - 1, X] of the policy.
      share: the probability of a right completion.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    reward = np.zeros(law.shape, np.float32)
    for right, probability in zip(reward, law, strict=True):
        mass = 0.0
        for index in rng.permutation(len(probability)):
            if mass + probability[index] <= 1.25 * share and mass < share:
                right[index] = 1.0
                mass += probability[index]
    return reward

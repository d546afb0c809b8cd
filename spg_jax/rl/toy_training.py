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
from spg_jax.rl.batching import Batching
from spg_jax.rl.gradient import make_gradient
from spg_jax.rl.objectives import Objective
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import corrupt, moments
from spg_jax.rl.slots import functions_of
from spg_jax.rl.toy_directions import rollout_of
from spg_jax.rl.toys import PROMPTS, laws, network, table_of_network
from spg_jax.training.optimizers import AdamW


def make_training(
    objective: Objective,
    decoding: SamplingConfig,
    batching: Batching,
    optimizer: AdamW,
    updates: int,
    looks: int,
) -> Callable[[Any, Array, Array, Array], Array]:
    """A function (parameters, reward [Q - 1, X], seed [], learning rate []) -> values [K + 1].

    The values are those before the first update and after each K-th part of the updates.

    Args:
      objective: which looks at no policy but the trained one.
      decoding: of rollouts, and of the values.
      batching: the rows of a rollout, and the updates on it.
      optimizer: its moments and its largest gradient; the learning rate is that of the call.
      updates: of a training.
      looks: K, which divides `updates`.
    """
    policy = network()
    # A loop that ends early would have to wait for the slowest of many toys.
    objective = dataclasses.replace(objective, idle=None)
    gradient_of = make_gradient(
        policy,
        objective,
        microbatch=batching.rows,
        draws_per_pass=0,
        group_size=batching.group_size,
    )
    direction = optax.chain(
        optax.clip_by_global_norm(optimizer.grad_clip),
        optax.scale_by_adam(optimizer.b1, optimizer.b2),
    )

    def sampled(params: Any, reward: Array, key: Array) -> Rollout:
        hidden, unembed, _ = functions_of(policy, {'params': params})
        rows = rollout_of(hidden, unembed, reward, key, decoding, batching.group_size)
        return rows.replace(advantage=objective.advantage(rows.reward, batching.group_size))

    def value(params: Any, reward: Array) -> Array:
        law = laws(table_of_network(policy, params), decoding)  # [Q - 1, X]
        return (law * reward).sum() / PROMPTS

    def train(params: Any, reward: Array, seed: Array, rate: Array) -> Array:
        keys = jax.random.split(jax.random.key(seed), updates // batching.inner_updates)

        def update(carry: tuple[Any, Any], turn: Array, rollout: Rollout, step: Array) -> Any:
            params, state = carry
            draws = corrupt(objective.corruption, rollout, moments(seed, rollout, step, turn))
            trained = {'params': params}
            _, gradient, _ = gradient_of(trained, {}, rollout, draws, step=step)
            change, state = direction.update(gradient['params'], state)
            return jax.tree.map(lambda x, change: x - rate * change, params, change), state

        def learn(carry: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], None]:
            """The updates on one rollout."""
            rollout, first = sampled(carry[0], reward, keys[index]), index * batching.inner_updates

            def of_turn(turn: Array, carry: Any) -> Any:
                return update(carry, turn, rollout, first + turn)

            return jax.lax.fori_loop(0, batching.inner_updates, of_turn, carry), None

        def look(carry: tuple[Any, Any], indices: Array) -> tuple[tuple[Any, Any], Array]:
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

"""Random keys that depend on identity: what a number is for, at which step, for which example.

No key depends on a position, so a row draws the same random numbers in any batch or microbatch and
on any device or process.

Shapes: `B` rows, `G` rows of one group.
"""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Purpose(enum.IntEnum):
    """What a random number is for. Different purposes never share a key."""

    SAMPLE = 0
    CORRUPT = 1
    INIT = 2
    EVALUATE = 3
    DROPOUT = 4
    SHARED = 5  # what all rows of an update share
    RING = 6  # which rows of a ring an update takes
    DIAGNOSE = 7  # what is masked where a policy is diagnosed
    GAP = 8  # which step of a row is scored again, to compare with what the sampler recorded
    NOISE = 9  # on embeddings of MASK at the start of a conversion
    EDIT = 10  # which tokens of an answer to correct are random


SEEDS = 2**32  # seeds from 0 to this number give different keys


class Seeded:
    """A compiled function whose first argument, a seed, is given already.

    As a constant of the program the seed would make each seed of a comparison compile it anew.
    """

    def __init__(self, function: Callable[..., Any], seed: int | Array, **options: Any):
        """Compiles nothing yet.

        Args:
          function: (seed, *arguments) -> anything; it and its arguments can be traced.
          seed: of the random numbers, from 0 to SEEDS - 1.
          options: of `jax.jit`, which count the seed among the arguments.
        """
        self.program = jax.jit(function, **options)
        self.seed = np.uint32(seed) if isinstance(seed, int) else seed

    def __call__(self, *arguments: Any) -> Any:
        return self.program(self.seed, *arguments)

    def lower(self, *arguments: Any) -> Any:
        """The program for such arguments, which takes the seed before them once it is compiled."""
        return self.program.lower(self.seed, *arguments)


def root_key(seed: int | Array) -> Array:
    """The key of a seed. It names its generator, which JAX_DEFAULT_PRNG_IMPL would change."""
    return jax.random.key(seed, impl='threefry2x32')


def example_keys(
    seed: int | Array, purpose: Purpose, step: Array | int, example_id: Array
) -> Array:
    """One key for each row, [B], from (seed, purpose, step) and the identity of the row.

    Args:
      seed: the root seed of the run.
      purpose: what the random numbers are for.
      step: [] the update, or the rollout, that uses them.
      example_id: [B] uint32, prompt index * G + member.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key(seed, purpose, step), example_id)


def step_key(seed: int | Array, purpose: Purpose, step: Array | int) -> Array:
    """The key that all rows of a step share, from (seed, purpose, step)."""
    root = jax.random.fold_in(root_key(seed), purpose)
    return jax.random.fold_in(root, step)


def example_ids(prompt_index: Array, group_size: int) -> Array:
    """The identity of each row of a rollout, prompt index * G + member, in order of prompts.

    Args:
      prompt_index: [B / G] index of each prompt in its dataset.
      group_size: G.

    Returns:
      [B] uint32.
    """
    members = jnp.arange(group_size, dtype=jnp.uint32)  # [G]
    return (prompt_index.astype(jnp.uint32)[:, None] * group_size + members[None, :]).reshape(-1)


def check_range(prompts: int, group_size: int) -> None:
    """Raises ValueError if a dataset has more row identities than uint32 can hold."""
    if prompts * group_size > 2**32:
        raise ValueError(
            f'{prompts} prompts x rl.group_size {group_size} exceed 2^32 row identities; '
            f'use a group of at most {2**32 // prompts}'
        )

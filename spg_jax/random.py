"""Randomness as a function of identity: what a key is for, which step, which example. Never of
position.

A row keeps its random numbers whatever batch, microbatch, device or process it lands in.
"""

import enum

import jax
import jax.numpy as jnp
from jax import Array


class Purpose(enum.IntEnum):
    """What random numbers are for; different purposes never share a key."""

    SAMPLE = 0
    CORRUPT = 1
    INIT = 2
    EVALUATE = 3
    DROPOUT = 4


def example_keys(seed: int, purpose: Purpose, step: Array | int, example_id: Array) -> Array:
    """One key a row, [B], from (seed, purpose, step) and the row's identity.

    Args:
      seed: root of the run.
      purpose: what the numbers are for.
      step: [] the update (or rollout) they belong to.
      example_id: [B] uint32, prompt index * G + member.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key(seed, purpose, step), example_id)


def step_key(seed: int, purpose: Purpose, step: Array | int) -> Array:
    """What the rows of a step share: the key from (seed, purpose, step)."""
    root = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.random.fold_in(root, step)


def example_ids(prompt_index: Array, group_size: int) -> Array:
    """[B] uint32 identity of each row of a rollout: prompt index * G + member, prompt by prompt."""
    members = jnp.arange(group_size, dtype=jnp.uint32)
    return (prompt_index.astype(jnp.uint32)[:, None] * group_size + members[None, :]).reshape(-1)


def check_range(prompts: int, group_size: int) -> None:
    """Refuses a dataset whose row identities do not fit uint32.

    Raises:
      ValueError: with the count and the largest group that fits.
    """
    if prompts * group_size > 2**32:
        raise ValueError(
            f'{prompts} prompts x rl.group_size {group_size} exceed 2^32 row identities; '
            f'use a group of at most {2**32 // prompts}'
        )

"""Advantages within a group of completions of one prompt."""

import jax.numpy as jnp
from jax import Array


def group_advantages(reward: Array, group_size: int) -> Array:
    """A_j = R_j - mean_group(R), not divided by the group's standard deviation (SPG, section 2).

    Args:
      reward: [B] float32, in which the G rows of a prompt are neighbours.
      group_size: G; divides B.

    Returns:
      [B] float32, summing to zero within each group.
    """
    groups = reward.reshape(-1, group_size)
    return (groups - groups.mean(axis=1, keepdims=True)).reshape(-1)


def groups_with_signal(reward: Array, group_size: int) -> Array:
    """[B / G] bool, True for groups whose rewards differ; in the others all advantages are 0."""
    groups = reward.reshape(-1, group_size)
    return jnp.any(groups != groups[:, :1], axis=1)

"""Advantages of completions, from the rewards of whole groups.

Every function takes reward [B] float32, in which the G rows of a prompt are neighbours, and G,
which divides B; it returns [B] float32.
"""

import jax.numpy as jnp
from jax import Array


def group_advantages(reward: Array, group_size: int) -> Array:
    """A_j = R_j - mean_group(R), not divided by the group's standard deviation (SPG, section 2).

    The advantages of a group sum to zero, and are 0 where its rewards are equal.
    """
    groups = reward.reshape(-1, group_size)
    return _where_rewards_differ(groups - groups.mean(axis=1, keepdims=True), reward)


def leave_one_out(reward: Array, group_size: int) -> Array:
    """R_j minus the mean of the other completions of the group, (R_j - mean) G / (G - 1)."""
    return group_advantages(reward, group_size) * (group_size / (group_size - 1))


def standardised(
    reward: Array, group_size: int, unbiased: bool = True, epsilon: float = 1e-4
) -> Array:
    """(R_j - mean) / (standard deviation + epsilon) of the group; 0 where its rewards are equal.

    Args:
      unbiased: whether the variance is divided by G - 1, as GRPO's code does, or by G.
      epsilon: keeps the quotient finite where all rewards are equal.
    """
    groups = reward.reshape(-1, group_size)
    deviation = groups.std(axis=1, keepdims=True, ddof=int(unbiased))
    scaled = (groups - groups.mean(axis=1, keepdims=True)) / (deviation + epsilon)
    return _where_rewards_differ(scaled, reward)


def raw(reward: Array, group_size: int) -> Array:
    """The reward itself, without a baseline."""
    return reward


def groups_with_signal(reward: Array, group_size: int) -> Array:
    """[B / G] bool, True for groups whose rewards differ; in the others all advantages are 0."""
    groups = reward.reshape(-1, group_size)
    return jnp.any(groups != groups[:, :1], axis=1)


def _where_rewards_differ(groups: Array, reward: Array) -> Array:
    """Advantages [B] of groups [B / G, G], 0 where all rewards of a group are equal.

    The mean of equal numbers may differ from them in the last bit, and a standard deviation of that
    size would turn the difference into an advantage.
    """
    has_signal = groups_with_signal(reward, groups.shape[1])
    return jnp.where(has_signal[:, None], groups, 0.0).reshape(-1)

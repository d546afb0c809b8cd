"""What objectives are made of that give each sequence, or each of its draws, one score.

Letters of axes: `b` rows, `M` draws, `P` tokens of a prompt, `C` positions of a completion, `L` =
P + C.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws, subset_of_size
from spg_jax.rl.objectives.objective import UNCONDITIONAL, Batch, Metrics
from spg_jax.rl.rollout import Rollout


def random_masks(key: Array, eligible: Array, counts: Array) -> Array:
    """Random subsets of the eligible positions, independent of each other, [M, C] bool.

    Args:
      key: a typed key.
      eligible: [C] bool.
      counts: [M] int32, the sizes of the subsets.
    """
    noise = jax.random.uniform(key, (len(counts), len(eligible)))
    return jax.vmap(subset_of_size, (0, None, 0))(noise, eligible, counts)


def spread_masks(key: Array, eligible: Array, draws: int) -> tuple[Array, Array]:
    """Random subsets of the n eligible positions, whose sizes lie evenly spread over 1 to n.

    x_i = ((round(k + i n / M) - 1) mod n) + 1 for i = 0 to M - 1, with k uniform over 1 to n.

    Args:
      key: a typed key.
      eligible: [C] bool, at least one True.
      draws: M.

    Returns:
      (the subsets [M, C] bool, their sizes [M] int32).
    """
    size_key, mask_key = jax.random.split(key)
    length = eligible.sum()
    first = jax.random.randint(size_key, (), 1, length + 1)
    counts = jnp.round(first + jnp.arange(draws) * length / draws).astype(jnp.int32)
    counts = (counts - 1) % length + 1
    return random_masks(mask_key, eligible, counts), counts


def after_clean_prompt(row: Rollout, masked: Array, **fields: Any) -> Draws:
    """The draws that mask these positions of the completion and no token of the prompt.

    Args:
      row: one row.
      masked: [M, C] bool.
      fields: other fields of `Draws`.
    """
    clean = jnp.zeros((len(masked), len(row.prompt)), bool)
    return Draws(masked=jnp.concatenate([clean, masked], axis=1), **fields)


def cut_at_eos(row: Rollout, draws: int) -> Array:
    """[M, L] bool, False after the EOS, for `Draws.valid`."""
    return jnp.tile(jnp.concatenate([row.prompt_mask, row.scored]), (draws, 1))


def draw_scores(readouts: Array, batch: Batch) -> Array:
    """w_k sum_{i in target_k} l_{k,i}, the weighted score of each draw, [b, M].

    Args:
      readouts: [b, M, C] of any policy.
      batch: the rows with their draws, which have weights.
    """
    return batch.draws.weight * jnp.where(batch.target, readouts, 0.0).sum(-1)


def clipped_rows(log_ratio: Array, batch: Batch, epsilon: float) -> tuple[Array, Metrics]:
    """-min(r A, clip(r, 1 - e, 1 + e) A) with one ratio r = exp(log_ratio) for each row.

    The clip is of the logarithm, because the ratio of a sequence can be too large for a float, and
    the gradient would then be NaN although it is stopped. At the clip itself the gradient is whole,
    so that a clip range of 0 still learns where the policies are equal. Unconditional clipping is
    that of `ratios.clipped`.

    Args:
      log_ratio: [b].
      batch: the rows; how the ratio is clipped is `batch.clip`.
      epsilon: e.

    Returns:
      ([b], metrics with clip_share, the share of rows whose gradient is stopped).
    """
    advantage = batch.advantage
    high, low = math.log1p(epsilon), math.log1p(-epsilon) if epsilon < 1 else -math.inf
    bound = jnp.where(advantage > 0, high, low)
    stopped = jnp.where(advantage > 0, log_ratio > high, (log_ratio < low) & (advantage < 0))
    if batch.clip == UNCONDITIONAL:
        bound = jnp.where(log_ratio > high, high, low)
        stopped = ((log_ratio > high) | (log_ratio < low)) & (advantage != 0)
    log_ratio = jnp.where(stopped, bound, jnp.where(advantage == 0, 0.0, log_ratio))
    rows = jnp.float32(len(log_ratio))
    share = (stopped.sum().astype(jnp.float32), rows)
    return -advantage * jnp.exp(log_ratio), {'clip_share': share}

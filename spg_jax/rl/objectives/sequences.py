"""What objectives are made of that give each sequence, or each of its draws, one score.

Letters of axes: `b` rows, `M` draws, `P` tokens of a prompt, `C` positions of a completion, `L` =
P + C.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws, subset_of_size
from spg_jax.rl.objectives.objective import Batch, Metrics
from spg_jax.rl.objectives.ratios import clipped, is_clipped
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


def spread_counts(key: Array, length: Array, draws: int) -> Array:
    """Numbers of masked positions that lie evenly spread over 1 to n, [M] int32.

    x_i = ((round(k + i n / M) - 1) mod n) + 1 for i = 0 to M - 1, with k uniform over 1 to n.

    Args:
      key: a typed key.
      length: [] int32, n, at least 1.
      draws: M.
    """
    first = jax.random.randint(key, (), 1, length + 1)
    counts = jnp.round(first + jnp.arange(draws) * length / draws).astype(jnp.int32)
    return (counts - 1) % length + 1


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

    Args:
      log_ratio: [b].
      batch: the rows.
      epsilon: e.

    Returns:
      ([b], metrics with clip_share, the share of rows whose gradient is stopped).
    """
    stopped = is_clipped(log_ratio, batch.advantage, epsilon)
    rows = jnp.float32(len(log_ratio))
    return (
        -clipped(log_ratio, batch.advantage, epsilon),
        {'clip_share': (stopped.sum().astype(jnp.float32), rows)},
    )

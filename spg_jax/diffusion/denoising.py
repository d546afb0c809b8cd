"""Supervised losses: predict what was masked (LLaDA, arXiv 2502.09992), or else the next token."""

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.bounds import completion_log_probs


def stratified_masks(key: Array, row_keys: Array, length: int) -> Array:
    """Which completion tokens each row of a batch has masked, [B, length] bool, at least one.

    Row r masks ceil(length * t_r) random positions with t_r = mod(u + r/B, 1) and one uniform u
    for the batch, so that every share of masked tokens is equally often in it (MD4's low-variance
    times).

    Args:
      key: of u.
      row_keys: [B] keys of the rows, which choose the positions.
      length: completion tokens.
    """
    rows = len(row_keys)
    times = jnp.mod(jax.random.uniform(key) + jnp.arange(rows) / rows, 1.0)
    count = jnp.clip(jnp.ceil(times * length), 1, length)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(row_keys)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return rank < count[:, None]


def denoising_loss(logits: Array, completion: Array, masked: Array) -> Array:
    """Mean over rows of the cross-entropy of a masked token, in nats (eq. 3 and 5, exact counts).

    The sum over the k masked tokens of a row has weight C/k, which per token of the completion is
    1/k.

    Args:
      logits: [B, C, V] at the completion positions, predicted from the masked sequence.
      completion: [B, C] int32.
      masked: [B, C] bool, at least one True a row.
    """
    logp = jax.vmap(completion_log_probs)(logits, completion)
    return -(jnp.where(masked, logp, 0.0).sum(1) / masked.sum(1)).mean()


def next_token_loss(logits: Array, completion: Array) -> Array:
    """Mean over rows and positions of the cross-entropy of a token, in nats.

    Args:
      logits: [B, C, V] of each token of the completion, predicted from the tokens before it.
      completion: [B, C] int32.
    """
    return -jax.vmap(completion_log_probs)(logits, completion).mean()

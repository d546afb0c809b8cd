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


def keeping_loss(logits: Array, completion: Array, masked: Array) -> Array:
    """Mean over rows of the mean cross-entropy of a token that is not masked, in nats.

    A row whose tokens are all masked counts as 0. With `denoising_loss` it is the loss at all
    positions (ReflectDrive-2, arXiv 2605.04647), with a weight for those that are there already.

    Args:
      logits, completion, masked: as in `denoising_loss`.
    """
    logp = jax.vmap(completion_log_probs)(logits, completion)
    visible = ~masked
    return -(jnp.where(visible, logp, 0.0).sum(1) / jnp.maximum(visible.sum(1), 1)).mean()


def random_tokens(row_keys: Array, tokens: Array, allowed: Array, largest_rate: float) -> Array:
    """Completions [B, C] some of whose tokens are random ones (LLaDA2.1's token-to-token stream).

    Each row has a rate of its own, uniform up to `largest_rate`, with which each of its tokens is
    replaced by an id that is drawn uniformly among the allowed ones.

    Args:
      row_keys: [B] keys of the rows.
      tokens: [B, C] int32.
      allowed: [V] bool.
      largest_rate: within [0, 1].
    """
    logits = jnp.where(allowed, 0.0, -jnp.inf)

    def of_row(key: Array, tokens: Array) -> Array:
        of_rate, of_place, of_token = jax.random.split(key, 3)
        rate = largest_rate * jax.random.uniform(of_rate)
        replaced = jax.random.uniform(of_place, tokens.shape) < rate
        return jnp.where(
            replaced, jax.random.categorical(of_token, logits, shape=tokens.shape), tokens
        )

    return jax.vmap(of_row)(row_keys, tokens)


def correction_loss(logits: Array, right: Array) -> Array:
    """Mean cross-entropy of the right token at every position of a completion, in nats.

    Args:
      logits: [B, C, V] at the completion positions, of a completion without MASK.
      right: [B, C] int32.
    """
    return -jax.vmap(completion_log_probs)(logits, right).mean()


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

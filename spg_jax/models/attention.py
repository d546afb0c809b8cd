"""Bidirectional attention with grouped key/value heads, in the form each platform runs fastest.

Shapes: `B` sequences, `L` length, `N` query heads, `K` key/value heads (N a multiple of K), `H`
head dim. Query head n reads key/value head n // (N // K). Invalid keys are never attended to; a row
whose keys are all invalid attends uniformly, which is meaningless but finite, so padding can never
put a NaN in a sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

# Finite, so that softmax over a row without a valid key is uniform instead of 0/0; with one valid
# key or more, exp(MASKED - max) is exactly 0 in float32.
MASKED = -1e30


def attention(q: Array, k: Array, v: Array, valid: Array, implementation: str = 'xla') -> Array:
    """Softmax attention of every query over the valid keys.

    Args:
      q: [B, L, N, H] queries, already rotated.
      k: [B, L, K, H] keys, already rotated.
      v: [B, L, K, H] values.
      valid: [B, L] bool, False on padding.
      implementation: 'xla' (folded on CPU, einsum elsewhere), 'folded' or 'einsum'.

    Returns:
      [B, L, N, H] in the dtype of q; scores and softmax are float32 whatever that is.

    Raises:
      ValueError: for an implementation that does not exist.
    """
    check_implementation(implementation)
    if implementation == 'xla':
        implementation = 'folded' if jax.default_backend() == 'cpu' else 'einsum'
    return _IMPLEMENTATIONS[implementation](q, k, v, valid)


def check_implementation(implementation: str) -> None:
    """Raise ValueError unless `attention` knows the name."""
    known = ('xla', *_IMPLEMENTATIONS)
    if implementation not in known:
        raise ValueError(
            f'model.attention {implementation!r} does not exist; use one of {", ".join(known)}'
        )


def _folded(q: Array, k: Array, v: Array, valid: Array) -> Array:
    """Heads folded into the batch: [B*K] plain matrix products, which CPUs run fastest.

    Not for sharded accelerators: merging a data-sharded and a tensor-sharded axis makes the
    compiler gather.
    """
    B, L, N, H = q.shape
    K = k.shape[2]
    # Queries that share a key/value head become further rows of one product, so keys are never
    # repeated.
    queries = q.transpose(0, 2, 1, 3).reshape(B * K, (N // K) * L, H)
    keys = k.transpose(0, 2, 3, 1).reshape(B * K, H, L)
    values = v.transpose(0, 2, 1, 3).reshape(B * K, L, H)
    scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)
    weights = _softmax(scores.reshape(B, N * L, L), valid[:, None, :], H)
    mixed = jnp.matmul(weights.astype(v.dtype).reshape(B * K, (N // K) * L, L), values)
    return mixed.reshape(B, N, L, H).transpose(0, 2, 1, 3)


def _einsum(q: Array, k: Array, v: Array, valid: Array) -> Array:
    """Axes kept apart: rows stay sharded over data and heads over tensor without a gather."""
    B, L, N, H = q.shape
    K = k.shape[2]
    queries = q.reshape(B, L, K, N // K, H)
    scores = jnp.einsum('blkgh,bmkh->bkglm', queries, k, preferred_element_type=jnp.float32)
    weights = _softmax(scores, valid[:, None, None, None, :], H)
    mixed = jnp.einsum('bkglm,bmkh->blkgh', weights.astype(v.dtype), v)
    return mixed.reshape(B, L, N, H)


def _softmax(scores: Array, valid: Array, head_dim: int) -> Array:
    """Float32 softmax over the last axis of scores / sqrt(head_dim), with invalid keys left out."""
    return jax.nn.softmax(jnp.where(valid, scores * head_dim**-0.5, MASKED), axis=-1)


_IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    'folded': _folded,
    'einsum': _einsum,
}

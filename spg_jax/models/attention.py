"""Bidirectional attention with grouped key/value heads, in the form each platform runs fastest.

Shapes: `B` sequences, `L` length, `N` query heads, `K` key/value heads (N a multiple of K), `H`
head dim. Query head n reads key/value head n // (N // K). Invalid keys are never attended to; a row
whose keys are all invalid attends to something, which is meaningless but finite, so padding can
never put a NaN in a sum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.models.splash import splash_attention

# Finite, so that softmax over a row without a valid key is uniform instead of 0/0; with one valid
# key or more, exp(MASKED - max) is exactly 0 in float32.
MASKED = -1e30

FUSED = ('splash', 'cudnn')  # no scores in memory
AUTO = 'auto'
# JAX calls the platform of a CUDA device 'gpu', and that of a program compiled for one 'cuda'.
_FASTEST = {'cpu': 'folded', 'tpu': 'splash', 'gpu': 'cudnn', 'cuda': 'cudnn'}


def attention(q: Array, k: Array, v: Array, valid: Array, implementation: str = 'einsum') -> Array:
    """Softmax attention of every query over the valid keys.

    Args:
      q: [B, L, N, H] queries, already rotated.
      k: [B, L, K, H] keys, already rotated.
      v: [B, L, K, H] values.
      valid: [B, L] bool, False on padding.
      implementation: 'einsum' runs anywhere, 'folded' suits CPUs, 'splash' is for TPUs, 'cudnn' for
        CUDA; `resolve` chooses.

    Returns:
      [B, L, N, H] in the dtype of q; scores and softmax are float32 whatever that is.

    Raises:
      ValueError: for an implementation that does not exist, or does not take these arrays.
    """
    check_implementation(implementation)
    return _IMPLEMENTATIONS[implementation](q, k, v, valid)


def resolve(implementation: str, platform: str, dtype: str = 'bfloat16') -> str:
    """The implementation that `model.attention` means on a platform.

    Args:
      implementation: one that `attention` knows stands for itself; 'auto' is the fastest of the
        platform that computes in `dtype`.
      platform: of the devices that the program is for, which need not be those that compile it.
      dtype: the compute dtype.

    Raises:
      ValueError: for an implementation that does not exist, or 'auto' on an unknown platform.
    """
    if implementation == 'xla':  # what configurations saved before there was a choice call 'auto'
        implementation = AUTO
    if implementation != AUTO:
        check_implementation(implementation, AUTO)
        return implementation
    if platform not in _FASTEST:
        raise ValueError(
            f'model.attention is {AUTO!r}, which knows {", ".join(_FASTEST)} and not the platform '
            f'{platform!r}; use einsum, which runs anywhere'
        )
    fastest = _FASTEST[platform]
    return 'einsum' if fastest == 'cudnn' and dtype == 'float32' else fastest


def check_implementation(implementation: str, *others: str) -> None:
    """Raise ValueError unless `attention` knows the name, or it is one of `others`."""
    known = (*others, *_IMPLEMENTATIONS)
    if implementation not in known:
        raise ValueError(
            f'model.attention {implementation!r} does not exist; use one of {", ".join(known)}'
        )


def cudnn_attention(
    q: Array, k: Array, v: Array, valid: Array, implementation: str = 'cudnn'
) -> Array:
    """`attention` by the fused kernel of cuDNN, which holds no scores and splits over a mesh.

    Args:
      q, k, v, valid: as in `attention`; bfloat16.
      implementation: of `jax.nn.dot_product_attention`; 'xla' takes the same arguments anywhere.

    Raises:
      ValueError: for float32, in which cuDNN does not compute; where there is no cuDNN.
    """
    if q.dtype != jnp.bfloat16:
        raise ValueError(
            f"model.attention 'cudnn' computes in bfloat16, not {q.dtype}; use model.attention "
            'einsum, or model.dtype bfloat16'
        )
    L = q.shape[1]
    # With a mask its backward pass takes even lengths only.
    fill = ((0, 0), (0, L % 2), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, fill) for x in (q, k, v))
    valid = jnp.pad(valid, fill[:2])
    mask = jnp.broadcast_to(valid[:, None, None, :], (len(q), 1, q.shape[1], q.shape[1]))
    try:
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    except RuntimeError as error:
        raise ValueError(
            f"model.attention 'cudnn': {error} Install it, or use model.attention einsum"
        ) from None
    return mixed[:, :L]


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
    'einsum': _einsum,
    'folded': _folded,
    'splash': splash_attention,
    'cudnn': cudnn_attention,
}

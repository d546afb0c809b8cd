"""Attention with grouped key/value heads, in the form each platform runs fastest.

Query head n reads key/value head n // (N // K). Every query attends to every valid key, unless a
`Visibility` says less. The output of a query that sees no key is meaningless but finite, so that
padding never puts a NaN into a sum.

A comment such as `# [B, L, N, H]` after an assignment is the shape of the value: `B` sequences, `L`
length, `N` query heads, `K` key/value heads (N is a multiple of K), `H` head dim; `L'` is the axis
of the keys where queries have `L`, and `g` = N / K the query heads of one key/value head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.errors import check_one_of
from spg_jax.models.visibility import Visibility

# The score of an invalid key. It is finite so that the softmax of a row without a valid key is
# uniform instead of 0/0; beside a valid key, exp(MASKED - max) is exactly 0 in float32.
MASKED = -1e30

FUSED = ('splash', 'cudnn')  # kernels that keep no scores in memory
CUDNN_HEAD_MULTIPLE, CUDNN_LARGEST_HEAD = 8, 256  # head dims that the kernel of cuDNN accepts
FOR_CPUS = 'folded'
AUTO = 'auto'
# A CUDA device has two names: the devices of JAX say 'gpu', programs compiled for one say 'cuda'.
_FASTEST = {'cpu': FOR_CPUS, 'tpu': 'splash', 'gpu': 'cudnn', 'cuda': 'cudnn'}


def attention(
    q: Array, k: Array, v: Array, valid: Array | Visibility, implementation: str = 'einsum'
) -> Array:
    """Softmax attention of every query over the keys that it sees.

    Args:
      q: [B, L, N, H] queries, already rotated.
      k: [B, L', K, H] keys, already rotated; L' may differ from L.
      v: [B, L', K, H] values.
      valid: [B, L'] bool, False on padding, for attention to every valid key; or a `Visibility`.
        Where L' differs from L, what each query sees is [B, L, L'] bool instead.
      implementation: 'einsum' runs anywhere, 'folded' is for CPUs, 'splash' for TPUs and 'cudnn'
        for CUDA; `resolve` chooses one of them.

    Returns:
      [B, L, N, H] in the dtype of q. Scores and softmax are float32 in any case.

    Raises:
      ValueError: for an implementation that does not exist or does not accept these arrays.
    """
    check_implementation(implementation)
    if q.shape[1] != k.shape[1] and implementation in FUSED:
        # The fused kernels take queries and keys of one length. Other lengths come from a cache or
        # from the last layer of a window, where queries are few, so that their scores are small.
        implementation = 'einsum'
    return _IMPLEMENTATIONS[implementation](q, k, v, valid)


def resolve(implementation: str, platform: str, dtype: str = 'bfloat16') -> str:
    """The implementation that the setting `model.attention` means on a platform.

    Args:
      implementation: the setting: a name that `attention` accepts, which is returned as it is, or
        'auto' for the fastest implementation on the platform that computes in `dtype`.
      platform: platform of the devices that will run the program; others may compile it.
      dtype: the compute dtype.

    Raises:
      ValueError: for an implementation that does not exist, or 'auto' on an unknown platform.
    """
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


def check_implementation(implementation: str, *more_names: str) -> None:
    """Raises ValueError unless `attention` accepts the name or it is one of `more_names`."""
    check_one_of('model.attention', implementation, (*more_names, *_IMPLEMENTATIONS))


def cudnn_attention(
    q: Array, k: Array, v: Array, valid: Array | Visibility, implementation: str = 'cudnn'
) -> Array:
    """`attention` by the fused kernel of cuDNN, which keeps no scores and splits over a mesh.

    Args:
      q, k, v, valid: as in `attention`, in bfloat16.
      implementation: the argument of `jax.nn.dot_product_attention`. 'xla' accepts the same arrays
        on any platform.

    Raises:
      ValueError: for float32, in which cuDNN does not compute, for a head dim over 256, or if cuDNN
        is not installed.
    """
    if q.dtype != jnp.bfloat16:
        raise ValueError(
            f"model.attention 'cudnn' computes in bfloat16, not {q.dtype}; use model.attention "
            'einsum, or model.dtype bfloat16'
        )
    L, H = q.shape[1], q.shape[3]
    if H > CUDNN_LARGEST_HEAD:
        raise ValueError(
            f"model.attention 'cudnn' has heads of at most {CUDNN_LARGEST_HEAD} numbers, not {H}; "
            'use model.attention einsum'
        )
    # The length is padded to an even one, because the backward pass of the masked kernel accepts no
    # odd lengths, and the head dim with zeros, which change no score. Below, L and H stand for the
    # padded sizes in the shapes.
    padding = ((0, 0), (0, L % 2), (0, 0), (0, -H % CUDNN_HEAD_MULTIPLE))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))  # [B, L, N, H], [B, L, K, H] twice
    if isinstance(valid, Visibility):
        mask = jnp.pad(valid.mask(), (*padding[:2], padding[1]))[:, None]  # [B, 1, L, L']
        mask = jnp.broadcast_to(mask, (len(q), *mask.shape[1:]))
    else:
        valid = jnp.pad(valid, padding[:2])  # [B, L]
        mask = jnp.broadcast_to(  # [B, 1, L, L']
            valid[:, None, None, :], (len(q), 1, q.shape[1], q.shape[1])
        )
    try:
        mixed = jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=H**-0.5, implementation=implementation
        )
    except RuntimeError as error:
        raise ValueError(
            f"model.attention 'cudnn': {error} Install it, or use model.attention einsum"
        ) from None
    return mixed[:, :L, :, :H]


def _folded(q: Array, k: Array, v: Array, valid: Array | Visibility) -> Array:
    """`attention` as B K plain matrix products, with heads folded into the batch: fast on CPUs.

    Sharded accelerators should not use it, because merging a data-sharded with a tensor-sharded
    axis makes the compiler gather.
    """
    B, L, N, H = q.shape
    M, K = k.shape[1:3]  # L', K
    # Queries that share a key/value head become more rows of one product, so that no key is copied.
    queries = q.transpose(0, 2, 1, 3).reshape(B * K, (N // K) * L, H)  # [B K, g L, H]
    keys = k.transpose(0, 2, 3, 1).reshape(B * K, H, M)  # [B K, H, L']
    values = v.transpose(0, 2, 1, 3).reshape(B * K, M, H)  # [B K, L', H]
    scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)  # [B K, g L, L']
    visible = valid.mask() if isinstance(valid, Visibility) else valid
    if visible.ndim == 3:  # [B, L, L']
        weights = _softmax(scores.reshape(B, N, L, M), visible[:, None], H)  # [B, N, L, L']
    else:
        weights = _softmax(scores.reshape(B, N * L, M), visible[:, None, :], H)  # [B, N L, L']
    mixed = jnp.matmul(  # [B K, g L, H]
        weights.astype(v.dtype).reshape(B * K, (N // K) * L, M), values
    )
    return mixed.reshape(B, N, L, H).transpose(0, 2, 1, 3)


def _einsum(q: Array, k: Array, v: Array, valid: Array | Visibility) -> Array:
    """`attention` with separate axes: rows and heads keep their sharding without a gather.

    The subscripts are the axis letters in lower case, with m for L'.
    """
    B, L, N, H = q.shape
    K = k.shape[2]
    queries = q.reshape(B, L, K, N // K, H)  # [B, L, K, g, H]
    scores = jnp.einsum('blkgh,bmkh->bkglm', queries, k, preferred_element_type=jnp.float32)
    visible = valid.mask() if isinstance(valid, Visibility) else valid
    if visible.ndim == 3:  # [B, L, L']
        visible = visible[:, None, None]  # [B, 1, 1, L, L']
    else:
        visible = visible[:, None, None, None, :]  # [B, 1, 1, 1, L']
    weights = _softmax(scores, visible, H)  # [B, K, g, L, L']
    mixed = jnp.einsum('bkglm,bmkh->blkgh', weights.astype(v.dtype), v)
    return mixed.reshape(B, L, N, H)


def _softmax(scores: Array, visible: Array, head_dim: int) -> Array:
    """Softmax over the visible keys, the last axis, of scores / sqrt(head_dim), in float32."""
    return jax.nn.softmax(jnp.where(visible, scores * head_dim**-0.5, MASKED), axis=-1)


def _splash(q: Array, k: Array, v: Array, valid: Array | Visibility) -> Array:
    """`attention` by the kernel for TPUs, whose import takes time that other platforms save."""
    from spg_jax.models.splash import splash_attention

    return splash_attention(q, k, v, valid)


_IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, Array | Visibility], Array]] = {
    'einsum': _einsum,
    FOR_CPUS: _folded,
    'splash': _splash,
    'cudnn': cudnn_attention,
}

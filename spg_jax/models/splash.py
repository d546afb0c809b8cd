"""Attention for TPUs by splash attention, the Pallas kernel that comes with JAX.

The kernel computes scores block by block in the fast memory of a chip, and again in the backward
pass, so that memory grows with L and not with its square.

Shape comments use the letters of `spg_jax.models.attention`, and `S` for the padded length.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from spg_jax.models.visibility import Visibility, block_rule
from spg_jax.sharding import AXES, ROWS, row_shards

LANES = 128  # the length of a block is a multiple of it
LARGEST_BLOCK = 512  # positions; the float32 scores of such a block fill 1 MiB of fast memory


def splash_attention(
    q: Array, k: Array, v: Array, valid: Array | Visibility, interpret: bool = False
) -> Array:
    """`attention` by the kernel, which each device runs on its rows and heads.

    Args:
      q, k, v, valid: as in `attention`, with any head dim, in float32 or bfloat16.
      interpret: whether to interpret the kernel op by op, which is slow but works on any platform.

    Raises:
      ValueError: for two halves or documents with positions of their own, because the mask of the
        kernel is the same for all rows.
    """
    by_position = isinstance(valid, Visibility) and valid.position is not None
    if by_position and (valid.block_length > 1 or valid.halves):
        if valid.halves or valid.document is not None:
            raise ValueError(
                "model.attention 'splash' counts the blocks of two halves or of several documents "
                'in columns, not in positions of each row; leave the positions out, or use '
                'model.attention einsum'
            )
        return _aligned(q, k, v, valid, interpret)
    local = functools.partial(_on_one_device, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or set(AXES) - set(mesh.shape) or AxisType.Manual in mesh.axis_types:
        return local(q, k, v, valid)
    # As in `sharding.constrain`, rows that the mesh does not divide stay whole: Flax initialises
    # parameters on a batch of one row.
    rows = ROWS if len(q) % row_shards(mesh) == 0 else None
    heads = P(rows, None, 'tensor')
    # The kernel is split by hand because the compiler cannot split it.
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, P(rows)), out_specs=heads, check_vma=False
    )(q, k, v, valid)


def _aligned(q: Array, k: Array, v: Array, visible: Visibility, interpret: bool) -> Array:
    """Attention over blocks that each row counts from its own first position.

    Rows are moved to the right until their blocks begin where those of the columns do, so that one
    mask fits all of them.
    """
    length, block_length = q.shape[1], visible.block_length
    padded = length + block_length - 1
    column = jnp.arange(padded)[None, :]  # [1, S]
    # The last token of a row is never padding, so its position tells where the row begins.
    shift = (visible.position[:, -1:] - (length - 1)) % block_length  # [B, 1]
    source = column - shift  # [B, S], the column that each column takes
    exists = (source >= 0) & (source < length)
    source = jnp.clip(source, 0, length - 1)

    def moved(x: Array) -> Array:
        return jnp.take_along_axis(x, source[:, :, None, None], axis=1)

    valid = jnp.take_along_axis(visible.valid, source, axis=1) & exists
    by_column = Visibility(valid, block_length=block_length)
    mixed = splash_attention(moved(q), moved(k), moved(v), by_column, interpret)  # [B, S, N, H]
    back = jnp.arange(length)[None, :] + shift  # [B, L]
    return jnp.take_along_axis(mixed, back[:, :, None, None], axis=1)


def _on_one_device(
    q: Array, k: Array, v: Array, valid: Array | Visibility, interpret: bool
) -> Array:
    """`attention` by the kernel, on the arrays of one device."""
    L, N, H = q.shape[1:]
    blocks, block_length = _blocks(L)
    padding = blocks * block_length - L
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)  # because the kernel does not scale
    queries, keys, values = (  # [B, N, S, H], [B, K, S, H] twice
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v)
    )
    # A query attends to the keys of its own segment. Valid keys are segment 1 and invalid ones 0.
    # All queries are segment 1, even on padding, so that they attend to the same keys as in the
    # other implementations.
    document = None
    if isinstance(valid, Visibility):
        mask = _block_mask(valid, L, blocks * block_length)
        valid, document = valid.valid, valid.document
    else:
        mask = splash.FullMask((blocks * block_length, blocks * block_length))
    valid = jnp.pad(valid, ((0, 0), (0, padding))).astype(jnp.int32)  # [B, S]
    segments = splash.SegmentIds(q=jnp.ones_like(valid), kv=valid)
    if document is not None:  # Each document is a segment; invalid keys are in segment 0.
        document = jnp.pad(document + 1, ((0, 0), (0, padding))).astype(jnp.int32)  # [B, S]
        segments = splash.SegmentIds(q=document, kv=jnp.where(valid > 0, document, 0))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(*[block_length] * 8),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    mixed = jax.vmap(kernel)(queries, keys, values, segments)  # [B, N, S, H]
    return mixed[:, :, :L].swapaxes(1, 2)


def _block_mask(visible: Visibility, length: int, padded: int) -> splash.Mask:
    """The part of a visibility that is the same for all rows, as a mask of the kernel.

    Args:
      visible: the visibility, whose blocks are counted in columns.
      length: L.
      padded: S. Queries on padding see the keys that exist, so that no query sees nothing.
    """
    if not visible.block_length:
        return splash.FullMask((padded, padded))
    column = np.arange(length) % (length // 2 if visible.halves else length)
    block = column // visible.block_length  # [L]
    mask = np.ones((padded, padded), bool)
    mask[:length, :length] = block_rule(block[:, None], block[None, :], visible.halves, np)
    return splash.NumpyMask(mask)


def padded_length(length: int) -> int:
    """The length to which the kernel pads sequences of the given length."""
    blocks, block_length = _blocks(length)
    return blocks * block_length


def _blocks(length: int) -> tuple[int, int]:
    """The number of blocks, the fewest possible, and their length, then the shortest possible."""
    blocks = -(-length // LARGEST_BLOCK)
    return blocks, -(-length // (blocks * LANES)) * LANES

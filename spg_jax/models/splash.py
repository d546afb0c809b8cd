"""Attention for TPUs by splash attention, the Pallas kernel that comes with JAX.

The kernel computes scores block by block in the fast memory of a chip, and again in the backward
pass, so that memory grows with L and not with its square.

Shape comments use the letters of `spg_jax.models.attention`, and `S` for the padded length.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from spg_jax.sharding import AXES, ROWS, row_shards

LANES = 128  # the length of a block is a multiple of it
LARGEST_BLOCK = 512  # positions; the float32 scores of such a block fill 1 MiB of fast memory


def splash_attention(q: Array, k: Array, v: Array, valid: Array, interpret: bool = False) -> Array:
    """`attention` by the kernel, which each device runs on its rows and heads.

    Args:
      q, k, v, valid: as in `attention`, with any head dim, in float32 or bfloat16.
      interpret: whether to interpret the kernel op by op, which is slow but works on any platform.
    """
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


def _on_one_device(q: Array, k: Array, v: Array, valid: Array, interpret: bool) -> Array:
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
    valid = jnp.pad(valid, ((0, 0), (0, padding))).astype(jnp.int32)  # [B, S]
    segments = splash.SegmentIds(q=jnp.ones_like(valid), kv=valid)
    full_mask = splash.FullMask((blocks * block_length, blocks * block_length))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([full_mask] * N),
        block_sizes=splash.BlockSizes(*[block_length] * 8),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    mixed = jax.vmap(kernel)(queries, keys, values, segments)  # [B, N, S, H]
    return mixed[:, :, :L].swapaxes(1, 2)


def padded_length(length: int) -> int:
    """The length to which the kernel pads sequences of the given length."""
    blocks, block_length = _blocks(length)
    return blocks * block_length


def _blocks(length: int) -> tuple[int, int]:
    """The number of blocks, the fewest possible, and their length, then the shortest possible."""
    blocks = -(-length // LARGEST_BLOCK)
    return blocks, -(-length // (blocks * LANES)) * LANES

"""Attention for TPUs by splash attention, the Pallas kernel that comes with JAX.

Scores live block by block in a chip's fast memory and are computed again in the backward pass, so
memory grows with L and not with its square. Shapes as in `spg_jax.models.attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from spg_jax.sharding import AXES, ROWS, row_shards

LANES = 128  # a block is a multiple of them
LARGEST_BLOCK = 512  # positions; the float32 scores of one block are then 1 MiB of fast memory


def splash_attention(q: Array, k: Array, v: Array, valid: Array, interpret: bool = False) -> Array:
    """`attention` by the kernel, on each device's own rows and heads.

    Args:
      q, k, v, valid: as in `attention`; any head dim, float32 or bfloat16.
      interpret: run the kernel's program op by op, which works on any platform, slowly.
    """
    local = functools.partial(_on_one_device, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or set(AXES) - set(mesh.shape) or AxisType.Manual in mesh.axis_types:
        return local(q, k, v, valid)
    # As in `sharding.constrain`, rows that do not split stay whole: parameters are made on one row.
    rows = ROWS if len(q) % row_shards(mesh) == 0 else None
    heads = P(rows, None, 'tensor')
    # The compiler cannot split a kernel by itself.
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, P(rows)), out_specs=heads, check_vma=False
    )(q, k, v, valid)


def _on_one_device(q: Array, k: Array, v: Array, valid: Array, interpret: bool) -> Array:
    L, N, H = q.shape[1:]
    blocks, block = _blocks(L)
    pad = blocks * block - L
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)  # the kernel does not scale
    queries, keys, values = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v)
    )
    # Queries attend to keys of their segment. All queries are of segment 1, those on padding too:
    # what they see is then what other implementations show them.
    valid = jnp.pad(valid, ((0, 0), (0, pad))).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.ones_like(valid), kv=valid)
    everything = splash.FullMask((blocks * block, blocks * block))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([everything] * N),
        block_sizes=splash.BlockSizes(*[block] * 8),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    mixed = jax.vmap(kernel)(queries, keys, values, segments)
    return mixed[:, :, :L].swapaxes(1, 2)


def padded_length(length: int) -> int:
    """What the kernel pads a length to."""
    blocks, block = _blocks(length)
    return blocks * block


def _blocks(length: int) -> tuple[int, int]:
    """How many blocks, of how many positions: as few as may be, and then as short as may be."""
    blocks = -(-length // LARGEST_BLOCK)
    return blocks, -(-length // (blocks * LANES)) * LANES

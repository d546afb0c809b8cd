"""Digests of arrays: whether what was read is, to the last bit, what was written.

A digest is computed where the arrays live. It does not depend on how they are split over devices,
so that a checkpoint of one mesh can be checked on another.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def digest_arrays(tree: Any) -> str:
    """Names every bit of a pytree of arrays in 64 hexadecimal digits.

    Each array is summed up as Σ_i w_i x_i mod 2^32, with x_i the bits of element i and w_i an odd
    number that depends on i. A change of one element always changes the sum, because w_i times the
    change is no multiple of 2^32. Two such sums stand for each array.

    Args:
      tree: arrays whose elements have at most 32 bits, on any devices of any processes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_weighted_sums(leaf) for _, leaf in leaves])
    text = hashlib.sha256()
    for (path, leaf), pair in zip(leaves, sums, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        numbers = np.asarray(pair).tolist()
        text.update(f'{name} {leaf.dtype} {tuple(leaf.shape)} {numbers}\n'.encode())
    return text.hexdigest()


def non_finite(tree: Any) -> str:
    """Names the first array of a pytree that holds NaN or an infinity; '' if there is none."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf[1].dtype, jnp.floating)]
    finite = jax.device_get([_is_finite(leaf) for _, leaf in leaves])
    for (path, _), is_finite in zip(leaves, finite, strict=True):
        if not is_finite:
            return jax.tree_util.keystr(path, simple=True, separator='/')
    return ''


# One program for each shape, since arrays of a tree have few shapes.
@jax.jit
def _weighted_sums(x: Array) -> Array:
    """Two sums, [2] uint32."""
    return jnp.stack([_weighted_sum(x, salt) for salt in (0x9E3779B9, 0x85EBCA6B)])


def _weighted_sum(x: Array, salt: int) -> Array:
    # A running number of each element, from its place along every axis: reshaping would gather.
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place += along * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    # The finaliser of MurmurHash3: neighbours get weights that have nothing in common.
    weight = (place ^ jnp.uint32(salt)) * jnp.uint32(0x85EBCA6B)
    weight ^= weight >> 13
    weight *= jnp.uint32(0xC2B2AE35)
    weight ^= weight >> 16
    return jnp.sum(_bits(x) * (weight | 1), dtype=jnp.uint32)


def _bits(x: Array) -> Array:
    """The bits of each element as uint32."""
    if x.dtype == jnp.bool_ or x.dtype.name in ('int4', 'uint4'):
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


@jax.jit
def _is_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))

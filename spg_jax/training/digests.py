"""Digests of arrays: whether what was read is, to the last bit, what was written.

A digest is computed where the arrays live. It does not depend on how they are split over devices,
so that a checkpoint of one mesh can be checked on another. Small arrays in the memory of the host
are summed up by NumPy, because compiling a program for each of their shapes would take seconds.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

HOST_ELEMENTS = 2**20  # the largest array that NumPy sums up, in some 20 ms
SALTS = (0x9E3779B9, 0x85EBCA6B)


def digest_arrays(tree: Any) -> str:
    """Names every bit of a pytree of arrays in 64 hexadecimal digits.

    Each array is summed up as Σ_i w_i x_i mod 2^32, with x_i the bits of element i and w_i an odd
    number that depends on i. A change of one element always changes the sum, because w_i times the
    change is no multiple of 2^32. Two such sums stand for each array.

    Args:
      tree: arrays whose elements have at most 32 bits, on any devices of any processes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = [
        _weighted_sums_on_host(np.asarray(leaf)) if _is_on_host(leaf) else _weighted_sums(leaf)
        for _, leaf in leaves
    ]
    sums = jax.device_get(sums)
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
    finite = [
        np.isfinite(np.asarray(leaf)).all() if _is_on_host(leaf) else _is_finite(leaf)
        for _, leaf in leaves
    ]
    finite = jax.device_get(finite)
    for (path, _), is_finite in zip(leaves, finite, strict=True):
        if not is_finite:
            return jax.tree_util.keystr(path, simple=True, separator='/')
    return ''


def _is_on_host(x: Array | np.ndarray) -> bool:
    """Whether NumPy reads an array without a transfer, and quickly; all processes agree on it."""
    if x.size > HOST_ELEMENTS:
        return False
    if isinstance(x, np.ndarray):
        return True
    if not (x.is_fully_addressable or x.is_fully_replicated):
        return False
    return all(device.platform == 'cpu' for device in x.sharding.device_set)


def _weighted_sums_on_host(x: np.ndarray) -> np.ndarray:
    """The sums of `_weighted_sums`."""
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype == np.bool_ or x.dtype.name in ('int4', 'uint4'):
        bits = x.astype(np.uint32)
    else:
        width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
        bits = x.view(width).astype(np.uint32)
    place = np.arange(x.size, dtype=np.uint32)
    sums = [np.sum(bits * _weights(place, np.uint32(salt)), dtype=np.uint32) for salt in SALTS]
    return np.array(sums, np.uint32)


# One program for each shape, since arrays of a tree have few shapes.
@jax.jit
def _weighted_sums(x: Array) -> Array:
    """Two sums, [2] uint32."""
    return jnp.stack([_weighted_sum(x, salt) for salt in SALTS])


def _weighted_sum(x: Array, salt: int) -> Array:
    # A running number of each element, from its place along every axis: reshaping would gather.
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place += along * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_bits(x) * _weights(place, jnp.uint32(salt)), dtype=jnp.uint32)


def _weights(place: Any, salt: Any) -> Any:
    """An odd number for each place, by the finaliser of MurmurHash3, which gives neighbours weights
    that have nothing in common; arrays and salt are uint32 of NumPy or of JAX."""
    weight = (place ^ salt) * np.uint32(0x85EBCA6B)
    weight = weight ^ (weight >> np.uint32(13))
    weight = weight * np.uint32(0xC2B2AE35)
    weight = weight ^ (weight >> np.uint32(16))
    return weight | np.uint32(1)


def _bits(x: Array) -> Array:
    """The bits of each element as uint32."""
    if x.dtype == jnp.bool_ or x.dtype.name in ('int4', 'uint4'):
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


@jax.jit
def _is_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))

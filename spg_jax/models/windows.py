"""Windows of rows: some positions of each row, from one place for all or from a place for each."""

from typing import NamedTuple

import jax
from jax import Array


class Window(NamedTuple):
    """`size` positions of each row, from `start` on."""

    start: Array | int  # [] or [B] int32, or a number that is known before the program runs
    size: int

    def cut(self, x: Array) -> Array:
        """[B, L, ...] -> [B, size, ...]."""
        return cut(x, self.start, self.size)


def cut(x: Array, start: Array | int, size: int) -> Array:
    """`size` positions from `start`, as in `Window`: [B, L, ...] -> [B, size, ...]."""
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=1)
    if start.ndim:
        return jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size))(x, start)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def put(x: Array, part: Array, start: Array) -> Array:
    """x [B, L, ...] with `part` [B, size, ...] from `start` on, which is [] or [B]."""
    if part.shape == x.shape:
        return part
    if start.ndim:
        return jax.vmap(lambda x, part, start: _put(x, part, start, axis=0))(x, part, start)
    return _put(x, part, start, axis=1)


def _put(x: Array, part: Array, start: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)

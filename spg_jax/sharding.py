"""Where arrays live: one mesh, one table from logical to mesh axes, parameters created sharded.

Mesh axes: 'data' (rows; parameters replicated), 'fsdp' (rows, and parameters split along 'embed')
and 'tensor' (heads, MLP and vocabulary split). Arrays handed around are plain pytrees: the boxes
that carry logical axis names exist only inside this file.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')

# Logical axis of a parameter, named where the parameter is created -> mesh axis; None is
# replicated.
RULES: Mapping[str, str | None] = {
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'layers': None,
    'norm': None,
    'rank': None,
    # Of the scales of quantised kernels, which stay whole where a mesh would cut through a tile.
    'embed_tiles': 'fsdp',
    'heads_tiles': 'tensor',
    'mlp_tiles': 'tensor',
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ('data', 'fsdp', 'tensor'), all Auto: the compiler places the unpinned.

    Args:
      sizes: devices along each axis; an axis left out is 1, at most one is -1 for whatever is left.
      devices: those to use; every device of every process by default.

    Raises:
      ValueError: for an unknown axis, a size that is no size, or a product other than the device
        count.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f'mesh.{unknown[0]} is not a mesh axis; use {", ".join(AXES)}')
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    for axis, size in shape.items():
        if size != -1 and size < 1:
            raise ValueError(
                f'mesh.{axis} is {size}; use a positive number of devices, or -1 for those left'
            )
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f'mesh.{free[0]} and mesh.{free[1]} are both -1; leave only one of them open'
        )
    fixed = math.prod(size for size in shape.values() if size != -1)
    found = f'{len(devices)} device{"s" if len(devices) > 1 else ""} found'
    if free:
        if len(devices) % fixed:
            raise ValueError(
                f'mesh {_describe(shape)}: {found}, not a multiple of {fixed}; '
                'use sizes whose product divides the device count'
            )
        shape[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(
            f'mesh {_describe(shape)} needs {fixed} devices, {found}; '
            'set one axis to -1 for whatever is left'
        )
    return jax.make_mesh(
        tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def partition_spec(
    name: str, axes: Sequence[str | None], rules: Mapping[str, str | None] = RULES
) -> P:
    """Mesh axes of one tensor from its logical axes.

    Args:
      name: of the tensor, for messages.
      axes: logical axis of each dimension; None is replicated.
      rules: logical to mesh axes.

    Raises:
      ValueError: for a logical axis without a rule, and for two that share a mesh axis.
    """
    owner: dict[str, str] = {}
    spec = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(
                f'{name}: logical axis {axis!r} has no rule; add it to the sharding rules'
            )
        target = None if axis is None else rules[axis]
        if target in owner:
            raise ValueError(
                f'{name}: logical axes {owner[target]!r} and {axis!r} both map to mesh axis '
                f'{target!r}, which can split only one of them; change one rule'
            )
        if target is not None:
            owner[target] = axis
        spec.append(target)
    return P(*spec)


def abstract_params(
    model: nn.Module,
    mesh: Mesh | None = None,
    rules: Mapping[str, str | None] = RULES,
    collection: str = 'params',
) -> Any:
    """Shapes and types of the parameters, and given a mesh their shardings; nothing is computed.

    Args:
      model: whose.
      mesh: where they are to live; None leaves the shardings out.
      rules: logical to mesh axes.
      collection: of Flax; adapters are not in 'params'.

    Returns:
      The plain parameter pytree with `jax.ShapeDtypeStruct` leaves.

    Raises:
      ValueError: where the rules contradict each other or a mesh axis does not divide a dimension.
    """
    boxed = _boxed_shapes(model, collection)

    def describe(path, box):
        shape, dtype = box.value.shape, box.value.dtype
        if mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        spec = list(partition_spec(name, box.names, rules))
        for i, (size, logical, axis) in enumerate(zip(shape, box.names, spec, strict=True)):
            if axis is not None and size % mesh.shape[axis]:
                if logical.endswith('_tiles'):
                    spec[i] = None
                    continue
                raise ValueError(
                    f'{name}: {logical} is {size}, not a multiple of mesh.{axis} '
                    f'{mesh.shape[axis]}; '
                    f'change the model or use a mesh.{axis} that divides it'
                )
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    return jax.tree_util.tree_map_with_path(describe, boxed, is_leaf=_is_box)


def param_shardings(
    model: nn.Module,
    mesh: Mesh,
    rules: Mapping[str, str | None] = RULES,
    collection: str = 'params',
) -> Any:
    """The `NamedSharding` of every parameter, as a pytree; raises as `abstract_params` does."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh, rules, collection))


def init_params(
    model: nn.Module,
    key: Array,
    mesh: Mesh,
    rules: Mapping[str, str | None] = RULES,
    collection: str = 'params',
) -> Any:
    """Random parameters, every device making only its own shards; the same values on every mesh.

    Returns:
      Plain pytree for `model.apply({collection: params}, ...)`.
    """

    def init(key):
        # Not nn.unbox: under a mesh it adds constraints of its own, from rules that are not ours.
        boxed = _init(model, key, collection)
        return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)

    return jax.jit(init, out_shardings=param_shardings(model, mesh, rules, collection))(key)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) over ('data', 'fsdp'); the other axes whole."""
    return NamedSharding(mesh, P(ROWS))


def row_shards(mesh: Mesh) -> int:
    """Devices, or groups of them, that rows are split over."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's rows this process brings to its devices: ascending indices [b].

    Processes whose devices hold the same rows bring the same ones. `rows` is a multiple of
    `row_shards`.
    """
    spans = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[span] for (span,) in spans]))


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Host arrays to devices, rows over ('data', 'fsdp').

    Args:
      mesh: from `make_mesh`.
      batch: pytree of host arrays [b, ...], the `own_rows` of this process out of B.

    Returns:
      The same pytree of arrays [B, ...].

    Raises:
      ValueError: when the row shards of this process do not divide b.
    """
    sharding = batch_sharding(mesh)
    shards = len(own_rows(mesh, row_shards(mesh)))

    def put(x):
        x = np.asarray(x)
        if x.ndim == 0 or x.shape[0] % shards:
            raise ValueError(
                f'a batch leaf of shape {list(x.shape)} does not split into {shards} equal shards '
                f'of rows ({_describe({axis: mesh.shape[axis] for axis in ROWS})}); '
                f'use a multiple of {shards} rows'
            )
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)


def own_values(x: Array) -> np.ndarray:
    """The rows of an array [B, ...] that are on this process's devices, as `own_rows` has them."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin the layout of an array under `jax.set_mesh`; without a mesh, x as it is.

    Without this the compiler may follow the parameters and split activations along 'embed' instead
    of rows. An axis of x that its mesh axes do not divide stays whole.

    Args:
      x: inside a jitted function.
      axes: logical axis of each dimension, as in `RULES`, or 'rows'; None is whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or set(AXES) - set(mesh.shape) or AxisType.Manual in mesh.axis_types:
        return x
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        split = ROWS if axis == 'rows' else RULES[axis] if axis else None
        shards = math.prod(
            mesh.shape[name] for name in ((split,) if isinstance(split, str) else split or ())
        )
        spec.append(split if size % shards == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*spec))


def _init(model: nn.Module, key: Array, collection: str) -> Any:
    """Boxed parameters of a collection; their shapes do not depend on those of the tokens."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))[collection]


@functools.lru_cache(maxsize=8)  # a run asks a dozen times, and each is a trace of the model
def _boxed_shapes(model: nn.Module, collection: str) -> Any:
    return jax.eval_shape(lambda: _init(model, jax.random.key(0), collection))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _describe(shape: Mapping[str, int]) -> str:
    return ' x '.join(f'{axis}={size}' for axis, size in shape.items())

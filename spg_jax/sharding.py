"""Where arrays live: one mesh, one table from logical to mesh axes, parameters created sharded.

The mesh has three axes. 'data' splits rows and replicates parameters; 'fsdp' splits rows too, and
parameters along 'embed'; 'tensor' splits heads, the MLP and the vocabulary. Other modules see plain
pytrees of arrays: the boxes in which Flax keeps logical axis names do not leave this file.

Shapes: `B` rows of a whole batch, `b` those of them that one process holds.
"""

import functools
import math
import os
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

# Logical axis -> mesh axis that splits it; None means replicated. Modules name the logical axes of
# a parameter where they create it.
RULES: Mapping[str, str | None] = {
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'experts': 'tensor',
    'expert_mlp': None,  # 'tensor' splits experts already
    'layers': None,
    'norm': None,
    'rank': None,
    # The scales of quantised kernels have one entry for each tile. They stay whole where the mesh
    # axis does not divide the number of tiles.
    'embed_tiles': 'fsdp',
    'heads_tiles': 'tensor',
    'mlp_tiles': 'tensor',
    'expert_mlp_tiles': None,
}


def _devices() -> list[jax.Device]:
    """Every device of every process.

    Raises:
      ValueError: if JAX_PLATFORMS asks for devices that are not here.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # An assertion fails where all platforms do.
        reason = ' '.join(str(error).split()) or 'JAX finds none'
        raise ValueError(
            f'JAX_PLATFORMS is {os.environ.get("JAX_PLATFORMS", "")!r}, which has no usable device '
            f'here ({reason}); unset it, or use cpu'
        ) from error


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ('data', 'fsdp', 'tensor').

    All axes are Auto: the compiler decides the layout of arrays that nobody pinned.

    Args:
      sizes: number of devices along each axis. An axis that is left out has 1; one axis may be -1,
        which stands for all remaining devices.
      devices: the devices to use; by default every device of every process.

    Raises:
      ValueError: for an unknown axis, an impossible size, or sizes whose product is not the number
        of devices.
    """
    devices = _devices() if devices is None else list(devices)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f'mesh.{unknown[0]} is not a mesh axis; use {", ".join(AXES)}')
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    for axis, size in shape.items():
        if size != -1 and size < 1:
            raise ValueError(
                f'mesh.{axis} is {size}; use a positive number, or -1 for all that remain'
            )
    open_axes = [axis for axis, size in shape.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f'mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1; only one axis can be -1'
        )
    product = math.prod(size for size in shape.values() if size != -1)
    device_count = f'{len(devices)} device{"s" if len(devices) > 1 else ""} found'
    if open_axes:
        if len(devices) % product:
            raise ValueError(
                f'mesh {_describe(shape)}: {device_count}, not a multiple of {product}; '
                'use sizes whose product divides the device count'
            )
        shape[open_axes[0]] = len(devices) // product
    elif product != len(devices):
        raise ValueError(
            f'mesh {_describe(shape)} needs {product} devices, {device_count}; '
            'set one axis to -1, which takes all that remain'
        )
    return jax.make_mesh(
        tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def partition_spec(name: str, axes: Sequence[str | None]) -> P:
    """The mesh axes that split one tensor, by `RULES`.

    Args:
      name: name of the tensor, for error messages.
      axes: logical axis of each dimension; None is replicated.

    Raises:
      ValueError: for a logical axis without a rule, or two logical axes on one mesh axis.
    """
    logical_of: dict[str, str] = {}  # mesh axis -> the logical axis that it splits
    spec = []
    for logical_axis in axes:
        if logical_axis is not None and logical_axis not in RULES:
            raise ValueError(
                f'{name}: logical axis {logical_axis!r} has no rule; add it to sharding.RULES'
            )
        mesh_axis = None if logical_axis is None else RULES[logical_axis]
        if mesh_axis in logical_of:
            raise ValueError(
                f'{name}: logical axes {logical_of[mesh_axis]!r} and {logical_axis!r} both map to '
                f'mesh axis {mesh_axis!r}, which can split only one of them; change one rule'
            )
        if mesh_axis is not None:
            logical_of[mesh_axis] = logical_axis
        spec.append(mesh_axis)
    return P(*spec)


def abstract_params(model: nn.Module, mesh: Mesh | None = None, collection: str = 'params') -> Any:
    """The parameters of a model as shapes and types, without computing any of them.

    Args:
      model: the module whose parameters are described.
      mesh: the mesh they will live on; with None they have no shardings.
      collection: Flax collection; adapters have one of their own beside 'params'.

    Returns:
      The plain parameter pytree with `jax.ShapeDtypeStruct` leaves.

    Raises:
      ValueError: if two axes of a tensor map to one mesh axis, or a mesh axis does not divide a
        dimension.
    """
    boxed = _boxed_shapes(model, collection)

    def abstract(path, box):
        shape, dtype = box.value.shape, box.value.dtype
        if mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        spec = _dividing_spec(name, shape, box.names, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(abstract, boxed, is_leaf=_is_box)


def param_shardings(model: nn.Module, mesh: Mesh, collection: str = 'params') -> Any:
    """The `NamedSharding` of each parameter, as a pytree; raises what `abstract_params` raises."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh, collection))


def init_params(model: nn.Module, key: Array, mesh: Mesh, collection: str = 'params') -> Any:
    """Random parameters, the same values on every mesh; each device creates only its shards.

    Returns:
      Plain pytree for `model.apply({collection: params}, ...)`.
    """

    def init(key):
        # Under a mesh, `nn.unbox` would add sharding constraints by Flax's own rules, so the boxes
        # are opened here instead.
        boxed = _init(model, key, collection)
        return jax.tree.map(lambda box: box.value, boxed, is_leaf=_is_box)

    return jax.jit(init, out_shardings=param_shardings(model, mesh, collection))(key)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts the whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits rows, the leading axis, over ('data', 'fsdp') and nothing else."""
    return NamedSharding(mesh, P(ROWS))


def row_shards(mesh: Mesh) -> int:
    """The number of parts that rows are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def current_row_shards() -> int:
    """`row_shards` of the mesh of `jax.set_mesh`; 1 without a mesh."""
    return math.prod(current_shards(axis) for axis in ROWS)


def current_shards(axis: str) -> int:
    """The size of an axis of the mesh of `jax.set_mesh`; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The indices of the rows of a batch that this process puts on its devices: [b], ascending.

    Processes whose devices hold the same rows get the same indices. `rows` is B, a multiple of
    `row_shards`.
    """
    spans = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[span] for (span,) in spans]))


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Puts host arrays on devices, with rows split over ('data', 'fsdp').

    Args:
      mesh: from `make_mesh`.
      batch: pytree of host arrays [b, ...]: of the B rows those that `own_rows` gives this process.

    Returns:
      The same pytree of arrays [B, ...].

    Raises:
      ValueError: if b is not a multiple of the number of row shards of this process.
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
    """The rows of an array [B, ...] on the devices of this process, in the order of `own_rows`."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def constrain(x: Array, *axes: str | None) -> Array:
    """x with its layout pinned under `jax.set_mesh`; without a mesh, x unchanged.

    Without a pin the compiler may follow the layout of the parameters and split activations along
    'embed' instead of rows. A dimension that its mesh axes do not divide stays whole.

    Args:
      x: an array inside a jitted function.
      axes: for each dimension a logical axis of `RULES`, 'rows', or None, which leaves it whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or set(AXES) - set(mesh.shape) or AxisType.Manual in mesh.axis_types:
        return x
    spec = []
    for size, axis in zip(x.shape, axes, strict=True):
        mesh_axes = ROWS if axis == 'rows' else RULES[axis] if axis else None
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        shards = math.prod(mesh.shape[name] for name in names)
        spec.append(mesh_axes if size % shards == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*spec))


def constrain_rows(tree: Any) -> Any:
    """A pytree of arrays [B, ...] whose rows are split as `constrain` does; scalars stay."""
    return jax.tree.map(
        lambda x: constrain(x, 'rows', *(None,) * (x.ndim - 1)) if x.ndim else x, tree
    )


def _dividing_spec(name: str, shape: tuple[int, ...], axes: Sequence[str | None], mesh: Mesh) -> P:
    """`partition_spec` of a tensor, if the mesh axes divide its shape; raises ValueError if not."""
    spec = list(partition_spec(name, axes))
    for i, (size, logical_axis, mesh_axis) in enumerate(zip(shape, axes, spec, strict=True)):
        if mesh_axis is not None and size % mesh.shape[mesh_axis]:
            if logical_axis.endswith('_tiles'):
                spec[i] = None
                continue
            raise ValueError(
                f'{name}: {logical_axis} is {size}, not a multiple of mesh.{mesh_axis} '
                f'{mesh.shape[mesh_axis]}; '
                f'change the model or use a mesh.{mesh_axis} that divides it'
            )
    return P(*spec)


def _init(model: nn.Module, key: Array, collection: str) -> Any:
    """Boxed parameters of a collection; the token shape [1, 2] does not affect their shapes."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))[collection]


# Cached, because a run asks for these shapes a dozen times and each answer traces the model.
@functools.lru_cache(maxsize=8)
def _boxed_shapes(model: nn.Module, collection: str) -> Any:
    return jax.eval_shape(lambda: _init(model, jax.random.key(0), collection))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _describe(shape: Mapping[str, int]) -> str:
    """'data=2 x fsdp=1 x tensor=4', for error messages."""
    return ' x '.join(f'{axis}={size}' for axis, size in shape.items())

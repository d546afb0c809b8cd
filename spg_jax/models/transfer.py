"""Parameters between published files and devices, one published tensor in host memory at a time.

Two things differ. A published checkpoint has one tensor for each layer, and for each expert of a
layer, whereas the parameters here stack all layers along a leading axis, and experts along the next
one. Published kernels are [out, in], and those here [in, out]. The devices stack and transpose,
because on the host one kernel of all layers of an 8B model would take 3 GB. Arrays may span several
processes; all of them then have to call the same functions in the same order.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open

from spg_jax.models.lora import LoRA, merged_kernel
from spg_jax.models.quantized import is_quantized, quantize
from spg_jax.models.tensor_files import Tensor


class Source(NamedTuple):
    """The published tensors of a parameter.

    '{layer}' in the name means one tensor per layer, and '{expert}' after it one for each expert.
    """

    name: str
    transposed: bool = False  # whether published [out, in] is the parameter's [in, out]
    first: int = 0  # the number of the first layer that the parameter stacks

    @property
    def stacked_axes(self) -> int:
        """The number of leading axes along which the parameter stacks published tensors."""
        return ('{layer}' in self.name) + ('{expert}' in self.name)

    def indices(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name of each published tensor -> its place in a parameter of this shape, in order."""
        places = itertools.product(*(range(size) for size in shape[: self.stacked_axes]))
        return {self._name(*place): place for place in places}

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the published tensors of a parameter of this shape, in order."""
        tensor_shape = shape[self.stacked_axes :]
        tensor_shape = tensor_shape[::-1] if self.transposed else tensor_shape
        return dict.fromkeys(self.indices(shape), tensor_shape)

    def _name(self, layer: int = 0, expert: int = 0) -> str:
        return self.name.format(layer=self.first + layer, expert=expert)


Table = Mapping[tuple[str, ...], Source]  # path of a parameter -> its published tensors


def read_parameters(
    files: Mapping[str, safe_open], source_of: Callable[[tuple[Any, ...]], Source], target: Any
) -> Any:
    """Reads parameters. Each process reads only the parts that its devices hold.

    Args:
      files: tensor name -> the open file that holds it, in the shape that `target` implies.
      source_of: the path of a parameter in the tree -> its published tensors.
      target: what the parameters shall be, from `abstract_params`. Without a sharding they become
        host arrays. A quantised kernel needs shardings; it is quantised on the devices, tensor by
        tensor.

    Returns:
      The parameters, bit for bit as stored unless `target` has another dtype.
    """
    parts, structure = jax.tree_util.tree_flatten_with_path(target, is_leaf=is_quantized)
    sources = [source_of(path) for path, _ in parts]
    leaves = [leaf for _, leaf in parts]
    are_stacked = [
        bool(source.stacked_axes) and _sharding_of(leaf) is not None
        for source, leaf in zip(sources, leaves, strict=True)
    ]
    empty_stacks = iter(_zeros(list(itertools.compress(leaves, are_stacked))))
    return jax.tree.unflatten(
        structure,
        [
            _read_parameter(files, source, leaf, next(empty_stacks) if is_stacked else None)
            for source, leaf, is_stacked in zip(sources, leaves, are_stacked, strict=True)
        ],
    )


def _sharding_of(leaf: Any) -> NamedSharding | None:
    """The sharding of a parameter. The codes of a quantised kernel have the layout that the kernel
    would have."""
    return leaf.qvalue.sharding if is_quantized(leaf) else leaf.sharding


def _read_parameter(files: Mapping[str, safe_open], source: Source, leaf: Any, stacked: Any) -> Any:
    """Reads a parameter; `stacked` is the stack of zeros to fill, which is donated, or None."""
    shapes, sharding = source.shapes(leaf.shape), _sharding_of(leaf)
    if sharding is None:
        tensors = [files[name].get_tensor(name).astype(leaf.dtype) for name in shapes]
        tensors = [tensor.T if source.transposed else tensor for tensor in tensors]
        return np.stack(tensors).reshape(leaf.shape) if source.stacked_axes else tensors[0]
    # Each axis of a published tensor is split like the same axis of the parameter.
    spec = sharding.spec[source.stacked_axes :]
    tensor_sharding = NamedSharding(sharding.mesh, P(*(spec[::-1] if source.transposed else spec)))
    tensors = (
        _read_tensor(files[name], name, shape, leaf.dtype, tensor_sharding)
        for name, shape in shapes.items()
    )
    if not source.stacked_axes:
        transpose = jax.jit(_transpose, static_argnums=1, out_shardings=sharding)
        return transpose(next(tensors), source.transposed)
    shardings = jax.tree.map(lambda part: part.sharding, leaf)
    place = jax.jit(_place, static_argnums=3, donate_argnums=0, out_shardings=shardings)
    for index, tensor in zip(source.indices(leaf.shape).values(), tensors, strict=True):
        stacked = place(stacked, tensor, index, source.transposed)
        jax.block_until_ready(stacked)  # otherwise reading runs ahead, and tensors pile up
    return stacked


def published_tensors(
    source: Source,
    leaf: Array,
    factors: Mapping[str, Array] | None = None,
    lora: LoRA | None = None,
) -> dict[str, Tensor]:
    """The published tensors of a parameter, by name.

    A tensor is gathered, and its adapter merged, only when `Tensor.fetch` is called.

    Args:
      source: the published tensors that the parameter becomes.
      leaf: the parameter, on any devices of any processes.
      factors: 'a' and 'b' of the adapter to merge, on the same devices; None merges nothing.
      lora: the size of the adapter.
    """
    index = source.indices(leaf.shape)
    return {
        name: Tensor(
            shape, leaf.dtype, functools.partial(_gather, leaf, factors, index[name], source, lora)
        )
        for name, shape in source.shapes(leaf.shape).items()
    }


def _read_tensor(
    file: safe_open, name: str, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding
) -> Array:
    """One published tensor on the devices. A part that several devices hold is read once."""
    parts: dict[tuple[Any, ...], np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            parts[key] = file.get_slice(name)[index].astype(dtype, copy=False)
        return parts[key]

    tensor = jax.make_array_from_callback(shape, sharding, read)
    return tensor.block_until_ready()  # after this the host arrays in `parts` can be freed


def _gather(
    leaf: Array,
    factors: Mapping[str, Array] | None,
    index: tuple[int, ...],
    source: Source,
    lora: LoRA | None,
) -> np.ndarray:
    """One whole published tensor as a host array, in every process."""
    if isinstance(leaf, np.ndarray) and not factors:  # It is on the host already.
        return np.ascontiguousarray(_transpose(leaf[index], source.transposed))
    # Tensors of one shape share a program, whatever their names are.
    take = jax.jit(_take, static_argnums=(3, 4))
    tensor = take(leaf, factors, index, source.transposed, lora)
    return multihost_utils.process_allgather(tensor, tiled=True)


# The functions below are not nested in others, because jit would compile a new function object
# again at every call.
def _transpose(tensor: Array, transposed: bool) -> Array:
    """A published tensor in the axis order of the parameter, or the reverse."""
    return tensor.T if transposed else tensor


def _zeros(targets: Sequence[Any]) -> list[Any]:
    """Zeros in the shapes, dtypes and shardings of the targets, which one program makes."""
    leaves, structure = jax.tree.flatten(targets)
    if not leaves:
        return []
    shardings = tuple(leaf.sharding for leaf in leaves)
    make = jax.jit(_make_zeros, static_argnums=0, out_shardings=shardings)
    return structure.unflatten(make(tuple((leaf.shape, leaf.dtype) for leaf in leaves)))


def _make_zeros(shapes: tuple[tuple[tuple[int, ...], Any], ...]) -> tuple[Array, ...]:
    return tuple(jnp.zeros(shape, dtype) for shape, dtype in shapes)


def _place(stacked: Any, tensor: Array, index: tuple[Array, ...], transposed: bool) -> Any:
    """The stacked parameter with a published tensor in its place, quantised if the parameter is."""
    kernel = _transpose(tensor, transposed)
    if is_quantized(stacked):
        kernel = quantize(kernel, stacked.qtype)

    def put(stacked: Array, part: Array) -> Array:
        part = part.reshape((1,) * len(index) + part.shape)
        return jax.lax.dynamic_update_slice(
            stacked, part, (*index, *(0,) * (part.ndim - len(index)))
        )

    return jax.tree.map(put, stacked, kernel)


def _take(
    leaf: Array,
    factors: Mapping[str, Array] | None,
    index: tuple[Array, ...],
    transposed: bool,
    lora: LoRA | None,
) -> Array:
    """The published tensor at a place of a parameter, with its adapter merged."""
    # The layer is taken before the merge, which would otherwise make float32 copies of all layers.
    for position in index:
        leaf, factors = jax.tree.map(
            lambda x, position=position: jax.lax.dynamic_index_in_dim(x, position, keepdims=False),
            (leaf, factors),
        )
    kernel = merged_kernel(leaf, factors, lora) if factors else leaf
    return _transpose(kernel, transposed)

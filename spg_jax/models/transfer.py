"""Parameters between published files and devices, one published tensor in host memory at a time.

Two things differ. A published checkpoint has one tensor for each layer, whereas the parameters here
stack all layers along a leading axis. Published kernels are [out, in], and those here [in, out].
The devices stack and transpose, because on the host one kernel of all layers of an 8B model would
take 3 GB. Arrays may span several processes; all of them then have to call the same functions in
the same order.
"""

import functools
from collections.abc import Mapping
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
    """The published tensor of a parameter; '{layer}' in its name means one tensor per layer."""

    name: str
    transposed: bool = False  # whether published [out, in] is the parameter's [in, out]

    @property
    def stacked(self) -> bool:
        """Whether the parameter stacks one published tensor of each layer."""
        return '{layer}' in self.name

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the published tensors of a parameter of this shape, in layer order."""
        layers, layer_shape = (shape[0], shape[1:]) if self.stacked else (1, shape)
        layer_shape = layer_shape[::-1] if self.transposed else layer_shape
        return {self.name.format(layer=layer): layer_shape for layer in range(layers)}


def read_parameter(files: Mapping[str, safe_open], source: Source, leaf: Any) -> Any:
    """Reads a parameter. Each process reads only the parts that its devices hold.

    Args:
      files: tensor name -> the open file that holds it, in the shape that `leaf` implies.
      source: the published tensors of the parameter.
      leaf: what the parameter shall be, from `abstract_params`. Without a sharding it becomes a
        host array. A quantised kernel needs shardings; it is quantised on the devices, tensor by
        tensor.

    Returns:
      The parameter, bit for bit as stored unless `leaf` has another dtype.
    """
    shapes = source.shapes(leaf.shape)
    # The codes of a quantised kernel have the layout that the kernel would have.
    sharding = leaf.qvalue.sharding if is_quantized(leaf) else leaf.sharding
    if sharding is None:
        tensors = [files[name].get_tensor(name).astype(leaf.dtype) for name in shapes]
        tensors = [tensor.T if source.transposed else tensor for tensor in tensors]
        return np.stack(tensors) if source.stacked else tensors[0]
    # Each axis of a published tensor is split like the same axis of the parameter.
    spec = sharding.spec[1:] if source.stacked else sharding.spec
    tensor_sharding = NamedSharding(sharding.mesh, P(*(spec[::-1] if source.transposed else spec)))
    tensors = (
        _read_tensor(files[name], name, shape, leaf.dtype, tensor_sharding)
        for name, shape in shapes.items()
    )
    if not source.stacked:
        transpose = jax.jit(_transpose, static_argnums=1, out_shardings=sharding)
        return transpose(next(tensors), source.transposed)
    shardings = jax.tree.map(lambda part: part.sharding, leaf)
    stacked = jax.tree.map(_zeros, leaf)
    place = jax.jit(_place, static_argnums=3, donate_argnums=0, out_shardings=shardings)
    for layer, tensor in enumerate(tensors):
        stacked = place(stacked, tensor, layer, source.transposed)
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
    return {
        name: Tensor(
            shape, leaf.dtype, functools.partial(_gather, leaf, factors, layer, source, lora)
        )
        for layer, (name, shape) in enumerate(source.shapes(leaf.shape).items())
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
    layer: int,
    source: Source,
    lora: LoRA | None,
) -> np.ndarray:
    """One whole published tensor as a host array, in every process."""
    tensor = jax.jit(_take, static_argnums=(3, 4))(leaf, factors, layer, source, lora)
    return multihost_utils.process_allgather(tensor, tiled=True)


# The functions below are not nested in others, because jit would compile a new function object
# again at every call.
def _transpose(tensor: Array, transposed: bool) -> Array:
    """A published tensor in the axis order of the parameter, or the reverse."""
    return tensor.T if transposed else tensor


def _zeros(leaf: jax.ShapeDtypeStruct) -> Array:
    """Zeros in the shape, dtype and sharding of `leaf`."""
    make = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=leaf.sharding)
    return make(leaf.shape, leaf.dtype)


def _place(stacked: Any, tensor: Array, layer: Array, transposed: bool) -> Any:
    """The stacked parameter with a published tensor written into one layer, quantised if it is."""
    kernel = _transpose(tensor, transposed)
    if is_quantized(stacked):
        kernel = quantize(kernel, stacked.qtype)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return jax.tree.map(put, stacked, kernel)


def _take(
    leaf: Array,
    factors: Mapping[str, Array] | None,
    layer: Array,
    source: Source,
    lora: LoRA | None,
) -> Array:
    """The published tensor of one layer of a parameter, with its adapter merged."""
    # The layer is taken before the merge, which would otherwise make float32 copies of all layers.
    if source.stacked:
        leaf, factors = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), (leaf, factors)
        )
    kernel = merged_kernel(leaf, factors, lora) if factors else leaf
    return _transpose(kernel, source.transposed)

"""Parameters between published files and devices, one published tensor in host memory at a time.

Parameters of the layers are stacked on a leading axis where published ones are a tensor a layer,
and our kernels are [in, out] where published ones are [out, in]. The devices stack and transpose:
on the host one kernel of all layers of an 8B model would be 3 GB. Arrays may span several
processes, each of which then calls the same functions in the same order.
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
    """The published tensor of a parameter; '{layer}' in its name means one tensor a layer."""

    name: str
    transposed: bool = False  # published kernels are [out, in], ours [in, out]

    @property
    def stacked(self) -> bool:
        return '{layer}' in self.name

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the published tensors, in order, of a parameter of this shape."""
        layers, one = (shape[0], shape[1:]) if self.stacked else (1, shape)
        one = one[::-1] if self.transposed else one
        return {self.name.format(layer=layer): one for layer in range(layers)}


def read_parameter(files: Mapping[str, safe_open], source: Source, leaf: Any) -> Any:
    """Reads a parameter; each process reads only what its devices hold.

    Args:
      files: tensor name -> the open file that holds it, in the shape that `leaf` implies.
      source: the tensors it comes from.
      leaf: what it becomes, from `abstract_params`; without a sharding, a host array. A quantised
        kernel is quantised tensor by tensor, on the devices, and has to have shardings.

    Returns:
      The parameter, bit for bit as stored unless `leaf` has another type.
    """
    shapes = source.shapes(leaf.shape)
    # The codes of a quantised kernel lie as the kernel would.
    sharding = leaf.qvalue.sharding if is_quantized(leaf) else leaf.sharding
    if sharding is None:
        tensors = [files[name].get_tensor(name).astype(leaf.dtype) for name in shapes]
        tensors = [tensor.T if source.transposed else tensor for tensor in tensors]
        return np.stack(tensors) if source.stacked else tensors[0]
    # The tensor's own axes lie as those of the parameter do.
    spec = sharding.spec[1:] if source.stacked else sharding.spec
    spread = NamedSharding(sharding.mesh, P(*(spec[::-1] if source.transposed else spec)))
    tensors = (
        _read_tensor(files[name], name, shape, leaf.dtype, spread) for name, shape in shapes.items()
    )
    if not source.stacked:
        own = jax.jit(_own_order, static_argnums=1, out_shardings=sharding)
        return own(next(tensors), source.transposed)
    where = jax.tree.map(lambda part: part.sharding, leaf)
    stacked = jax.tree.map(_zeros, leaf)
    place = jax.jit(_place, static_argnums=3, donate_argnums=0, out_shardings=where)
    for layer, tensor in enumerate(tensors):
        stacked = place(stacked, tensor, layer, source.transposed)
        jax.block_until_ready(stacked)  # else reading runs ahead of it, and tensors pile up
    return stacked


def published_tensors(
    source: Source,
    leaf: Array,
    factors: Mapping[str, Array] | None = None,
    lora: LoRA | None = None,
) -> dict[str, Tensor]:
    """What a parameter is written as; a tensor is gathered, and merged, when it is fetched.

    Args:
      source: the tensors it becomes.
      leaf: the parameter, on any devices of any processes.
      factors: 'a' and 'b' of its adapter, to merge into it, on the same devices; None for none.
      lora: their sizes.
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
    """One published tensor on the devices; replicas of a part share one reading of it."""
    parts: dict[tuple[Any, ...], np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((one.start, one.stop) for one in index)
        if key not in parts:
            parts[key] = file.get_slice(name)[index].astype(dtype, copy=False)
        return parts[key]

    tensor = jax.make_array_from_callback(shape, sharding, read)
    return tensor.block_until_ready()  # what it was read into is free from here on


def _gather(
    leaf: Array,
    factors: Mapping[str, Array] | None,
    layer: int,
    source: Source,
    lora: LoRA | None,
) -> np.ndarray:
    """One published tensor, whole, in the memory of every process."""
    tensor = jax.jit(_take, static_argnums=(3, 4))(leaf, factors, layer, source, lora)
    return multihost_utils.process_allgather(tensor, tiled=True)


# At the level of the module: a function made anew is compiled anew.
def _own_order(tensor: Array, transposed: bool) -> Array:
    return tensor.T if transposed else tensor


def _zeros(leaf: jax.ShapeDtypeStruct) -> Array:
    make = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=leaf.sharding)
    return make(leaf.shape, leaf.dtype)


def _place(stacked: Any, tensor: Array, layer: Array, transposed: bool) -> Any:
    one = _own_order(tensor, transposed)
    if is_quantized(stacked):
        one = quantize(one, stacked.qtype)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return jax.tree.map(put, stacked, one)


def _take(
    leaf: Array,
    factors: Mapping[str, Array] | None,
    layer: Array,
    source: Source,
    lora: LoRA | None,
) -> Array:
    if source.stacked:  # first of all: merging a stack would take float32 copies of all its layers
        leaf, factors = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), (leaf, factors)
        )
    one = merged_kernel(leaf, factors, lora) if factors else leaf
    return _own_order(one, source.transposed)

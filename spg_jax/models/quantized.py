"""A frozen base in few bits (QLoRA, arXiv 2305.14314), through the library qwix: extra 'quantize'.

A kernel [in, out] becomes a `qwix.QArray`: codes `qvalue` [in, out], and `scale` [in / tile, out]
float32, one number for each tile of inputs of each output. Codes and scales are split over devices
as the kernel would be.
"""

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

# Name of a format -> longest tile; 0 means the whole column. The published NF4 has tiles of 64.
FORMATS = {'int8': 0, 'int4': 64, 'nf4': 64}


def check_format(name: str) -> None:
    """Raises ValueError unless kernels can be stored in the format; '' leaves them as they are."""
    if name and name not in FORMATS:
        raise ValueError(f"model.quantize is {name!r}; use one of {', '.join(FORMATS)}, or ''")
    if name and not importlib.util.find_spec('qwix'):
        raise ValueError(
            f"model.quantize is {name!r} but qwix is not installed; pip install -e '.[quantize]'"
        )


def is_quantized(x: Any) -> bool:
    """Whether a node of a tree is a `qwix.QArray`. It can be asked without qwix installed."""
    return hasattr(x, 'qvalue')


def quantize(kernel: Array, name: str) -> Any:
    """The `qwix.QArray` of a kernel [..., in, out], in equal tiles as long as the format allows."""
    import qwix

    tile = math.gcd(kernel.shape[-2], FORMATS[name]) if FORMATS[name] else kernel.shape[-2]

    def quantize_column(column: Array) -> qwix.QArray:
        return qwix.quantize(column, name, tiled_axes={0: tile})

    # Columns are quantised one by one, because qwix flattens its argument for NF4, which would
    # gather a kernel that is split over devices.
    quantize_kernel = jax.vmap(quantize_column, in_axes=1, out_axes=1)
    for _ in kernel.shape[:-2]:
        quantize_kernel = jax.vmap(quantize_kernel)
    # In float32, because a quotient in bfloat16 would be rounded once before the code rounds it.
    return quantize_kernel(kernel.astype(jnp.float32))


def dequantize(kernel: Any) -> Array:
    """The float32 kernel [in, out] that a `qwix.QArray` stands for."""
    import qwix

    if kernel.qtype != 'nf4':
        return qwix.dequantize(kernel)
    # Comparisons with each code replace the look-up of qwix: a TPU looks up one element at a time,
    # and a kernel that is split would be gathered first.
    codes_of_levels = jnp.arange(16, dtype=jnp.uint4)
    levels = qwix.dequantize(qwix.QArray(codes_of_levels, jnp.ones(1), qtype='nf4'))  # [16]
    codes = kernel.qvalue.astype(jnp.int32)  # [in, out]
    values = jnp.full(codes.shape, levels[0])  # [in, out]
    for code in range(1, 16):
        values = jnp.where(codes >= code, levels[code], values)
    tiles = values.reshape(len(kernel.scale), -1, values.shape[-1])  # [in / tile, tile, out]
    return (tiles * kernel.scale[:, None]).reshape(values.shape)


def initializer(std: float, axes: tuple[str, ...], name: str) -> nn.initializers.Initializer:
    """Initialiser of a quantised kernel with normal values; codes and scales name their axes."""
    tile_axes = (*axes[:-2], f'{axes[-2]}_tiles', axes[-1])

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
        kernel = quantize(nn.initializers.normal(std)(key, shape, dtype), name)
        return kernel.replace(
            qvalue=nn.LogicallyPartitioned(kernel.qvalue, axes),
            scale=nn.LogicallyPartitioned(kernel.scale, tile_axes),
        )

    return init


def quantize_params(params: Any, target: Any) -> Any:
    """Parameters with the kernels quantised that `target` has quantised, in its shardings.

    `params` stays in memory beside the result, so this function is for the small policies trained
    here. Published kernels are quantised one by one while they are read.

    Args:
      params: plain parameter pytree.
      target: from `abstract_params` of the quantised model.
    """

    def convert(target_leaf: Any, leaf: Array) -> Any:
        if not is_quantized(target_leaf):
            return leaf
        shardings = jax.tree.map(lambda part: part.sharding, target_leaf)
        place = jax.jit(quantize, static_argnums=1, out_shardings=shardings)
        return place(leaf, target_leaf.qtype)

    return jax.tree.map(convert, target, params, is_leaf=is_quantized)

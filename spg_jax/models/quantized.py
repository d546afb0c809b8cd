"""A frozen base in few bits (QLoRA, arXiv 2305.14314), through the library qwix: extra 'quantize'.

A kernel [in, out] becomes a `qwix.QArray`: codes `qvalue` [in, out], and `scale` [in / tile, out]
float32, one for each tile of inputs of each output. Codes and scales are split over devices as the
kernel was.
"""

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

# Name of a format -> longest tile, 0 for the whole column. 64 is that of the published NF4.
FORMATS = {'int8': 0, 'int4': 64, 'nf4': 64}


def check_format(name: str) -> None:
    """Raises ValueError unless kernels can be kept so; '' is as they are."""
    if name and name not in FORMATS:
        raise ValueError(f"model.quantize is {name!r}; use one of {', '.join(FORMATS)}, or ''")
    if name and not importlib.util.find_spec('qwix'):
        raise ValueError(
            f"model.quantize is {name!r} but qwix is not installed; pip install -e '.[quantize]'"
        )


def is_quantized(x: Any) -> bool:
    """Whether a node of a tree is a `qwix.QArray`; qwix need not be installed."""
    return hasattr(x, 'qvalue')


def quantize(kernel: Array, name: str) -> Any:
    """The `qwix.QArray` of a kernel [..., in, out], in tiles that `in` is a multiple of."""
    import qwix

    tile = math.gcd(kernel.shape[-2], FORMATS[name]) if FORMATS[name] else kernel.shape[-2]

    def of_column(column: Array) -> qwix.QArray:
        return qwix.quantize(column, name, tiled_axes={0: tile})

    # By columns: for NF4 qwix flattens what it gets, which would gather a kernel that is split.
    of_kernel = jax.vmap(of_column, in_axes=1, out_axes=1)
    for _ in kernel.shape[:-2]:
        of_kernel = jax.vmap(of_kernel)
    # In float32: a quotient in bfloat16 would be rounded before it is rounded to a code.
    return of_kernel(kernel.astype(jnp.float32))


def dequantize(kernel: Any) -> Array:
    """The float32 kernel [in, out] that a `qwix.QArray` stands for."""
    import qwix

    if kernel.qtype != 'nf4':
        return qwix.dequantize(kernel)
    # Comparisons with each code in place of qwix's look-up: TPUs look up one element at a time,
    # and where a kernel is split it would be gathered first.
    codes = jnp.arange(16, dtype=jnp.uint4)
    levels = qwix.dequantize(qwix.QArray(codes, jnp.ones(1), qtype='nf4'))
    found = kernel.qvalue.astype(jnp.int32)
    values = jnp.full(found.shape, levels[0])
    for code in range(1, 16):
        values = jnp.where(found >= code, levels[code], values)
    tiles = values.reshape(len(kernel.scale), -1, values.shape[-1])
    return (tiles * kernel.scale[:, None]).reshape(values.shape)


def initializer(std: float, axes: tuple[str, str], name: str) -> nn.initializers.Initializer:
    """Quantised normal values, codes and scales each with their logical axes."""

    def init(key: Array, shape: tuple[int, int], dtype: Any) -> Any:
        kernel = quantize(nn.initializers.normal(std)(key, shape, dtype), name)
        return kernel.replace(
            qvalue=nn.LogicallyPartitioned(kernel.qvalue, axes),
            scale=nn.LogicallyPartitioned(kernel.scale, (f'{axes[0]}_tiles', axes[1])),
        )

    return init


def quantize_params(params: Any, target: Any) -> Any:
    """Parameters with kernels quantised where `target` has them so, placed as there.

    Args:
      params: plain parameter pytree. It stays whole beside the result, so this is for the small
        policies trained here; published kernels are quantised one by one as they are read.
      target: from `abstract_params` of the quantised model.
    """

    def convert(like: Any, leaf: Array) -> Any:
        if not is_quantized(like):
            return leaf
        where = jax.tree.map(lambda part: part.sharding, like)
        return jax.jit(quantize, static_argnums=1, out_shardings=where)(leaf, like.qtype)

    return jax.tree.map(convert, target, params, is_leaf=is_quantized)

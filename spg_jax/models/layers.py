"""The parts of a transformer block: products, norms, rotary positions, the gated activation.

A comment such as `# [B, L, H]` after an assignment is the shape of the value: `B` sequences, `L`
length, `D` width, `N` heads, `H` head dim; `in` and `features` are the two sides of a kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from spg_jax.models import quantized
from spg_jax.models.lora import ADAPTER, Adapter, LoRA


class Linear(nn.Module):
    """Product with a kernel [in, features] of initial std gain / sqrt(in), without a bias.

    If the name of the module is a target of `lora`, an adapter adds its product. With `quantize`
    the kernel is stored in that format.
    """

    features: int
    axes: tuple[str, str]
    gain: float = 1.0
    dtype: str = 'float32'
    param_dtype: str = 'float32'
    lora: LoRA | None = None
    quantize: str = ''

    @nn.compact
    def __call__(self, x: Array, dropout: Array | None = None) -> Array:
        """[B, L, in] -> [B, L, features] in the compute dtype; `dropout` as in `Adapter`."""
        fan_in = x.shape[-1]
        std = self.gain * fan_in**-0.5
        if self.quantize:
            init = quantized.initializer(std, self.axes, self.quantize)
        else:
            init = normal(std, *self.axes)
        kernel = self.param('kernel', init, (fan_in, self.features), self.param_dtype)
        if self.quantize:
            y = quantized_product(x, kernel, self.dtype)  # [B, L, features]
        else:
            y = product(x, kernel.astype(self.dtype))
        if self.lora is None or self.name not in self.lora.targets:
            return y
        adapter = Adapter(self.features, self.axes, self.lora, self.name, self.dtype, name=ADAPTER)
        return y + adapter(x, dropout)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32, returned in the compute dtype."""

    eps: float
    dtype: str = 'float32'
    param_dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ('norm',))
        scale = self.param('scale', ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
        return (x * scale).astype(self.dtype)


def product(x: Array, kernel: Array, dtype: jnp.dtype | None = None) -> Array:
    """[..., in] times [in, out] -> [..., out], accumulated and returned in dtype.

    The leading axes of x are flattened, so that the gradient of the kernel is a product of two
    matrices. For arrays of three axes the CPU compiler would first transpose both operands in
    memory.
    """
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def quantized_product(x: Array, kernel: Any, dtype: str) -> Array:
    """The product of x with a quantised kernel.

    The backward pass dequantises the kernel again. Otherwise the scan over layers would keep the
    dequantised kernels of all layers until then.
    """
    return product(x, quantized.dequantize(kernel).astype(dtype))


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up. The backward pass keeps the two inputs and no other array of their size."""
    return nn.silu(gate) * up


def rotary_table(valid: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, each [B, L, H/2] float32.

    They are computed once for all layers, and once for each position rather than for every row: on
    CPUs the sines of [B, L, H/2] in each layer would cost as much as attention itself.

    Args:
      valid: [B, L] bool, False on padding, whose angles do not matter: nothing attends to it.
      head_dim: H, even.
      theta: base of the geometric series of wavelengths.
    """
    index = jnp.arange(valid.shape[-1])  # [L]
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [H/2]
    angles = index.astype(jnp.float32)[:, None] * frequency[None, :]  # [L, H/2]
    position = positions(valid)  # [B, L]
    return jnp.cos(angles)[position], jnp.sin(angles)[position]


def positions(valid: Array) -> Array:
    """Positions [B, L] int32, counted from the first valid token of a row; 0 on left padding."""
    index = jnp.arange(valid.shape[-1])  # [L]
    return jnp.maximum(index[None, :] - jnp.argmax(valid, axis=-1)[:, None], 0)


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """x [B, L, N, H] with its pairs (i, i + H/2) rotated by the angles of `rotary_table`.

    The rotation is in float32, because bfloat16 has 8 bits and would not tell positions beyond 256
    apart. The result has the dtype of x.
    """
    cos, sin = (table[:, :, None, :] for table in rotary)  # [B, L, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, L, N, H/2]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def normal(std: float, *axes: str) -> nn.initializers.Initializer:
    """Initialiser that draws normal values for a parameter with the given logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)

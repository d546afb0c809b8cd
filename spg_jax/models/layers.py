"""The parts of a transformer block: products, norms, rotary positions, the gated activation.

Shapes: `B` sequences, `L` length, `N` heads, `H` head dim.
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
    """Product with a kernel [in, features], no bias; initial std gain / sqrt(in).

    With `lora`, and if the module's name is one of its targets, an adapter adds its own product.
    With `quantize` the kernel is kept in that format.
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
            y = quantized_product(x, kernel, self.dtype)
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

    Flattened to two axes: the kernel's gradient is then one plain product. With three, the CPU
    compiler writes a transposed copy of both operands first.
    """
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def quantized_product(x: Array, kernel: Any, dtype: str) -> Array:
    """The product with a quantised kernel; the backward pass dequantises again, or the scan over
    layers would keep every layer's kernel for it."""
    return product(x, quantized.dequantize(kernel).astype(dtype))


@functools.partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up; the backward keeps only the two inputs, not more arrays of their size."""
    return nn.silu(gate) * up


def rotary_table(valid: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, each [B, L, H/2] float32.

    Computed once for all layers, and looked up by position rather than computed for every row: on
    CPU sines of [B, L, H/2] in each layer would cost as much as the attention itself.

    Args:
      valid: [B, L] bool, False on padding, which is never attended to wherever it is.
      head_dim: H, even.
      theta: base of the geometric series of wavelengths.
    """
    index = jnp.arange(valid.shape[-1])
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = index.astype(jnp.float32)[:, None] * frequency[None, :]
    position = positions(valid)
    return jnp.cos(angles)[position], jnp.sin(angles)[position]


def positions(valid: Array) -> Array:
    """[B, L] int32, counted from the first valid token of a row; 0 on left padding."""
    index = jnp.arange(valid.shape[-1])
    return jnp.maximum(index[None, :] - jnp.argmax(valid, axis=-1)[:, None], 0)


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Rotate the pairs (i, i + H/2) of x [B, L, N, H] in float32; the dtype of x is kept.

    Bfloat16 has 8 bits: a rotation in it would blur positions beyond 256 into each other.
    """
    cos, sin = (table[:, :, None, :] for table in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def normal(std: float, *axes: str) -> nn.initializers.Initializer:
    """Normal initialiser of a parameter with these logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)

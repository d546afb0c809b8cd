"""The parts of a transformer block: products, norms, rotary positions, the gated activation.

A comment such as `# [B, L, H]` after an assignment is the shape of the value: `B` sequences, `L`
length, `D` width, `N` heads, `H` head dim; `in` and `features` are the two sides of a kernel.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from spg_jax.models import quantized
from spg_jax.models.lora import ADAPTER, Adapter, LoRA
from spg_jax.models.visibility import Visibility

# Sides of a kernel from which its gradient is faster with its inputs transposed in memory.
WIDE = 256


class Linear(nn.Module):
    """Product with a kernel [in, features] of initial std gain / sqrt(in), by default without bias.

    If the name of the module is a target of `lora`, an adapter adds its product. With `quantize`
    the kernel is stored in that format. `transposes` is an argument of `product`.
    """

    features: int
    axes: tuple[str, str]
    gain: float = 1.0
    dtype: str = 'float32'
    param_dtype: str = 'float32'
    lora: LoRA | None = None
    quantize: str = ''
    bias: bool = False
    transposes: bool = False

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
            y = product(x, kernel.astype(self.dtype), transposes=self.transposes)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            bias = self.param('bias', zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)[None, None, :]
        if self.lora is None or not self.lora.adapts(self.name):
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


def product(
    x: Array, kernel: Array, dtype: jnp.dtype | None = None, transposes: bool = False
) -> Array:
    """[..., in] times [in, out] -> [..., out], accumulated and returned in dtype.

    The leading axes of x are flattened, so that the gradient of the kernel is a product of two
    matrices. For arrays of three axes the CPU compiler would first transpose both operands in
    memory.

    Args:
      x, kernel: the operands.
      dtype: of the result; None is theirs.
      transposes: whether the gradient of a kernel with two sides of `WIDE` or more is computed by
        `_transposing_product`. It has no derivatives in forward mode.
    """
    flat = x.reshape(-1, x.shape[-1])  # [R, in]
    if transposes and min(kernel.shape) >= WIDE:
        flat = _transposing_product(flat, kernel, dtype)  # [R, out]
    else:
        flat = jnp.matmul(flat, kernel, preferred_element_type=dtype)  # [R, out]
    return flat.reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _transposing_product(x: Array, kernel: Array, dtype: jnp.dtype | None) -> Array:
    """[R, in] times [in, out], whose gradient by the kernel reads x transposed in memory.

    XLA on CPUs has a library of fast products that takes no transposed left operand, so that the
    product x^T dy would be left to a slower one (docs/performance.md).
    """
    return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _keep_operands(x: Array, kernel: Array, dtype: jnp.dtype | None) -> tuple[Array, Any]:
    return _transposing_product(x, kernel, dtype), (x, kernel)


def _gradients(
    dtype: jnp.dtype | None, operands: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    """Gradients of x [R, in] and kernel [in, out] from that of the product, dy [R, out]."""
    x, kernel = operands
    # Without the barrier the compiler would make one operation of transposition and product again.
    transposed = jax.lax.optimization_barrier(x.T)  # [in, R]
    dx = jnp.matmul(dy, kernel.T).astype(x.dtype)
    return dx, jnp.matmul(transposed, dy).astype(kernel.dtype)


_transposing_product.defvjp(_keep_operands, _gradients)


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


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch their rotary wavelengths ("llama3" in rope_scaling).

    Wavelengths above original_length / low_factor are multiplied by `factor`, those below
    original_length / high_factor stay, and those between are interpolated.

    Raises:
      ValueError: from the constructor, for an impossible value; it says what to use instead.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_length: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_factor < self.high_factor):
            raise ValueError(
                f'rope_scaling has factor {self.factor}, low_freq_factor {self.low_factor} and '
                f'high_freq_factor {self.high_factor}; use a factor of at least 1, and a low '
                'factor above 0 and below the high one'
            )
        if self.original_length < 1:
            raise ValueError(
                f'rope_scaling.original_max_position_embeddings is {self.original_length}; use a '
                'positive integer'
            )

    def scaled(self, frequency: Array) -> Array:
        """The frequencies [H/2] in radians for each position, scaled."""
        periods = self.original_length * frequency / (2 * math.pi)  # [H/2], in the original length
        share = (periods - self.low_factor) / (self.high_factor - self.low_factor)
        share = jnp.clip(share, 0.0, 1.0)  # [H/2], 1 where the wavelength stays
        return frequency * (share + (1 - share) / self.factor)


def rotary_table(
    valid: Array | Visibility, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles, each [B, L, H/2] float32.

    They are computed once for all layers, and once for each position rather than for every row: on
    CPUs the sines of [B, L, H/2] in each layer would cost as much as attention itself.

    Args:
      valid: [B, L] bool, False on padding, whose angles do not matter: nothing attends to it. A
        `Visibility` brings its own positions.
      head_dim: H, even; the rotated part of it where only a part is.
      theta: base of the geometric series of wavelengths.
      scaling: how the wavelengths are stretched; None leaves them.
    """
    length = (valid.valid if isinstance(valid, Visibility) else valid).shape[-1]
    index = jnp.arange(length)  # [L]
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [H/2]
    if scaling:
        frequency = scaling.scaled(frequency)
    angles = index.astype(jnp.float32)[:, None] * frequency[None, :]  # [L, H/2]
    if isinstance(valid, Visibility):
        position = jnp.broadcast_to(valid.positions, valid.valid.shape)  # [B, L]
    else:
        position = positions(valid)  # [B, L]
    return jnp.cos(angles)[position], jnp.sin(angles)[position]


def positions(valid: Array) -> Array:
    """Positions [B, L] int32, counted from the first valid token of a row; 0 on left padding."""
    index = jnp.arange(valid.shape[-1])  # [L]
    return jnp.maximum(index[None, :] - jnp.argmax(valid, axis=-1)[:, None], 0)


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """x [B, L, N, H] with its pairs (i, i + H/2) rotated by the angles of `rotary_table`.

    Where the table has fewer than H / 2 angles, only the first dimensions are rotated, and the
    others pass through.

    The rotation is in float32, because bfloat16 has 8 bits and would not tell positions beyond 256
    apart. The result has the dtype of x.
    """
    rotated_dims = 2 * rotary[0].shape[-1]
    if rotated_dims < x.shape[-1]:
        rotated_part = rotate(x[..., :rotated_dims], rotary)
        return jnp.concatenate([rotated_part, x[..., rotated_dims:]], axis=-1)
    cos, sin = (table[:, :, None, :] for table in rotary)  # [B, L, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, L, N, H/2]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def normal(std: float, *axes: str) -> nn.initializers.Initializer:
    """Initialiser that draws normal values for a parameter with the given logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)

"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen kernel W acts as W + alpha/rank A B.

Adapters live in a Flax collection of their own, 'lora', so that what is trained and what is frozen
are two trees. B starts at zero: an adapted policy begins as exactly the policy it adapts.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

COLLECTION = 'lora'
ADAPTER = 'adapter'  # name of the adapter beside its kernel
TARGETS = ('query', 'key', 'value', 'attention_out', 'gate', 'up', 'down')


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which kernels have adapters, and of what size.

    Raises:
      ValueError: from the constructor, naming the value that cannot be and what to use instead.
    """

    rank: int
    alpha: float  # the product A B is scaled by alpha / rank
    dropout: float = 0.0  # share of an adapter's inputs that training drops
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, 'targets', tuple(self.targets))  # lists come from JSON
        if self.rank < 1:
            raise ValueError(f'lora.rank is {self.rank}; use a positive integer')
        if not self.alpha > 0:
            raise ValueError(f'lora.alpha is {self.alpha}; use a positive number')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'lora.dropout is {self.dropout}; use a share of at least 0, below 1')
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f'lora.targets is {self.targets}; use some of {", ".join(TARGETS)}, each once'
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapter(nn.Module):
    """The low-rank product beside a kernel [in, features]: scale * drop(x) A B."""

    features: int
    axes: tuple[str, str]
    lora: LoRA
    target: str
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Array, dropout: Array | None = None) -> Array:
        """[B, L, in] -> [B, L, features] in the compute dtype.

        Args:
          x: input of the kernel.
          dropout: [B, L] keys, one a token; None drops nothing.
        """
        fan_in, rank = x.shape[-1], self.lora.rank
        # The initialisation PEFT uses: uniform with bound 1 / sqrt(in).
        bound = fan_in**-0.5
        a = self._factor('a', _uniform(bound), (fan_in, rank), (self.axes[0], 'rank'))
        zeros = nn.initializers.zeros_init()
        b = self._factor('b', zeros, (rank, self.features), ('rank', self.axes[1]))
        if dropout is not None and self.lora.dropout:
            x = self._drop(x, dropout)
        return x @ a.astype(self.dtype) @ (b * self.lora.scale).astype(self.dtype)

    def _factor(
        self,
        name: str,
        init: nn.initializers.Initializer,
        shape: tuple[int, int],
        axes: tuple[str, str],
    ) -> Array:
        boxed = nn.with_logical_partitioning(init, axes)
        return self.variable(
            COLLECTION, name, lambda: boxed(self.make_rng('params'), shape, jnp.float32)
        ).value

    def _drop(self, x: Array, keys: Array) -> Array:
        keep = 1.0 - self.lora.dropout

        def kept_of(key: Array) -> Array:
            own = jax.random.fold_in(key, TARGETS.index(self.target))
            return jax.random.bernoulli(own, keep, x.shape[2:])

        kept = jax.vmap(jax.vmap(kept_of))(keys)
        return jnp.where(kept, x / keep, 0).astype(x.dtype)


def merged_kernel(kernel: Array, factors: Mapping[str, Array], lora: LoRA) -> Array:
    """The kernel that acts as the adapted one does: kernel + scale A B.

    Args:
      kernel: [..., in, out], frozen; of one layer, or stacked over layers.
      factors: 'a' [..., in, rank] and 'b' [..., rank, out] of its adapter, stacked as it is.
      lora: their sizes.

    Returns:
      [..., in, out] in the type of `kernel`; the sum is taken in float32.
    """
    product = jnp.einsum('...ir,...ro->...io', factors['a'], factors['b'])
    return (kernel.astype(jnp.float32) + lora.scale * product).astype(kernel.dtype)


def _uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform over [-bound, bound]."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)

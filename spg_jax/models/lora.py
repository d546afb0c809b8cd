"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen kernel W acts as W + alpha/rank A B.

Adapters have a Flax collection of their own, 'lora', so that trained and frozen parameters are two
trees. The factor B starts at zero, so that an adapted policy starts as exactly the policy that it
adapts.

A comment such as `# [in, rank]` after an assignment is the shape of the value: `B` sequences, `L`
length, `in` and `features` (or `out`) the two sides of a kernel.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

COLLECTION = 'lora'
ADAPTER = 'adapter'  # name of an adapter in the tree, beside its kernel
TARGETS = ('query', 'key', 'value', 'attention_out', 'gate', 'up', 'down')
# Some models have queries, keys and values in one kernel, which has one adapter for all three.
FUSED = 'query_key_value'
FUSED_TARGETS = ('query', 'key', 'value')
SHARED = 'shared_'  # prefix of the kernels of an expert that every token visits


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which kernels have adapters, and the size of the adapters.

    Raises:
      ValueError: from the constructor, for an impossible value; it says what to use instead.
    """

    rank: int
    alpha: float  # the product A B is multiplied by alpha / rank
    dropout: float = 0.0  # share of an adapter's inputs that training drops
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        object.__setattr__(self, 'targets', tuple(self.targets))  # JSON yields a list
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

    def adapts(self, kernel: str) -> bool:
        """Whether the kernel of that name has an adapter."""
        return bool(set(targets_of(kernel)) & set(self.targets))

    def for_kernels(self, kernels: Iterable[str]) -> 'LoRA':
        """The adapters without the targets that stand for none of the kernels of a model.

        Raises:
          ValueError: if no target is left.
        """
        possible = {target for kernel in kernels for target in targets_of(kernel)}
        targets = tuple(target for target in self.targets if target in possible)
        if not targets:
            raise ValueError(
                f'lora.targets is {self.targets}, of which this model has none; use some of '
                f'{", ".join(target for target in TARGETS if target in possible)}'
            )
        return dataclasses.replace(self, targets=targets)


def targets_of(kernel: str) -> tuple[str, ...]:
    """The names of TARGETS that stand for a kernel; a fused kernel stands for three of them."""
    return FUSED_TARGETS if kernel == FUSED else (kernel.removeprefix(SHARED),)


class Adapter(nn.Module):
    """The low-rank product scale * drop(x) A B, which is added to that of a kernel [in, features].

    Attributes:
      features: width of the output.
      axes: logical axes of the kernel.
      lora: rank, alpha and dropout.
      target: name of the kernel.
      dtype: the compute dtype.
    """

    features: int
    axes: tuple[str, str]
    lora: LoRA
    target: str
    dtype: str = 'float32'

    @nn.compact
    def __call__(self, x: Array, dropout: Array | None = None) -> Array:
        """[B, L, in] -> [B, L, features] in the compute dtype.

        Args:
          x: the input of the kernel.
          dropout: [B, L] keys, one for each token; None drops nothing.
        """
        fan_in, rank = x.shape[-1], self.lora.rank
        # PEFT initialises the first factor in the same way: uniform with bound 1 / sqrt(in).
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
        """The factor of the given name and shape, from the collection 'lora'."""
        boxed = nn.with_logical_partitioning(init, axes)
        return self.variable(
            COLLECTION, name, lambda: boxed(self.make_rng('params'), shape, jnp.float32)
        ).value

    def _drop(self, x: Array, keys: Array) -> Array:
        """x [B, L, in] with random entries dropped by the keys [B, L] and the others scaled up.

        An entry is dropped by 16 random bits, so that the rate is a multiple of 2^-16.
        """
        dropped = min(round(self.lora.dropout * 2**16), 2**16 - 1)  # of 2^16 values
        keep_rate = 1.0 - dropped / 2**16
        fan_in = x.shape[-1]

        def keep_mask(token_key: Array) -> Array:
            """[in] bool, independent for each target."""
            key = jax.random.fold_in(token_key, TARGETS.index(targets_of(self.target)[0]))
            # Two entries share 32 bits. That halves the draws, and the compiler for TPUs does not
            # move a concatenation into the product that follows. With the draws in it, the code of
            # the product is so long that an update takes many minutes to compile.
            bits = jax.random.bits(key, (-(-fan_in // 2),))
            halves = jnp.concatenate([bits >> 16, bits & 0xFFFF])[:fan_in]
            return halves.astype(jnp.int32) >= dropped

        keep = jax.vmap(jax.vmap(keep_mask))(keys)  # [B, L, in]
        return jnp.where(keep, x / keep_rate, 0).astype(x.dtype)


def merged_kernel(kernel: Array, factors: Mapping[str, Array], lora: LoRA) -> Array:
    """The single kernel that acts as a kernel with its adapter: kernel + scale A B.

    Args:
      kernel: [..., in, out], of one layer or stacked over layers.
      factors: 'a' [..., in, rank] and 'b' [..., rank, out] of its adapter, with the same leading
        axes.
      lora: the size of the adapter.

    Returns:
      [..., in, out] in the dtype of `kernel`; the sum is taken in float32.
    """
    product = jnp.einsum('...ir,...ro->...io', factors['a'], factors['b'])  # [..., in, out]
    return (kernel.astype(jnp.float32) + lora.scale * product).astype(kernel.dtype)


def _uniform(bound: float) -> nn.initializers.Initializer:
    """Initialiser that draws uniformly from [-bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)

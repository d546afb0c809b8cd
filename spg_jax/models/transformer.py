"""The denoiser: a bidirectional pre-norm transformer with the blocks of LLaDA (arXiv 2502.09992).

Shapes: `B` sequences, `L` length, `V` vocabulary, `D` width, `N` heads, `K` key/value heads, `H`
head dim, `F` MLP width. Hidden states and logits are separate methods because logits are the
memory: callers slice the hidden states to the positions they score before unembedding them.

Each parameter names its logical axes where it is created; `spg_jax.sharding` maps them to mesh
axes. Parameters of the layers are stacked on a leading 'layers' axis, which `nn.scan` walks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from spg_jax.models.attention import attention, check_implementation
from spg_jax.models.layers import (
    Linear,
    RMSNorm,
    normal,
    positions,
    product,
    rotary_table,
    rotate,
    swiglu,
)
from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.quantized import check_format
from spg_jax.sharding import constrain

DTYPES = ('float32', 'bfloat16')
# Fields of `TransformerConfig` that say how to compute, not what; a policy is saved without them.
EXECUTION = ('remat', 'scan_unroll', 'attention', 'quantize')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that fixes the shapes and arithmetic of a `Transformer`.

    Raises:
      ValueError: from the constructor, naming the value that cannot be and what to use instead.
    """

    vocab_size: int  # rows of the embedding table, MASK included
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # unembed with the embedding table
    scale_logits: bool = False  # logits * width**-0.5
    dtype: str = 'float32'  # of activations; norms, rotary, softmax and logits are always float32
    param_dtype: str = 'float32'
    remat: bool = False  # recompute each layer in the backward pass
    scan_unroll: int = 1  # layers per iteration of the scan; all of them is fastest on CPU
    attention: str = 'einsum'  # see models.attention
    lora: LoRA | None = None  # adapters beside frozen kernels
    quantize: str = ''  # format of those kernels, see models.quantized; '' is param_dtype

    def __post_init__(self):
        for name in (
            'vocab_size',
            'width',
            'layers',
            'heads',
            'kv_heads',
            'mlp_width',
            'scan_unroll',
        ):
            if getattr(self, name) < 1:
                raise ValueError(f'model.{name} is {getattr(self, name)}; use a positive integer')
        if self.width % self.heads:
            raise ValueError(
                f'model.width {self.width} is not a multiple of model.heads {self.heads}; '
                f'use width {-(-self.width // self.heads) * self.heads}'
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f'model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}; '
                f'use kv_heads {self.heads} for one key/value head a query head'
            )
        if self.head_dim % 2:
            raise ValueError(
                f'model.width {self.width} over model.heads {self.heads} gives head dim '
                f'{self.head_dim}, rotary positions need an even one; change either'
            )
        for name in ('dtype', 'param_dtype'):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f'model.{name} is {getattr(self, name)!r}; use one of {", ".join(DTYPES)}'
                )
        for name in ('rope_theta', 'norm_eps'):
            if not getattr(self, name) > 0:
                raise ValueError(f'model.{name} is {getattr(self, name)}; use a positive number')
        check_implementation(self.attention)
        check_format(self.quantize)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def check_heads(config: TransformerConfig, mesh: Mesh) -> None:
    """Raises ValueError unless every device of the mesh gets whole heads."""
    tensor = mesh.shape['tensor']
    for name in ('heads', 'kv_heads'):
        heads = getattr(config, name)
        if heads % tensor:
            raise ValueError(
                f'mesh.tensor is {tensor}, which does not divide the {heads} model.{name}; use one '
                'that does, and more of mesh.fsdp or mesh.data'
            )


class Transformer(nn.Module):
    """Predicts every token of a partly masked sequence from all the others."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.embedding = self.param(
            'embedding',
            normal(_embedding_std(config), 'vocab', 'embed'),
            (config.vocab_size, config.width),
            config.param_dtype,
        )
        # A loop keeps the compiler from merging the recomputation with the forward pass by itself.
        prevent_cse = config.scan_unroll >= config.layers
        block = nn.remat(Block, prevent_cse=prevent_cse) if config.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={'params': 0, COLLECTION: 0},
            split_rngs={'params': True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=config.layers,
            unroll=config.scan_unroll,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )(config)
        self.final_norm = RMSNorm(config.norm_eps, config.dtype, config.param_dtype)
        if not config.tie_embeddings:
            self.unembedding = self.param(
                'unembedding',
                normal(config.width**-0.5, 'embed', 'vocab'),
                (config.width, config.vocab_size),
                config.param_dtype,
            )

    def __call__(self, tokens: Array, valid: Array) -> Array:
        """Logits [B, L, V] float32 of every position: `unembed(hidden(tokens, valid))`."""
        return self.unembed(self.hidden(tokens, valid))

    def hidden(self, tokens: Array, valid: Array, dropout: Array | None = None) -> Array:
        """Final hidden states, after the last norm.

        Args:
          tokens: [B, L] int32 in [0, V); those on padding are ignored.
          valid: [B, L] bool, False on padding. Positions count from the first valid token of a row.
          dropout: [B] keys of the adapters' dropout, one a row; None drops nothing.

        Returns:
          [B, L, D] in the compute dtype; finite but meaningless where not valid.
        """
        config = self.config
        # Whole along 'embed': tokens are split over 'fsdp' too, and a lookup cannot be over both.
        table = constrain(self.embedding.astype(config.dtype), 'vocab', None)
        x = jnp.take(table, tokens, axis=0)
        x = constrain(x, 'rows', None, None)
        rotary = rotary_table(valid, config.head_dim, config.rope_theta)
        if dropout is not None:
            dropout = _token_keys(dropout, valid, config.layers)
        x, _ = self.layers(x, rotary, valid, dropout)
        return self.final_norm(x)

    def unembed(self, hidden: Array) -> Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        config = self.config
        table = self.embedding.T if config.tie_embeddings else self.unembedding
        logits = product(hidden, table.astype(config.dtype), jnp.float32)
        return logits * config.width**-0.5 if config.scale_logits else logits


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). A scan body: carry x, no output."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, rotary: tuple[Array, Array], valid: Array, dropout: Array | None
    ) -> tuple[Array, None]:
        """x: [B, L, D]; rotary: cos and sin, [B, L, H/2]; valid: [B, L] bool; dropout: [B, L]."""
        config = self.config
        B, L, D = x.shape
        N, K, H = config.heads, config.kv_heads, config.head_dim
        types = {'dtype': config.dtype, 'param_dtype': config.param_dtype}
        linear = functools.partial(Linear, **types, lora=config.lora, quantize=config.quantize)
        norm = functools.partial(RMSNorm, config.norm_eps, **types)
        # Two additions a layer: with this the residual keeps its scale whatever the depth.
        residual_gain = (2 * config.layers) ** -0.5

        h = norm(name='attention_norm')(x)
        q = linear(N * H, ('embed', 'heads'), name='query')(h, dropout).reshape(B, L, N, H)
        k = linear(K * H, ('embed', 'kv_heads'), name='key')(h, dropout).reshape(B, L, K, H)
        v = linear(K * H, ('embed', 'kv_heads'), name='value')(h, dropout).reshape(B, L, K, H)
        mixed = attention(rotate(q, rotary), rotate(k, rotary), v, valid, config.attention)
        x = x + linear(D, ('heads', 'embed'), residual_gain, name='attention_out')(
            mixed.reshape(B, L, N * H), dropout
        )

        h = norm(name='mlp_norm')(x)
        gate = linear(config.mlp_width, ('embed', 'mlp'), name='gate')(h, dropout)
        up = linear(config.mlp_width, ('embed', 'mlp'), name='up')(h, dropout)
        x = x + linear(D, ('mlp', 'embed'), residual_gain, name='down')(swiglu(gate, up), dropout)
        return constrain(x, 'rows', None, None), None


def _token_keys(row_keys: Array, valid: Array, layers: int) -> Array:
    """Keys [layers, B, L] from those of rows [B]. A token's depend on where it is in its row, not
    on how much padding precedes it."""

    def of_row(key: Array, position: Array) -> Array:
        own = jax.vmap(jax.random.fold_in, (None, 0))(key, position)
        return jax.vmap(lambda key: jax.random.split(key, layers), out_axes=1)(own)

    return jax.vmap(of_row, out_axes=1)(row_keys, positions(valid))


def _embedding_std(config: TransformerConfig) -> float:
    """1 where tied logits are scaled by width**-0.5, width**-1 where not; else width**-0.5.

    With 1 a token enters the residual stream as large as what the layers add to it, and small
    models learn far faster; each position starts by predicting the token it sees, and unlearns it.
    """
    if not config.tie_embeddings:
        return config.width**-0.5
    return 1.0 if config.scale_logits else 1 / config.width

"""The denoiser: a pre-norm transformer, by default that of LLaDA (arXiv 2502.09992), bidirectional.

Other published families differ from LLaDA in a few fields of `TransformerConfig`, which are off by
default: biases, norms of queries and keys, part of the head rotated, what a position sees, a shift
of the logits, and experts in place of the MLP. `spg_jax.models.families` sets them.

Hidden states and logits have separate methods because logits need the most memory: callers cut the
hidden states to the positions that they score, and unembed only those.

Each parameter names its logical axes where it is created; `spg_jax.sharding` maps them to mesh
axes. The parameters of all layers are stacked along a leading axis 'layers', which `nn.scan` walks.

A comment such as `# [B, L, D]` after an assignment is the shape of the value: `B` sequences, `L`
length, `V` vocabulary, `D` width, `N` heads, `K` key/value heads, `H` head dim, `F` MLP width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh

from spg_jax.errors import check_one_of
from spg_jax.models.attention import FOR_CPUS, attention, check_implementation
from spg_jax.models.attention import FUSED as FUSED_ATTENTION
from spg_jax.models.experts import Experts, RoutedExperts
from spg_jax.models.layers import (
    Linear,
    RMSNorm,
    RopeScaling,
    normal,
    positions,
    product,
    rotary_table,
    rotate,
    swiglu,
)
from spg_jax.models.lora import COLLECTION, FUSED, FUSED_TARGETS, SHARED, LoRA
from spg_jax.models.quantized import check_format
from spg_jax.models.visibility import Visibility
from spg_jax.models.windows import Window, cut, put
from spg_jax.sharding import RULES, constrain

DTYPES = ('float32', 'bfloat16')
# The largest sizes that are taken for meant. With larger ones the description of a model would not
# fit into memory, or take minutes to make.
LIMITS = {
    'vocab_size': 10**8,
    'width': 10**6,
    'layers': 10**4,
    'heads': 10**5,
    'kv_heads': 10**5,
    'mlp_width': 10**8,
    'scan_unroll': 10**4,
}
MOST_ROPE_THETA = 1e12  # a million times what published models have, and within float32
# Fields of `TransformerConfig` that say how to compute and not what; saved policies omit them.
EXECUTION = ('remat', 'scan_unroll', 'attention', 'quantize')


Cache = tuple[Array, Array]  # keys and values, [layers, B, L, K, H] or those of one layer
# Those of each layer. In one array all of it would be copied whenever one block of it changes.
LayerCaches = tuple[Cache, ...]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that fixes the shapes and arithmetic of a `Transformer`.

    Raises:
      ValueError: from the constructor, for an impossible value; it says what to use instead.
    """

    vocab_size: int  # V, the rows of the embedding table, MASK included
    width: int  # D
    layers: int
    heads: int  # N
    kv_heads: int  # K
    mlp_width: int  # F
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # whether the embedding table also unembeds
    scale_logits: bool = False  # whether logits are multiplied by width**-0.5
    dtype: str = 'float32'  # of activations; norms, rotary, softmax and logits are always float32
    param_dtype: str = 'float32'
    remat: bool = False  # whether the backward pass recomputes each layer
    scan_unroll: int = 1  # layers in one iteration of the scan; on CPUs `layers` is fastest
    attention: str = 'einsum'  # an implementation of models.attention
    lora: LoRA | None = None  # adapters beside frozen kernels
    quantize: str = ''  # format of frozen kernels, see models.quantized; '' keeps param_dtype
    family: str = 'llada'  # whose names the parameters have in published files, see models.families
    head_size: int = 0  # H; 0 is width / heads
    qkv_bias: bool = False  # whether queries, keys and values have biases
    fused_qkv: bool = False  # whether queries, keys and values come from one kernel, in this order
    qk_norm: bool = False  # whether the queries and keys of each head are normed
    clip_qkv: float = 0.0  # largest magnitude of queries, keys and values; 0 is no limit
    rotary_dims: int = 0  # the first dimensions of a head, which are rotated; 0 is all
    rope_scaling: RopeScaling | None = None
    # 0 lets every position see all others. Otherwise the positions of a row form blocks of this
    # length, from its first token on, and see their own and earlier blocks; 1 is causal attention.
    visible_block: int = 0
    shift_logits: bool = False  # whether the output at a position predicts the token after it
    experts: Experts | None = None  # in place of the MLP

    def __post_init__(self):
        for name, limit in LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(
                    f'model.{name} is {getattr(self, name)}; use a positive integer up to {limit}'
                )
        if self.width % self.heads and not self.head_size:
            raise ValueError(
                f'model.width {self.width} is not a multiple of model.heads {self.heads}; '
                f'use width {-(-self.width // self.heads) * self.heads}'
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f'model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}; '
                f'use kv_heads {self.heads} for one key/value head per query head'
            )
        if self.head_dim % 2:
            raise ValueError(
                f'model.width {self.width} over model.heads {self.heads} gives head dim '
                f'{self.head_dim}, but rotary positions need an even one; change either'
            )
        if not 0 <= self.rotary_dims <= self.head_dim or self.rotary_dims % 2:
            raise ValueError(
                f'model.rotary_dims is {self.rotary_dims} of a head dim of {self.head_dim}; use an '
                'even number up to it, or 0 for all'
            )
        for name in ('head_size', 'clip_qkv', 'visible_block'):
            if not 0 <= getattr(self, name) <= LIMITS['width']:
                raise ValueError(
                    f'model.{name} is {getattr(self, name)}; use 0 up to {LIMITS["width"]}'
                )
        if self.experts and self.experts.dense_layers >= self.layers:
            raise ValueError(
                f'{self.experts.dense_layers} of {self.layers} layers are dense; use at least one '
                'layer with experts'
            )
        self._check_adapters()
        for name in ('dtype', 'param_dtype'):
            check_one_of(f'model.{name}', getattr(self, name), DTYPES)
        for name, limit in (('rope_theta', MOST_ROPE_THETA), ('norm_eps', 1)):
            if not 0 < getattr(self, name) <= limit:
                raise ValueError(
                    f'model.{name} is {getattr(self, name)}; use a positive number up to {limit:g}'
                )
        check_implementation(self.attention)
        check_format(self.quantize)

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads

    @property
    def autoregressive(self) -> bool:
        """Whether no position sees a later one."""
        return self.visible_block == 1

    @property
    def caches_by_layer(self) -> bool:
        """Whether each layer has a cache of its own, because layers are in no loop."""
        return self.scan_unroll >= self.layers

    @property
    def cheap_window_gradient(self) -> bool:
        """Whether a gradient through `Transformer.hidden` needs no more memory with a window.

        In a loop over layers it would keep a copy of the kernels of all layers but the last, and
        without a fused kernel the scores of attention.
        """
        return self.scan_unroll >= self.layers and self.attention not in FUSED_ATTENTION

    @property
    def transposes(self) -> bool:
        """Whether gradients of wide kernels transpose inputs in memory.

        On CPUs with unrolled layers that was measured to pay; other programs stay as planned.
        """
        return self.scan_unroll >= self.layers and self.attention == FOR_CPUS

    @property
    def adapted_kernels(self) -> tuple[str, ...]:
        """The kernels that can have adapters: all but those of experts, which would be too many."""
        attention_kernels = (FUSED,) if self.fused_qkv else FUSED_TARGETS
        mlp = []
        if not self.experts or self.experts.dense_layers:
            mlp += ['gate', 'up', 'down']
        if self.experts and self.experts.shared_width:
            mlp += [f'{SHARED}gate', f'{SHARED}up', f'{SHARED}down']
        return (*attention_kernels, 'attention_out', *mlp)

    def _check_adapters(self) -> None:
        """Raises ValueError unless the model has the kernels that adapters are asked for."""
        if not self.lora:
            return
        fused = [name for name in FUSED_TARGETS if name in self.lora.targets]
        if self.fused_qkv and fused and len(fused) < len(FUSED_TARGETS):
            raise ValueError(
                f'lora.targets has {", ".join(fused)}, but queries, keys and values of this model '
                f'are one kernel; use all of {", ".join(FUSED_TARGETS)}, or none'
            )
        self.lora.for_kernels(self.adapted_kernels)


def check_heads(config: TransformerConfig, mesh: Mesh) -> None:
    """Raises ValueError unless every device of the mesh gets whole heads and whole experts."""
    tensor = mesh.shape['tensor']
    if config.experts and config.experts.count % mesh.shape[RULES['experts']]:
        raise ValueError(
            f'mesh.tensor is {tensor}, which does not divide the {config.experts.count} experts of '
            'the model; use one that does, and more of mesh.fsdp or mesh.data'
        )
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
        dense_layers = config.experts.dense_layers if config.experts else 0
        if dense_layers:
            self.dense_layers = self._stack(dense_layers, has_experts=False)
        self.layers = self._stack(config.layers - dense_layers, has_experts=bool(config.experts))
        self.final_norm = RMSNorm(config.norm_eps, config.dtype, config.param_dtype)
        if not config.tie_embeddings:
            self.unembedding = self.param(
                'unembedding',
                normal(config.width**-0.5, 'embed', 'vocab'),
                (config.width, config.vocab_size),
                config.param_dtype,
            )

    def _stack(self, length: int, has_experts: bool) -> nn.Module:
        """A scan over layers of one kind."""
        config = self.config
        # A fully unrolled scan is no loop, and outside of a loop the compiler could merge the
        # recomputation with the forward pass.
        prevent_cse = config.scan_unroll >= length
        block = nn.remat(Block, prevent_cse=prevent_cse) if config.remat else Block
        return nn.scan(
            block,
            variable_axes={'params': 0, COLLECTION: 0, 'intermediates': 0},
            split_rngs={'params': True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0, nn.broadcast),
            length=length,
            unroll=config.scan_unroll,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )(config, has_experts)

    def __call__(self, tokens: Array, valid: Array | Visibility) -> Array:
        """Logits [B, L, V] float32 of every position: `unembed(hidden(tokens, valid))`."""
        return self.unembed(self.hidden(tokens, valid))

    def hidden(
        self,
        tokens: Array,
        valid: Array | Visibility,
        dropout: Array | None = None,
        window: Window | None = None,
        noise: Array | None = None,
    ) -> Array:
        """Final hidden states, after the last norm; the state at a position predicts its token.

        Args:
          tokens: [B, L] int32 in [0, V). Tokens on padding are ignored.
          valid: [B, L] bool, False on padding. Positions count from the first valid token of a row,
            and `visible_block` says what they see. A `Visibility` says both in its place.
          dropout: [B] keys of the adapters' dropout, one for each row; None drops nothing.
          window: the positions whose states are asked for; None is all. Of the last layer only keys
            and values are then computed everywhere, which is exact, and nothing is sown.
          noise: [B, L, D], added to the embeddings of the tokens; None adds nothing.

        Returns:
          [B, L, D], or [B, size, D] of a window, in the compute dtype, finite but meaningless on
          padding.
        """
        config = self.config
        if window is not None and window.size == tokens.shape[1]:
            window = None
        # The table is gathered along 'embed', because tokens are split over the mesh axis 'fsdp'
        # already and a lookup cannot split its result over one axis twice.
        table = constrain(self.embedding.astype(config.dtype), 'vocab', None)  # [V, D]
        x = jnp.take(table, tokens, axis=0)  # [B, L, D]
        if noise is not None:
            x = x + noise.astype(x.dtype)
        x = constrain(x, 'rows', None, None)
        exists = valid.valid if isinstance(valid, Visibility) else valid
        if config.visible_block and not isinstance(valid, Visibility):
            valid = Visibility(valid, positions(valid), block_length=config.visible_block)
        rotary = rotary_table(
            valid, config.rotary_dims or config.head_dim, config.rope_theta, config.rope_scaling
        )
        if dropout is not None:
            dropout = _token_keys(dropout, exists, config.layers)  # [layers, B, L]
        if config.experts and config.experts.dense_layers:
            number = config.experts.dense_layers
            first = None if dropout is None else dropout[:number]
            dropout = None if dropout is None else dropout[number:]
            x, _ = self.dense_layers(x, rotary, valid, first, None, None)
        if window is None:
            x, _ = self.layers(x, rotary, valid, dropout, None, None)
        else:
            left = int(config.shift_logits)
            source = Window(jnp.maximum(window.start - left, 0), window.size)
            x = self._layers_in_window(x, rotary, valid, dropout, source)
        x = self.final_norm(x)
        if not config.shift_logits:
            return x
        # The output at a position predicts the token after it, and the first one also its own.
        shifted = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
        if window is None:
            return shifted
        is_first = jnp.asarray(window.start == 0).reshape(-1, 1, 1)  # [B, 1, 1] or [1, 1, 1]
        return jnp.where(is_first, shifted, x)  # Later windows were read one to the left already.

    def _layers_in_window(
        self,
        x: Array,
        rotary: tuple[Array, Array],
        valid: Array | Visibility,
        dropout: Array | None,
        window: Window,
    ) -> Array:
        """`self.layers` with outputs of the last one in a window only: [B, L, D] -> [B, size, D].

        dropout: [layers, B, L] keys of the tokens in each of these layers, or None.
        """
        config = self.config
        stacked = (self._kernels, dropout)  # with a leading axis of layers
        number = len(jax.tree.leaves(self._kernels)[0])
        unrolled = config.scan_unroll >= number
        block = Block(config, bool(config.experts), parent=None)

        def layer(window: Window | None, x: Array, part: tuple) -> Array:
            variables, keys = part
            return block.apply(variables, x, rotary, valid, keys, None, None, window)[0]

        whole, last = functools.partial(layer, None), functools.partial(layer, window)
        if config.remat:  # as in `_stack`; the last layer is in no loop
            whole = jax.checkpoint(whole, prevent_cse=unrolled)
            last = jax.checkpoint(last)

        def part_at(index: Array | int) -> tuple:
            at = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
            return jax.tree.map(at, stacked)

        if number > 1 and unrolled:
            first = jax.tree.map(lambda leaf: leaf[:-1], stacked)
            x, _ = jax.lax.scan(lambda x, part: (whole(x, part), None), x, first, unroll=number)
        elif number > 1:
            # A scan over all kernels but the last would copy them, and this loop does not.
            x = jax.lax.fori_loop(0, number - 1, lambda i, x: whole(x, part_at(i)), x)
        return last(x, part_at(number - 1))

    def _layers_with_caches(
        self,
        x: Array,
        rotary: tuple[Array, Array],
        valid: Array,
        caches: LayerCaches,
        start: Array,
        window: Window | None,
    ) -> tuple[Array, LayerCaches]:
        """`self.layers`, one after the other, with outputs of the last one in a window only."""
        block = Block(self.config, bool(self.config.experts), parent=None)
        after = []
        for number, cache in enumerate(caches):
            kernels = jax.tree.map(lambda leaf, number=number: leaf[number], self._kernels)
            asked = window if number + 1 == len(caches) else None
            x, cache = block.apply(kernels, x, rotary, valid, None, cache, start, asked)
            after.append(cache)
        return x, tuple(after)

    @property
    def _kernels(self) -> dict[str, Any]:
        """The collections of `self.layers`, whose leaves have a leading axis of layers."""
        return {
            name: values
            for name, values in self.layers.variables.items()
            if name in ('params', COLLECTION)
        }

    def hidden_with_cache(
        self,
        tokens: Array,
        valid: Array,
        cache: Cache | LayerCaches,
        start: Array,
        window: Window | None = None,
    ) -> tuple[Array, Cache | LayerCaches]:
        """Final hidden states of w positions in a row, with the keys and values of all others.

        Args:
          tokens: [B, w] int32, at the positions from `start`.
          valid: [B, L] bool, False on padding, as in `hidden`.
          cache: keys and values of earlier passes, the keys rotated already: [layers, B, L, K, H],
            or where layers are unrolled a pair [B, L, K, H] for each layer (`empty_cache`).
          start: [] or [B] int32.
          window: which of the w positions the states are asked for; None is all.

        Returns:
          [B, w, D], or [B, size, D] of a window, and the cache with the keys and values of the w
          positions. With w = L the states are those of `hidden`, and nothing of the cache is read.
        """
        config = self.config
        table = constrain(self.embedding.astype(config.dtype), 'vocab', None)  # [V, D]
        x = constrain(jnp.take(table, tokens, axis=0), 'rows', None, None)  # [B, w, D]
        rotary = rotary_table(
            valid, config.rotary_dims or config.head_dim, config.rope_theta, config.rope_scaling
        )
        rotary = tuple(cut(table, start, tokens.shape[1]) for table in rotary)
        if window is not None and window.size == tokens.shape[1]:
            window = None
        if config.caches_by_layer:
            x, cache = self._layers_with_caches(x, rotary, valid, cache, start, window)
        else:
            x, cache = self.layers(x, rotary, valid, None, cache, start)
            x = x if window is None else window.cut(x)
        return self.final_norm(x), cache

    def unembed(self, hidden: Array) -> Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        config = self.config
        table = self.embedding.T if config.tie_embeddings else self.unembedding  # [D, V]
        logits = product(hidden, table.astype(config.dtype), jnp.float32, config.transposes)
        return logits * config.width**-0.5 if config.scale_logits else logits


class Block(nn.Module):
    """One layer, the body of a scan with carry x: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TransformerConfig
    has_experts: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotary: tuple[Array, Array],
        valid: Array | Visibility,
        dropout: Array | None,
        cache: Cache | None,
        start: Array | None,
        window: Window | None = None,
    ) -> tuple[Array, Cache | None]:
        """x [B, L, D], rotary (cosine, sine) [B, L, H/2], valid [B, L] bool -> (x [B, L, D], None).

        valid: [B, L] bool, or a `Visibility`.
        dropout: [B, L] keys of the tokens in this layer, or None.
        cache: keys and values [B, L, K, H] of this layer, which come back with those of x, or None.
        start: [] or [B] int32, the first position of x, which is then a window of the row.
        window: the positions of x that have queries and outputs, fewer than L; None is all.
        """
        config = self.config
        B, L, D = x.shape
        N, K, H = config.heads, config.kv_heads, config.head_dim
        types = {'dtype': config.dtype, 'param_dtype': config.param_dtype}
        linear = functools.partial(
            Linear,
            **types,
            lora=config.lora,
            quantize=config.quantize,
            transposes=config.transposes,
        )
        norm = functools.partial(RMSNorm, config.norm_eps, **types)
        # A layer adds to the residual stream twice; this gain keeps its scale equal at any depth.
        residual_gain = (2 * config.layers) ** -0.5

        def read(x: Array) -> Array:
            """The positions of [B, L, ...] with queries and outputs; L is their number below."""
            return x if window is None else window.cut(x)

        read_keys = None if dropout is None else read(dropout)
        h = norm(name='attention_norm')(x)  # [B, L, D]
        if config.fused_qkv:
            features = (N + 2 * K) * H
            qkv = linear(features, ('embed', 'heads'), name=FUSED)(h, dropout)
            q, k, v = jnp.split(qkv.reshape(B, L, N + 2 * K, H), (N, N + K), axis=2)
            q = read(q)
        else:
            biased = functools.partial(linear, bias=config.qkv_bias)
            q = biased(N * H, ('embed', 'heads'), name='query')(read(h), read_keys)
            q = q.reshape(B, -1, N, H)
            k = biased(K * H, ('embed', 'kv_heads'), name='key')(h, dropout).reshape(B, L, K, H)
            v = biased(K * H, ('embed', 'kv_heads'), name='value')(h, dropout).reshape(B, L, K, H)
        if config.qk_norm:
            q, k = norm(name='query_norm')(q), norm(name='key_norm')(k)
        if config.clip_qkv:
            q, k, v = (jnp.clip(y, -config.clip_qkv, config.clip_qkv) for y in (q, k, v))
        q, k = rotate(q, tuple(map(read, rotary))), rotate(k, rotary)
        if cache is not None:
            k, v = cache = tuple(put(*each, start) for each in zip(cache, (k, v), strict=True))
        if window is not None and isinstance(valid, Visibility):
            valid = read(valid.mask())  # [B, size, L]
        mixed = attention(q, k, v, valid, config.attention)
        x = read(x) + linear(D, ('heads', 'embed'), residual_gain, name='attention_out')(
            mixed.reshape(B, -1, N * H), read_keys
        )

        h = norm(name='mlp_norm')(x)  # [B, L, D]
        experts = config.experts if self.has_experts else None
        width, prefix = config.mlp_width, ''
        if experts:
            routed = RoutedExperts(
                experts, residual_gain, **types, quantize=config.quantize, name='experts'
            )
            x = x + routed(h)
            width, prefix = experts.shared_width, SHARED
        if width:
            gate = linear(width, ('embed', 'mlp'), name=f'{prefix}gate')(h, read_keys)  # [B, L, F]
            up = linear(width, ('embed', 'mlp'), name=f'{prefix}up')(h, read_keys)  # [B, L, F]
            x = x + linear(D, ('mlp', 'embed'), residual_gain, name=f'{prefix}down')(
                swiglu(gate, up), read_keys
            )
        return constrain(x, 'rows', None, None), cache


def _token_keys(row_keys: Array, valid: Array, layers: int) -> Array:
    """Keys [layers, B, L] of the tokens in each layer, from keys [B] of the rows.

    The key of a token depends on its position in the row and not on the padding before it.
    """

    def keys_of_row(row_key: Array, position: Array) -> Array:
        """row_key: []; position: [L] -> [layers, L]."""
        token_keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, position)  # [L]
        return jax.vmap(lambda key: jax.random.split(key, layers), out_axes=1)(token_keys)

    return jax.vmap(keys_of_row, out_axes=1)(row_keys, positions(valid))


def _embedding_std(config: TransformerConfig) -> float:
    """Standard deviation of the initial embedding table.

    It is width**-0.5 for an untied table, 1 for a tied table with scaled logits, and 1 / width for
    a tied table without. At 1 a token enters the residual stream as large as the terms that the
    layers add, and small models learn far faster: at first each position predicts the token that it
    sees, which training unlearns.
    """
    if not config.tie_embeddings:
        return config.width**-0.5
    return 1.0 if config.scale_logits else 1 / config.width

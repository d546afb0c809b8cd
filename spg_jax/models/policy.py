"""A policy: the functions of parameters that sampling and objectives need, and its special ids.

Shapes: `B` sequences, `L` tokens of prompt (`P`) and completion (`C`), `V` vocabulary, `D` width.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.transformer import Cache, LayerCaches, Transformer, TransformerConfig
from spg_jax.models.visibility import Visibility
from spg_jax.models.windows import Window
from spg_jax.random import Purpose, root_key
from spg_jax.sharding import init_params

Params = Any  # one collection of a model's parameters
Variables = dict[str, Params]  # collection -> parameters: 'params', and 'lora' for adapters


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A model over a vocabulary, without its parameters."""

    config: TransformerConfig
    mask_id: int
    eos_id: int
    allowed: np.ndarray  # [V] bool, False for MASK and for ids without a word

    @property
    def model(self) -> Transformer:
        return Transformer(self.config)

    @property
    def trained(self) -> str:
        """The collection that training changes: the adapters, or without any 'params'."""
        return COLLECTION if self.config.lora else 'params'

    def hidden(
        self,
        variables: Variables,
        tokens: Array,
        valid: Array | Visibility,
        dropout: Array | None = None,
        window: Window | None = None,
        noise: Array | None = None,
    ) -> Array:
        """Final hidden states [B, L, D], or [B, size, D] of a window.

        Args:
          variables: the collections of parameters.
          tokens: [B, L] int32.
          valid: [B, L] bool, False on padding, or a `Visibility`.
          dropout: [B] keys of the adapters' dropout; None drops nothing.
          window: the positions whose states are asked for; None is all.
          noise: [B, L, D], added to the embeddings of the tokens; None adds nothing.
        """
        return self.model.apply(variables, tokens, valid, dropout, window, noise, method='hidden')

    def hidden_with_cache(
        self,
        variables: Variables,
        tokens: Array,
        valid: Array,
        cache: Cache | LayerCaches,
        start: Array,
        window: Window | None = None,
    ) -> tuple[Array, Cache | LayerCaches]:
        """`Transformer.hidden_with_cache`, without dropout."""
        return self.model.apply(
            variables, tokens, valid, cache, start, window, method='hidden_with_cache'
        )

    def empty_cache(self, rows: int, length: int) -> Cache | LayerCaches:
        """A cache for B = `rows` sequences of L = `length` positions, of zeros."""
        config = self.config
        shape = (rows, length, config.kv_heads, config.head_dim)
        if not config.caches_by_layer:
            shape = (config.layers, *shape)
        pair = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
        return (pair,) * config.layers if config.caches_by_layer else pair

    def take_from_cache(self, cache: Cache | LayerCaches, index: Array) -> Cache | LayerCaches:
        """The cache of n rows, whose places are `index` [n] int32."""
        axis = 0 if self.config.caches_by_layer else 1
        return jax.tree.map(lambda x: jnp.take(x, index, axis=axis, mode='clip'), cache)

    def unembed(self, variables: Variables, hidden: Array) -> Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        return self.model.apply(variables, hidden, method='unembed')

    def completion_logits(
        self,
        variables: Variables,
        prompt: Array,
        valid: Array,
        completion: Array,
        dropout: Array | None = None,
        exists: Array | None = None,
    ) -> Array:
        """Logits [B, C, V] at the completion positions only; arguments of `completion_hidden`."""
        return self.unembed(
            variables,
            self.completion_hidden(variables, prompt, valid, completion, dropout, exists),
        )

    def completion_hidden(
        self,
        variables: Variables,
        prompt: Array,
        valid: Array,
        completion: Array,
        dropout: Array | None = None,
        exists: Array | None = None,
    ) -> Array:
        """Final hidden states [B, C, D] at the completion positions.

        Args:
          variables: the collections of parameters.
          prompt: [B, P] int32, possibly corrupted.
          valid: [B, P] bool, False on padding of the prompt.
          completion: [B, C] int32, corrupted.
          dropout: as in `hidden`.
          exists: [B, C] bool, False on positions of the completion that no other attends to, such
            as those of a sequence that is cut at its EOS; None is all True.
        """
        tokens = jnp.concatenate([prompt, completion], axis=1)  # [B, L]
        exists = jnp.ones(completion.shape, bool) if exists is None else exists
        valid = jnp.concatenate([valid, exists], axis=1)  # [B, L]
        window = Window(prompt.shape[1], completion.shape[1])
        if self.config.cheap_window_gradient:
            return self.hidden(variables, tokens, valid, dropout, window)
        return window.cut(self.hidden(variables, tokens, valid, dropout))


def with_adapters(
    policy: Policy, variables: Variables, lora: LoRA | None, seed: int, mesh: Mesh
) -> tuple[Policy, Variables]:
    """The policy with adapters: those it has already, else new ones, which change no output yet.

    Args:
      policy: a model, with adapters or without.
      variables: its collections of parameters.
      lora: the adapters that the result must have; None means none.
      seed: seed of the initial factors.
      mesh: the mesh on which new adapters are created.

    Raises:
      ValueError: if the policy has adapters, and they are not `lora`.
    """
    check_adapters(policy.config.lora, lora)
    if policy.config.lora or lora is None:
        return policy, variables
    policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, lora=lora))
    key = jax.random.fold_in(root_key(seed), Purpose.INIT)
    adapters = init_params(policy.model, key, mesh, collection=COLLECTION)
    return policy, variables | {COLLECTION: adapters}


def check_adapters(
    actual: LoRA | None, expected: LoRA | None, where: Path | str = 'the policy'
) -> None:
    """Raises ValueError if a policy has adapters other than the expected ones.

    A policy without adapters passes, because it can still get them.

    Args:
      actual: the adapters of the policy; None for none.
      expected: the adapters that the configuration asks for; None for none.
      where: what has the adapters, for the message.
    """
    if actual is None or actual == expected:
        return
    actual_fields = dataclasses.asdict(actual)
    expected_fields = dataclasses.asdict(expected) if expected else {}
    differing = {
        name: value for name, value in actual_fields.items() if expected_fields.get(name) != value
    }
    actual_text = ', '.join(f'{name} {value}' for name, value in differing.items())
    expected_text = ', '.join(f'{name} {expected_fields[name]}' for name in differing if expected)
    flags = ' '.join(
        f'--config.lora.{name}={value}'
        if name != 'targets'
        else f'--config.lora.{name}="{value}"'  # quoted, because a shell would read the parentheses
        for name, value in differing.items()
    )
    raise ValueError(
        f'{where} has adapters of {actual_text}, the configuration asks for '
        f'{expected_text or "none"}; set {flags}, or merge the adapters first'
    )

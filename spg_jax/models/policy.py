"""A policy: the functions of parameters that sampling and objectives need, and its special ids."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.random import Purpose
from spg_jax.sharding import init_params

Params = Any  # one collection of a model's parameters
Variables = dict[str, Params]  # 'params', beside it 'lora' where the policy has adapters


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A model without its parameters, over a vocabulary."""

    config: TransformerConfig
    mask_id: int
    eos_id: int
    allowed: np.ndarray  # [V] bool, what may be generated: not MASK, nor ids without a word

    @property
    def model(self) -> Transformer:
        return Transformer(self.config)

    @property
    def trained(self) -> str:
        """The collection that training changes: with adapters, nothing else."""
        return COLLECTION if self.config.lora else 'params'

    def hidden(
        self, variables: Variables, tokens: Array, valid: Array, dropout: Array | None = None
    ) -> Array:
        """Final hidden states [B, L, D] of tokens [B, L] where valid [B, L]; dropout: [B] keys of
        the adapters' dropout, None for none."""
        return self.model.apply(variables, tokens, valid, dropout, method='hidden')

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
    ) -> Array:
        """Logits [B, C, V] at the completion positions only.

        Args:
          prompt: [B, P] int32, possibly corrupted; valid: [B, P] bool, False on padding.
          completion: [B, C] int32, corrupted.
          dropout: as in `hidden`.
        """
        tokens = jnp.concatenate([prompt, completion], axis=1)
        valid = jnp.concatenate([valid, jnp.ones(completion.shape, bool)], axis=1)
        hidden = self.hidden(variables, tokens, valid, dropout)
        return self.unembed(variables, hidden[:, prompt.shape[1] :])


def with_adapters(
    policy: Policy, variables: Variables, lora: LoRA | None, seed: int, mesh: Mesh
) -> tuple[Policy, Variables]:
    """The policy with new adapters, which change nothing yet; one that has adapters keeps them.

    Args:
      policy: a model, with adapters or without.
      variables: its collections.
      lora: the adapters wanted; None wants none.
      seed: of the initial factors.
      mesh: where they go.

    Raises:
      ValueError: the policy has other adapters than those wanted.
    """
    check_adapters(policy.config.lora, lora)
    if policy.config.lora:
        return policy, variables
    if lora is None:
        return policy, variables
    policy = dataclasses.replace(policy, config=dataclasses.replace(policy.config, lora=lora))
    key = jax.random.fold_in(jax.random.key(seed), Purpose.INIT)
    adapters = init_params(policy.model, key, mesh, collection=COLLECTION)
    return policy, variables | {COLLECTION: adapters}


def check_adapters(
    found: LoRA | None, wanted: LoRA | None, where: Path | str = 'the policy'
) -> None:
    """Raises ValueError if there are adapters, and others than those wanted.

    Args:
      found: those of a policy.
      wanted: those that the configuration asks for; None for none.
      where: what has them, for the message.
    """
    if found is None or found == wanted:
        return
    have, want = dataclasses.asdict(found), dataclasses.asdict(wanted) if wanted else {}
    differing = {name: value for name, value in have.items() if want.get(name) != value}
    has = ', '.join(f'{name} {value}' for name, value in differing.items())
    asked = ', '.join(f'{name} {want[name]}' for name in differing) if want else 'none'
    remedy = ' '.join(
        f'--config.lora.{name}={value}'
        if name != 'targets'
        else f'--config.lora.{name}="{value}"'  # a shell would read the parentheses
        for name, value in differing.items()
    )
    raise ValueError(
        f'{where} has adapters of {has}, the configuration asks for {asked}; set {remedy}, or '
        'merge them first'
    )

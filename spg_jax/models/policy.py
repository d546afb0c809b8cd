"""A policy: the functions of parameters that sampling and objectives need, and its special ids."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.models.transformer import Transformer, TransformerConfig

Params = Any


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

    def hidden(self, params: Params, tokens: Array, valid: Array) -> Array:
        """Final hidden states [B, L, D] of tokens [B, L] where valid [B, L]."""
        return self.model.apply({'params': params}, tokens, valid, method='hidden')

    def unembed(self, params: Params, hidden: Array) -> Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        return self.model.apply({'params': params}, hidden, method='unembed')

    def completion_logits(
        self, params: Params, prompt: Array, valid: Array, completion: Array
    ) -> Array:
        """Logits [B, C, V] at the completion positions only.

        Args:
          prompt: [B, P] int32, possibly corrupted; valid: [B, P] bool, False on padding.
          completion: [B, C] int32, corrupted.
        """
        tokens = jnp.concatenate([prompt, completion], axis=1)
        valid = jnp.concatenate([valid, jnp.ones(completion.shape, bool)], axis=1)
        return self.unembed(params, self.hidden(params, tokens, valid)[:, prompt.shape[1] :])

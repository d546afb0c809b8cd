"""The supervised loss of masked diffusion: predict what was masked (LLaDA, arXiv 2502.09992)."""

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.bounds import completion_log_probs
from spg_jax.models.policy import Policy, Variables


def stratified_masks(key: Array, row_keys: Array, length: int) -> Array:
    """Which completion tokens each row of a batch has masked, [B, length] bool, at least one.

    Row r masks ceil(length * t_r) random positions with t_r = mod(u + r/B, 1) and one uniform u
    for the batch, so that every share of masked tokens is equally often in it (MD4's low-variance
    times).

    Args:
      key: of u.
      row_keys: [B] keys of the rows, which choose the positions.
      length: completion tokens.
    """
    rows = len(row_keys)
    times = jnp.mod(jax.random.uniform(key) + jnp.arange(rows) / rows, 1.0)
    count = jnp.clip(jnp.ceil(times * length), 1, length)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(row_keys)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return rank < count[:, None]


def denoising_loss(
    policy: Policy,
    variables: Variables,
    prompt: Array,
    prompt_mask: Array,
    completion: Array,
    masked: Array,
) -> Array:
    """Mean over rows of the cross-entropy of a masked token, in nats (eq. 3 and 5, exact counts).

    Summed over the k masked tokens of a row with weight C/k, per token of the completion: 1/k.

    Args:
      policy: the model.
      variables: its parameters.
      prompt: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool, False on padding.
      completion: [B, C] int32.
      masked: [B, C] bool, at least one a row.
    """
    noisy = jnp.where(masked, policy.mask_id, completion)
    logits = policy.completion_logits(variables, prompt, prompt_mask, noisy)
    logp = jax.vmap(completion_log_probs)(logits, completion)
    return -(jnp.where(masked, logp, 0.0).sum(1) / masked.sum(1)).mean()

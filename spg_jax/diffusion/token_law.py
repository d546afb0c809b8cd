"""The law that a token is drawn from: softmax(logits / T) over the ids that may be chosen.

At temperature 0 the law gives all its weight to the likeliest id. `b` positions, `V` vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array


def likeliest(scores: Array) -> Array:
    """The id of the highest score, [..., V] -> [...] int32, and of equal ones the first.

    NaN counts as the highest. On CPUs `jnp.argmax` compares one number after the other, and does
    so in the loop that makes the scores, noise included.
    """
    return jax.lax.platform_dependent(scores, cpu=_first_highest, default=_argmax)


def _argmax(scores: Array) -> Array:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _first_highest(scores: Array) -> Array:
    """`_argmax` in two passes, each of which compares several numbers at once."""
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    highest = scores.max(-1, keepdims=True)
    is_highest = (scores == highest) | jnp.isnan(scores)
    return jnp.where(is_highest, ids, scores.shape[-1] - 1).min(-1)


def kept_ids(logits: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """The ids that are left after truncation, [..., V] bool; the likeliest id is among them.

    Top-k keeps the `top_k` likeliest ids. Top-p then keeps the smallest set of likeliest ids whose
    probability among those reaches `top_p`. Ids as likely as the last of a set belong to it.

    Args:
      logits: [..., V] float32, -inf for ids that are never chosen.
      temperature: T, above 0; probabilities are those of logits / T.
      top_k: how many ids are kept at most; 0 keeps all.
      top_p: the probability that is kept at least, in (0, 1]; 1 keeps all.
    """
    size = logits.shape[-1]
    values = jax.lax.top_k(logits, min(top_k or size, size))[0]  # [..., k] descending
    last = values.shape[-1] - 1
    if top_p < 1.0:
        prob = jax.nn.softmax((values - values[..., :1]) / temperature, axis=-1)
        is_needed = jnp.cumsum(prob, axis=-1) - prob < top_p  # [..., k]
        last = jnp.maximum(is_needed.sum(-1) - 1, 0)  # [...]
    index = jnp.broadcast_to(last, logits.shape[:-1])[..., None]
    threshold = jnp.take_along_axis(values, index, axis=-1)  # [..., 1]
    # A comparison with NaN is False: where logits are NaN no id is left out.
    return ~(logits < threshold) & ~jnp.isneginf(logits)


def record(
    names: tuple[str, ...], logits: Array, token: Array, temperature: float
) -> dict[str, Array]:
    """What is recorded of the law that tokens were drawn from.

    Args:
      names: which of 'log_prob', 'entropy' and 'kept' are asked for; other names are left out.
      logits: [..., V] float32, -inf for ids that the law leaves out.
      token: [...] int32, the tokens drawn.
      temperature: T.

    Returns:
      'log_prob' [...], the log-probability of the token, and 'entropy' [...] of the law, both in
      nats; 'kept' [..., V / 8] uint8, the ids that the law does not leave out, as packed bits.
    """
    if not names:
        return {}
    is_kept = ~jnp.isneginf(logits)  # [..., V]
    if temperature == 0.0:
        ids = jnp.arange(logits.shape[-1]).reshape((1,) * token.ndim + (-1,))
        is_kept &= ids == token[..., None]
    records = {}
    if 'kept' in names:
        records['kept'] = jnp.packbits(is_kept, axis=-1)
    if 'log_prob' in names or 'entropy' in names:
        # The largest logit is subtracted first: finite logits may overflow when divided by T.
        scaled = logits - logits.max(-1, keepdims=True)
        if temperature > 0.0:
            scaled = scaled / temperature
        law = jax.nn.log_softmax(jnp.where(is_kept, scaled, -jnp.inf), axis=-1)  # [..., V]
        entropy = -jnp.where(is_kept, jnp.exp(law) * law, 0.0).sum(-1)
        log_prob = jnp.take_along_axis(law, token[..., None], axis=-1)[..., 0]
        records |= {'log_prob': log_prob, 'entropy': entropy}
    return {name: value for name, value in records.items() if name in names}


def kept_log_probs(logits: Array, kept: Array, token: Array, temperature: float) -> Array:
    """Log-probabilities of tokens under the law over recorded ids, in nats, [..., b] float32.

    Args:
      logits: [..., b, V], any float type.
      kept: [b, V / 8] uint8, ids as packed bits; where there are none, the result has no meaning.
      token: [b] int32, each among the ids of its position.
      temperature: T, above 0.
    """
    is_kept = jnp.unpackbits(kept, axis=-1, count=logits.shape[-1]).astype(bool)  # [b, V]
    is_kept = jnp.broadcast_to(is_kept, logits.shape)
    scaled = logits.astype(jnp.float32) / temperature  # [..., b, V]
    # The floor is finite, so that gradients are finite where no id is kept.
    scaled = jnp.where(is_kept, scaled, jnp.finfo(jnp.float32).min)
    index = jnp.broadcast_to(token, logits.shape[:-1])[..., None]
    chosen = jnp.take_along_axis(scaled, index, axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)

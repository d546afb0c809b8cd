"""The loss of block diffusion (arXiv 2503.09573; LLaDA2.0, arXiv 2512.15745, eq. 1 and 2).

A sequence of N tokens is a noisy one and, after it, its clean copy. A noisy block sees itself and
the clean blocks before it, and predicts its masked tokens, each at its own position. With blocks of
the whole length there is no clean copy, and the loss is that of masked diffusion.

Where the published loss has a time t and the weight 1/t, a row here masks exactly k of its n
maskable tokens, with k drawn uniformly from 1 to n, and the weight is n/k. Both have the same
expectation, block by block: the sum over k of k^-1 (n-m choose k-a) / (n choose k) is the integral
over t of t^-1 t^a (1-t)^(m-a), which is the weight of a of the m tokens of a block.

A comment such as `# [R, N]` after an assignment is the shape of the value: `B` rows of a batch, `R`
rows with their complements, `N` tokens of a sequence, `V` vocabulary, `D` width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.bounds import completion_log_probs
from spg_jax.models.visibility import Visibility


class Masks(NamedTuple):
    """What is masked in each row, and how much it weighs."""

    masked: Array  # [R, N] bool
    weight: Array  # [R] float32, of each masked token of a row; 0 where none is masked


def draw_masks(key: Array, row_keys: Array, maskable: Array, complementary: bool) -> Masks:
    """Masks of k of the n maskable tokens of each row, in nats per token weighted by 1/k.

    The k are spread evenly over the batch. With complements each row comes twice in succession,
    with a mask and with the other n - k tokens masked, so that a token is predicted once. Then k is
    drawn from 0 to n, and the weight is (n + 1) / (n k), because every k >= 1 is drawn less often.

    Args:
      key: of the numbers of masked tokens.
      row_keys: [B] keys of the rows, which choose the tokens.
      maskable: [B, N] bool, at least one True a row.
      complementary: whether to add the complements, so that R = 2 B, and otherwise R = B.
    """
    rows, length = maskable.shape
    n = maskable.sum(1)  # [B]
    times = jnp.mod(jax.random.uniform(key) + jnp.arange(rows) / rows, 1.0)  # [B]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(row_keys)  # [B, N]
    rank = jnp.argsort(jnp.argsort(jnp.where(maskable, noise, 2.0), axis=1), axis=1)  # [B, N]
    if not complementary:
        count = jnp.clip(jnp.ceil(times * n), 1, n)  # [B]
        return Masks(rank < count[:, None], 1.0 / count)
    count = jnp.clip(jnp.floor(times * (n + 1)), 0, n)  # [B]
    masked = rank < count[:, None]  # [B, N]
    counts = jnp.stack([count, n - count], axis=1)  # [B, 2]
    weight = ((n + 1) / n)[:, None] / jnp.maximum(counts, 1) * (counts > 0)  # [B, 2]
    pair = jnp.stack([masked, maskable & ~masked], axis=1)  # [B, 2, N]
    return Masks(pair.reshape(2 * rows, length), weight.reshape(-1))


def streams(
    noisy: Array, clean: Array, valid: Array, document: Array | None, block_length: int
) -> tuple[Array, Array | Visibility]:
    """The tokens that the model reads, and which of them each position sees.

    Args:
      noisy: [R, N] int32, with MASK.
      clean: [R, N] int32.
      valid: [R, N] bool, False on padding.
      document: [R, N] int32, which example of a row each token is of; None for one example a row.
      block_length: tokens of a block; 0 for the whole length, which needs no clean copy.

    Returns:
      Tokens [R, N] or [R, 2 N]; outputs of the first N positions predict the clean tokens there.
    """
    if not block_length:
        return noisy, valid if document is None else Visibility(valid, document=document)

    def twice(x: Array) -> Array:
        return jnp.concatenate([x, x], axis=1)

    visible = Visibility(
        twice(valid),
        document=None if document is None else twice(document),
        block_length=block_length,
        halves=True,
    )
    return jnp.concatenate([noisy, clean], axis=1), visible


def weighted_loss(logits: Array, clean: Array, masks: Masks) -> Array:
    """Mean over rows of the weighted cross-entropy of masked tokens, in nats.

    Args:
      logits: [R, N, V], of which only those of masked tokens count.
      clean: [R, N] int32.
      masks: what is masked.
    """
    logp = jax.vmap(completion_log_probs)(logits, clean)  # [R, N]
    return -(jnp.where(masks.masked, logp, 0.0).sum(1) * masks.weight).mean()


def entropy_where_right(logits: Array, clean: Array, masked: Array) -> Array:
    """Mean entropy, in nats, of the predictions of masked tokens whose likeliest token is right.

    It is the confidence-aware loss of LLaDA2.0 (eq. 6) before its factor: the gradient sharpens
    what is right already, so that a sampler can commit more tokens a step. It is 0 where nothing is
    right. Arguments are those of `weighted_loss`, and masked is [R, N] bool.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)  # [R, N, V]
    entropy = -(jnp.exp(logp) * logp).sum(-1)  # [R, N]
    right = masked & (jnp.argmax(logits, axis=-1) == clean)  # [R, N]
    return jnp.where(right, entropy, 0.0).sum() / jnp.maximum(right.sum(), 1)


def embedding_noise(keys: Array, masked: Array, width: int, scale: Array) -> Array:
    """Gaussian noise on the embeddings of masked tokens, [R, N, D].

    In an autoregressive model nothing has trained the embedding of MASK, and weight decay has
    shrunk it, so that where most tokens are masked the gradient explodes (LLaDA2.0, section 4).

    Args:
      keys: [B] keys of the rows; rows and their complements have the same noise.
      masked: [R, N] bool.
      width: D.
      scale: [] standard deviation.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, (masked.shape[1], width)))(keys)
    noise = jnp.repeat(noise, len(masked) // len(keys), axis=0)  # [R, N, D]
    return jnp.where(masked[:, :, None], scale * noise, 0.0)

"""Bounds on the log-likelihood of ONE completion from its M draws, in nats per sequence.

Arguments shared by every bound:
  logp: [M, C] log-probability of each completion token under each draw, in nats.
  masked: [M, C] bool, the completion part of `Draws.masked`.
  scored: [C] bool, True from the first token through the first EOS; n = scored.sum().
  block: [M] int32, the chosen block of each draw (read by the block estimator only).

S_k are the positions both masked by draw k and scored. A draw with no such position carries no
information and is left out; without any draw left the bound is 0. Values and gradients are finite
for every finite logp.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import KINDS, Corruption

# Estimator -> the corruptions under which it bounds what it says it bounds. As released, the
# estimate is used with all of them.
PAIRINGS = {'released': KINDS, 'paper': ('uniform',), 'block': ('block',)}


class Estimator(NamedTuple):
    """The bounds of one estimator. Each returns nats per sequence, a float32 scalar."""

    elbo: Callable[[Array, Array, Array, Array], Array]  # (logp, masked, scored, block)
    eubo: Callable[..., Array]  # (logp, masked, scored, block, beta)
    loose_eubo: Callable[..., Array]  # as eubo, with log x replaced by its tangent x - 1
    strict_eubo: Callable[..., Array]  # as eubo, but above log p for every beta >= 1


def estimator(name: str, block_length: int) -> Estimator:
    """The estimator called `name`.

    Args:
      name: 'released' (SPG code: all masked scored tokens of every draw), 'paper' (SPG as written,
        under `uniform` corruption) or 'block' (block-autoregressive likelihood under `block`
        corruption with clean earlier blocks).
      block_length: completion positions a block; read by 'block' only.

    Raises:
      ValueError: on an unknown name, or a block length below 1 with 'block'.
    """
    if name not in PAIRINGS:
        raise ValueError(f'rl.estimator is {name!r}; use one of {", ".join(PAIRINGS)}')
    if name != 'block':
        # With exact counts w = n/|S_k| is both the released 1/t_k and the paper's weight 1/t: one
        # formula. What differs is the corruption allowed, which `check_pairing` sees to.
        return Estimator(sequence_elbo, sequence_eubo, sequence_loose_eubo, sequence_strict_eubo)
    if block_length < 1:
        raise ValueError(f'block_length is {block_length}; the block estimator needs at least 1')

    def elbo(logp, masked, scored, block):
        return block_elbo(logp, masked, scored, block, block_length)

    def upper(form):
        def bound(logp, masked, scored, block, beta):
            return _block_upper(logp, masked, scored, block, beta, block_length, form)

        return bound

    return Estimator(elbo, upper(_PLAIN), upper(_TANGENT), upper(_STRICT))


def check_pairing(name: str, corruption: Corruption) -> None:
    """Refuses an estimator under a corruption for which it bounds nothing.

    Args:
      name: of the estimator, as `estimator()` takes it.
      corruption: what draws the masks. The block estimator needs clean earlier blocks and blocks
        that are drawn uniformly.

    Raises:
      ValueError: with the pair found and what goes with the estimator.
    """
    if name not in PAIRINGS:
        raise ValueError(f'rl.estimator is {name!r}; use one of {", ".join(PAIRINGS)}')
    if corruption.kind not in PAIRINGS[name]:
        raise ValueError(
            f'rl.estimator {name!r} does not go with corruption.kind {corruption.kind!r}; '
            f"use corruption {' or '.join(PAIRINGS[name])}, or estimator 'released'"
        )
    if name == 'block' and corruption.perturb_completion:
        raise ValueError(
            "rl.estimator 'block' needs clean earlier blocks, found perturb_completion True; "
            "turn it off, or use estimator 'released'"
        )
    if name == 'block' and corruption.block_draw != 'balanced':
        raise ValueError(
            "rl.estimator 'block' needs blocks drawn uniformly, found corruption.block_draw "
            f"{corruption.block_draw!r}; use 'balanced', or estimator 'released'"
        )


def completion_log_probs(logits: Array, completion: Array) -> Array:
    """Log-probability of each completion token, in nats, in float32.

    Args:
      logits: [..., C, V], any float type, at the completion positions.
      completion: [C] int32.

    Returns:
      [..., C] float32.
    """
    index = jnp.broadcast_to(completion, logits.shape[:-1])[..., None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0].astype(jnp.float32)
    return chosen - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


def mixture(eubo: Array, elbo: Array, omega: float) -> Array:
    """omega * EUBO + (1 - omega) * ELBO, the negative estimate of SPG-Mixture; any shape."""
    return omega * eubo + (1.0 - omega) * elbo


def sequence_elbo(logp: Array, masked: Array, scored: Array, block: Array) -> Array:
    """Evidence lower bound, n * mean_k [ (1/|S_k|) sum_{i in S_k} logp_{k,i} ] (SPG)."""
    return _lower(logp, masked & scored[None, :], jnp.broadcast_to(scored.sum(), block.shape))


def sequence_eubo(logp: Array, masked: Array, scored: Array, block: Array, beta: float) -> Array:
    """Evidence upper bound of order beta (SPG eq. 7).

    (n/beta) * mean over positions masked in some draw of
    log mean_k [ 1(i in S_k) exp(beta logp_{k,i}) n/|S_k| ]. As in the paper the constant C(T) is
    left out: below beta = n this is an upper bound only up to that constant.
    """
    return _upper(logp, masked & scored[None, :], scored.sum(), beta, _PLAIN)


def sequence_loose_eubo(
    logp: Array, masked: Array, scored: Array, block: Array, beta: float
) -> Array:
    """`sequence_eubo` with log x replaced by its tangent x - 1 >= log x (SPG ablation)."""
    return _upper(logp, masked & scored[None, :], scored.sum(), beta, _TANGENT)


def sequence_strict_eubo(
    logp: Array, masked: Array, scored: Array, block: Array, beta: float
) -> Array:
    """`sequence_eubo` divided by max(beta, n) in place of beta: no constant, for every beta >= 1.

    Hoelder's inequality gives log p <= (1/n) sum_i log E[w 1 pi_i^n], and pi^n <= pi^beta for
    beta <= n because probabilities are at most 1.
    """
    return _upper(logp, masked & scored[None, :], scored.sum(), beta, _STRICT)


def block_elbo(logp: Array, masked: Array, scored: Array, block: Array, block_length: int) -> Array:
    """Lower bound of the block-autoregressive likelihood, log p = sum_b log p(x_b | x_<b).

    N_b * mean_k [ (n_b/|S_k|) sum_{i in S_k} logp_{k,i} ], with S_k inside the chosen block, N_b
    the blocks reached and n_b the scored positions in the chosen one.
    """
    masked, reached, lengths = _within_block(masked, scored, block, block_length)
    return reached * _lower(logp, masked, lengths)


def _within_block(
    masked: Array, scored: Array, block: Array, block_length: int
) -> tuple[Array, Array, Array]:
    """masked [M, C] cut to the chosen blocks, blocks reached [], scored positions in each [M]."""
    chosen = (jnp.arange(len(scored)) // block_length)[None, :] == block[:, None]
    chosen &= scored[None, :]
    return masked & chosen, -(-scored.sum() // block_length), chosen.sum(-1)


def _block_upper(logp, masked, scored, block, beta, block_length, form) -> Array:
    """N_b * mean over the blocks drawn of the bound within a block from that block's draws."""
    masked, reached, lengths = _within_block(masked, scored, block, block_length)
    same_block = block[:, None] == block[None, :]  # [M, M]

    def of_block(same: Array, length: Array) -> Array:
        return _upper(logp, masked & same[:, None], length, beta, form)

    values = jax.vmap(of_block)(same_block, lengths)
    # Draws of one block all hold that block's value: a share each, so that every block counts once.
    used = masked.any(-1)
    sharing = jnp.maximum((same_block & used[None, :]).sum(-1), 1)
    share = jnp.where(used, 1.0 / sharing, 0.0)
    return reached * (share * values).sum() / jnp.maximum(share.sum(), 1.0)


def _lower(logp: Array, masked: Array, length: Array) -> Array:
    """Mean over non-empty draws of length_k times the mean logp over S_k; length is [M]."""
    size = masked.sum(-1)
    total = jnp.where(masked, logp, 0.0).sum(-1)
    per_draw = length * total / jnp.maximum(size, 1)
    return per_draw.sum() / jnp.maximum((size > 0).sum(), 1)


class _Form(NamedTuple):
    """What an upper bound does with the mean over draws, and what it divides by."""

    tangent: bool  # log x replaced by x - 1
    strict: bool  # divided by max(beta, length) in place of beta


_PLAIN = _Form(tangent=False, strict=False)
_TANGENT = _Form(tangent=True, strict=False)
_STRICT = _Form(tangent=False, strict=True)


def _upper(logp: Array, masked: Array, length: Array, beta: float, form: _Form) -> Array:
    """Upper bound over the positions some draw masks, scaled up to all `length` of them."""
    size = masked.sum(-1, keepdims=True)
    draws = jnp.maximum((size > 0).sum(), 1)
    seen = masked.any(0)
    # In log space: p**beta underflows in float32, and log 0 would silently drop such tokens from
    # the mean. Positions no draw masked come out as -inf and are left out, values and gradients.
    weight = jnp.log(jnp.maximum(length, 1) / jnp.maximum(size, 1) / draws)
    log_terms = jnp.where(masked, beta * logp + weight, -jnp.inf)
    log_mean = jax.nn.logsumexp(log_terms, axis=0)
    per_token = jnp.expm1(log_mean) if form.tangent else log_mean
    order = jnp.maximum(beta, length) if form.strict else beta
    return length * jnp.where(seen, per_token, 0.0).sum() / jnp.maximum(seen.sum(), 1) / order

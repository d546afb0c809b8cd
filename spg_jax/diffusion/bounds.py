"""Bounds on the log-likelihood of ONE completion from its M draws, in nats per sequence.

Every bound takes these arguments:
  logp: [M, C] log-probability of each completion token under each draw, in nats.
  masked: [M, C] bool, the completion part of `Draws.masked`.
  scored: [C] bool, True from the first token through the first EOS; n = scored.sum().
  block: [M] int32, the chosen block of each draw. Only the block estimator reads it.

In the formulas, i is a position, k a draw, and S_k the set of positions that draw k masks and that
are scored. A draw whose S_k is empty carries no information and is left out; if no draw remains,
the bound is 0. Values and gradients are finite for every finite logp.

A comment such as `# [M, C]` after an assignment is the shape of the value: `M` draws, `C`
completion positions, `V` vocabulary; `[]` is a scalar.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import KINDS, Corruption
from spg_jax.errors import check_one_of

# Estimator -> the corruptions that it may be used with. 'paper' and 'block' bound a likelihood
# under these only; the released code uses its estimate with all of them.
PAIRINGS = {'released': KINDS, 'paper': ('uniform',), 'block': ('block',)}


class Estimator(NamedTuple):
    """The bounds of one estimator. Each returns a float32 scalar, in nats per sequence."""

    elbo: Callable[[Array, Array, Array, Array], Array]  # (logp, masked, scored, block)
    eubo: Callable[..., Array]  # (logp, masked, scored, block, beta)
    loose_eubo: Callable[..., Array]  # as eubo, with log x replaced by its tangent x - 1
    strict_eubo: Callable[..., Array]  # as eubo, but at least log p for every beta >= 1


def estimator(name: str, block_length: int) -> Estimator:
    """The estimator called `name`.

    Args:
      name: 'released' scores all masked tokens of every draw, as the code of SPG does; 'paper' is
        SPG as written, under `uniform` corruption; 'block' bounds the block-autoregressive
        likelihood, under `block` corruption with clean earlier blocks.
      block_length: completion positions in a block. Only 'block' reads it.

    Raises:
      ValueError: on an unknown name, or a block length below 1 with 'block'.
    """
    check_one_of('spg.estimator', name, PAIRINGS)
    if name != 'block':
        # Draws mask exact numbers of positions, so n/|S_k| is both the 1/t_k of the released code
        # and the paper's weight 1/t: one formula. `check_pairing` allows them other corruptions.
        return Estimator(sequence_elbo, sequence_eubo, sequence_loose_eubo, sequence_strict_eubo)
    if block_length < 1:
        raise ValueError(f'block_length is {block_length}; the block estimator needs at least 1')

    def elbo(logp, masked, scored, block, offset=0):
        return block_elbo(logp, masked, scored, block, block_length, offset)

    def upper(form):
        def bound(logp, masked, scored, block, beta, offset=0):
            return _block_upper(logp, masked, scored, block, beta, block_length, form, offset)

        return bound

    return Estimator(elbo, upper(_PLAIN), upper(_TANGENT), upper(_STRICT))


def check_pairing(name: str, corruption: Corruption) -> None:
    """Raises ValueError if an estimator bounds no likelihood under a corruption.

    Args:
      name: name of the estimator, as in `estimator`.
      corruption: the corruption that draws the masks. The block estimator needs one that leaves
        earlier blocks clean and chooses blocks uniformly. Both 'paper' and 'block' need positions
        that are chosen uniformly, without informed masking.
    """
    check_one_of('spg.estimator', name, PAIRINGS)
    if corruption.kind not in PAIRINGS[name]:
        raise ValueError(
            f'spg.estimator {name!r} does not go with corruption.kind {corruption.kind!r}; '
            f"use corruption {' or '.join(PAIRINGS[name])}, or estimator 'released'"
        )
    if name == 'block' and corruption.perturb_completion:
        raise ValueError(
            "spg.estimator 'block' needs clean earlier blocks, found perturb_completion True; "
            "turn it off, or use estimator 'released'"
        )
    if name == 'block' and corruption.block_draw != 'balanced':
        raise ValueError(
            "spg.estimator 'block' needs blocks drawn uniformly, found corruption.block_draw "
            f"{corruption.block_draw!r}; use 'balanced', or estimator 'released'"
        )
    if name != 'released' and corruption.informed:
        raise ValueError(
            f'spg.estimator {name!r} needs positions masked uniformly, found corruption.informed '
            "True; turn it off, or use estimator 'released'"
        )


def completion_log_probs(logits: Array, completion: Array) -> Array:
    """Log-probability of each completion token, in nats, in float32.

    Args:
      logits: [..., C, V], any float type, at the completion positions.
      completion: [C] int32.

    Returns:
      [..., C] float32.
    """
    index = jnp.broadcast_to(completion, logits.shape[:-1])[..., None]  # [..., C, 1]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0].astype(jnp.float32)  # [..., C]
    return chosen - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


def mixture(eubo: Array, elbo: Array, omega: float) -> Array:
    """The negative estimate of SPG-Mixture, omega * EUBO + (1 - omega) * ELBO, of any shape."""
    return omega * eubo + (1.0 - omega) * elbo


def sequence_elbo(logp: Array, masked: Array, scored: Array, block: Array) -> Array:
    """Evidence lower bound, n * mean_k [ (1/|S_k|) sum_{i in S_k} logp_{k,i} ] (SPG)."""
    return _lower(logp, masked & scored[None, :], jnp.broadcast_to(scored.sum(), block.shape))


def sequence_eubo(logp: Array, masked: Array, scored: Array, block: Array, beta: float) -> Array:
    """Evidence upper bound of order beta (SPG eq. 7).

    (n/beta) * mean_i log mean_k [ 1(i in S_k) exp(beta logp_{k,i}) n/|S_k| ], where mean_i runs
    over the positions that at least one draw masks. The constant C(T) is left out, as in the paper:
    for beta < n this is an upper bound only up to that constant.
    """
    return _upper(logp, masked & scored[None, :], scored.sum(), beta, _PLAIN)


def sequence_loose_eubo(
    logp: Array, masked: Array, scored: Array, block: Array, beta: float
) -> Array:
    """`sequence_eubo` with log x replaced by its tangent, x - 1 >= log x (ablation in SPG)."""
    return _upper(logp, masked & scored[None, :], scored.sum(), beta, _TANGENT)


def sequence_strict_eubo(
    logp: Array, masked: Array, scored: Array, block: Array, beta: float
) -> Array:
    """`sequence_eubo` divided by max(beta, n) instead of beta.

    In expectation this is an upper bound for every beta >= 1, without any constant: Hoelder's
    inequality gives log p <= (1/n) sum_i log E[w 1 pi_i^n], and pi^n <= pi^beta for beta <= n
    because probabilities are at most 1.
    """
    return _upper(logp, masked & scored[None, :], scored.sum(), beta, _STRICT)


def block_elbo(
    logp: Array,
    masked: Array,
    scored: Array,
    block: Array,
    block_length: int,
    offset: Array | int = 0,
) -> Array:
    """Lower bound of the block-autoregressive likelihood, log p = sum_b log p(x_b | x_<b).

    N_b * mean_k [ (n_b/|S_k|) sum_{i in S_k} logp_{k,i} ], where S_k is cut to the chosen block,
    N_b is the number of blocks that the completion reaches, and n_b the number of scored positions
    in the chosen block. The first block has `offset` positions before the completion.
    """
    masked, blocks_reached, block_lengths = _within_block(
        masked, scored, block, block_length, offset
    )
    return blocks_reached * _lower(logp, masked, block_lengths)


def _within_block(
    masked: Array, scored: Array, block: Array, block_length: int, offset: Array | int
) -> tuple[Array, Array, Array]:
    """What the block estimator reads instead of the whole completion.

    Returns:
      masked [M, C] cut to the chosen blocks, N_b [] the number of blocks reached, and n_b [M] the
      number of scored positions in each chosen block.
    """
    position = jnp.arange(len(scored)) + offset  # [C]
    block_of_position = (position // block_length)[None, :]  # [1, C]
    chosen = block_of_position == block[:, None]  # [M, C]
    chosen &= scored[None, :]
    return masked & chosen, -(-(scored.sum() + offset) // block_length), chosen.sum(-1)


def _block_upper(logp, masked, scored, block, beta, block_length, form, offset) -> Array:
    """Upper bound of the block-autoregressive likelihood.

    N_b * mean over the blocks drawn of `_upper` within the block, from the draws that chose it.
    """
    masked, blocks_reached, block_lengths = _within_block(
        masked, scored, block, block_length, offset
    )
    same_block = block[:, None] == block[None, :]  # [M, M]

    def bound_of_block(draw_chose_it: Array, block_length: Array) -> Array:
        """draw_chose_it: [M] bool; block_length: [] -> []."""
        return _upper(logp, masked & draw_chose_it[:, None], block_length, beta, form)

    values = jax.vmap(bound_of_block)(same_block, block_lengths)  # [M], the block of each draw
    # Draws that chose the same block repeat its value. Each gets an equal share of that block's
    # weight, so that every block counts once.
    nonempty = masked.any(-1)  # [M]
    draws_of_block = jnp.maximum((same_block & nonempty[None, :]).sum(-1), 1)  # [M]
    share = jnp.where(nonempty, 1.0 / draws_of_block, 0.0)  # [M]; sums to the blocks drawn
    return blocks_reached * (share * values).sum() / jnp.maximum(share.sum(), 1.0)


def _lower(logp: Array, masked: Array, length: Array) -> Array:
    """mean_k [ (n_k/|S_k|) sum_{i in S_k} logp_{k,i} ] over the draws whose S_k is not empty.

    Args:
      logp: [M, C].
      masked: [M, C], the sets S_k.
      length: [M], n_k.
    """
    size = masked.sum(-1)  # [M] |S_k|
    total = jnp.where(masked, logp, 0.0).sum(-1)  # [M] sum over S_k of logp
    per_draw = length * total / jnp.maximum(size, 1)  # [M]
    return per_draw.sum() / jnp.maximum((size > 0).sum(), 1)


class _Form(NamedTuple):
    """In what an upper bound departs from SPG eq. 7."""

    tangent: bool  # whether log x is replaced by x - 1
    strict: bool  # whether the bound is divided by max(beta, n) instead of beta


_PLAIN = _Form(tangent=False, strict=False)
_TANGENT = _Form(tangent=True, strict=False)
_STRICT = _Form(tangent=False, strict=True)


def _upper(logp: Array, masked: Array, length: Array, beta: float, form: _Form) -> Array:
    """(n/beta) * mean_i log mean_k [ 1(i in S_k) exp(beta logp_{k,i}) n/|S_k| ] (SPG eq. 7).

    mean_k leaves out draws whose S_k is empty; mean_i runs over U, the positions that at least one
    draw masks. `form` may change the formula.

    Args:
      logp: [M, C].
      masked: [M, C], the sets S_k.
      length: [], n.
    """
    size = masked.sum(-1, keepdims=True)  # [M, 1] |S_k|
    draws = jnp.maximum((size > 0).sum(), 1)  # [] number of draws in the mean over k
    seen = masked.any(0)  # [C] whether i is in U
    # The mean is taken in log space, because exp(beta logp) underflows in float32 and log 0 would
    # silently drop such tokens. Positions outside U become -inf; the last line leaves them out.
    log_weight = jnp.log(jnp.maximum(length, 1) / jnp.maximum(size, 1) / draws)  # [M, 1]
    log_terms = jnp.where(masked, beta * logp + log_weight, -jnp.inf)  # [M, C] terms of mean_k
    log_mean = jax.nn.logsumexp(log_terms, axis=0)  # [C] log mean_k [ ... ]
    per_token = jnp.expm1(log_mean) if form.tangent else log_mean  # [C] x - 1 or log x
    divisor = jnp.maximum(beta, length) if form.strict else beta  # []
    return length * jnp.where(seen, per_token, 0.0).sum() / jnp.maximum(seen.sum(), 1) / divisor

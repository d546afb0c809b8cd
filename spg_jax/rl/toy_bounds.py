"""Likelihood bounds of toys against their exact likelihoods: values, gradients and drift.

Letters of axes: `Q` prompts, `X` completions, `C` positions, `R` bounds, `K` masks, `O` orders, `M`
draws, `W` parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.diffusion import bounds, exact, informed
from spg_jax.diffusion.corruption import Corruption
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.rl.toys import (
    LENGTH,
    MASK,
    PROMPTS,
    SYMBOLS,
    Toy,
    law_gradients,
    laws,
    quick,
    through_jacobian,
)

STRENGTHS = (0.0, 0.5, 1.5, 3.0)  # d of informed masking
BETAS = (1.0, 1.5, 2.0, 4.0)
DRAWS = (1, 2, 4, 8, 16)
SETS = 128  # of draws of each completion, over which estimates are averaged

Chances = dict[str, Array]  # the laws of masks [K] of one completion, by `_chance`


class Bound(NamedTuple):
    """What an estimate of a likelihood is on average, on toys whose likelihoods are exact.

    Averages are over completions as the decoder samples them, over prompts and over toys.
    """

    name: str
    masks: str
    value: float  # nats of a completion
    over_random: float  # the value minus the log-likelihood of tokens in random order, nats
    over_blocks: float  # minus that of blocks in order, tokens in random order inside
    over_decoder: float  # minus the log-probability under the decoder
    cosine_random: float  # of its gradient with that of the log-likelihood in random order
    cosine_blocks: float
    cosine_decoder: float
    drift: float  # the norm of the mean gradient, as a share of a gradient's root mean square
    # The norm of the mean of its gradient minus that of the ELBO under the same masks, as a share
    # of the root mean square of the latter. If better completions get the ELBO and worse ones this
    # estimate, every update moves by that times the sum of positive advantages; centred, by 0.
    apart: float


class Spread(NamedTuple):
    """What an estimate of a bound from M draws is, against the value for infinitely many."""

    name: str
    masks: str
    draws: int
    bias: float  # nats
    std: float  # nats, over draws


class Estimate(NamedTuple):
    """A bound without noise, as a function of the token table of one completion."""

    name: str
    masks: str
    value: Callable[[Array, Chances], Array]  # (logp [2**C, C], laws of masks) -> nats []


def measure(toys: list[Toy], decoding: SamplingConfig) -> list[Bound]:
    """Every bound, by enumeration of completions, of orders of commitment and of masks.

    Args:
      toys: whose policies are read out.
      decoding: the decoder that samples completions, one token a step; informed masking takes the
        influence of tokens from its steps.
    """
    estimates = every_estimate(decoding.block_length)

    def values_of(logp: Array, chances: Chances) -> Array:
        return jnp.stack([estimate.value(logp, chances) for estimate in estimates])  # [R]

    def read(table: Array) -> tuple[Any, ...]:
        law, slopes = law_gradients(table, decoding)
        logp = _token_tables(table)  # [Q, X, 2**C, C]
        chances = _laws_of_masks(table, decoding)
        twice = jax.vmap(jax.vmap(values_of)), jax.vmap(jax.vmap(jax.jacrev(values_of)))
        return law, slopes, twice[0](logp, chances), twice[1](logp, chances)

    compiled = quick(read, toys[0].table)
    names = [('log p', 'decoder'), *((each.name, each.masks) for each in estimates)]
    partners = [0]  # of each estimate, the last one before it that is no upper bound
    for index, (name, _) in enumerate(names[1:], 1):
        partners.append(partners[-1] if name.startswith('EUBO') else index)
    per_toy = []
    for toy in toys:
        law, slopes, values, jacobians = compiled(toy.table)  # jacobians [Q, X, R, 2**C, C]
        gradients = jnp.einsum('qxrmc,qxmcw->qxrw', jacobians, _token_slopes(toy))
        law = np.asarray(law)
        share = np.asarray(through_jacobian(slopes, toy)) / np.maximum(law, 1e-30)[..., None]
        truth = (np.log(np.maximum(law, 1e-30)), np.where(law[..., None] > 0, share, 0.0))
        per_toy.append(_averages(law, np.asarray(values), np.asarray(gradients), truth, partners))
    means = np.mean(per_toy, axis=0).tolist()  # [R + 1, 9]
    return [Bound(*name, *row) for name, row in zip(names, means, strict=True)]


def _averages(
    law: np.ndarray,
    values: np.ndarray,
    gradients: np.ndarray,
    truth: tuple[np.ndarray, np.ndarray],
    partners: list[int],
) -> list[list[float]]:
    """The figures of `Bound`, first of the decoder's own log-probability.

    Args:
      law: [Q, X].
      values, gradients: [Q, X, R] and [Q, X, R, W]; the first two are the exact likelihoods.
      truth: log-probability [Q, X] under the decoder, and its gradient [Q, X, W].
      partners: of each row of the result, that with which `Bound.apart` compares it.
    """
    weight = law / law.sum()  # [Q, X]

    def average(x: np.ndarray) -> float:
        return float(np.where(law > 0, weight * x, 0.0).sum())

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return average((a * b).sum(-1) / np.maximum(norms, 1e-30))

    def drift(gradient: np.ndarray, unit: np.ndarray) -> float:
        means = (law[..., None] * gradient).sum(1)  # [Q, W], of each prompt
        mean_square = average((unit**2).sum(-1))
        return float(np.sqrt((means**2).sum(-1).mean() / mean_square))

    rows = [truth, *((values[..., r], gradients[:, :, r]) for r in range(values.shape[-1]))]
    truths = (rows[1], rows[2], truth)
    return [
        [
            average(value),
            *(average(value - exact_value) for exact_value, _ in truths),
            *(cosine(gradient, exact_gradient) for _, exact_gradient in truths),
            drift(gradient, gradient),
            drift(gradient - rows[partner][1], rows[partner][1]),
        ]
        for (value, gradient), partner in zip(rows, partners, strict=True)
    ]


def every_estimate(block_length: int) -> list[Estimate]:
    """The exact likelihoods in random order and in blocks, and then every bound."""
    estimates = [
        Estimate('log p', 'random order', lambda logp, _: exact.any_order(logp, range(LENGTH))),
        Estimate('log p', 'blocks', lambda logp, _: exact.block_wise(logp, block_length)),
    ]
    for kind in ('uniform', 'block'):
        for strength in (None, *STRENGTHS):
            estimates += _bounds(
                kind, strength, block_length, BETAS if strength is None else (1.5,)
            )
    estimates += _bounds('block', None, block_length, (1.5,), released=True)
    return [*estimates, Estimate('one step', 'full', lambda logp, _: logp[-1].sum())]


def _bounds(
    kind: str,
    strength: float | None,
    block_length: int,
    betas: tuple[float, ...],
    released: bool = False,
) -> list[Estimate]:
    """The ELBO and EUBOs under one law of masks.

    Args:
      kind: 'uniform' or 'block'.
      strength: d of informed masking, or None without.
      block_length: b.
      betas: orders of the EUBO.
      released: whether all masked tokens are scored under 'block' too, as the released code does.
    """
    within = block_length if kind == 'block' and not released else 0
    estimator = bounds.estimator('block' if within else 'released', block_length)
    base = exact.uniform_masks(LENGTH, block_length if kind == 'block' else LENGTH)
    key = _chance(kind, strength)
    masks = kind if strength is None else f'{kind}, informed d={strength:g}'
    mark = ', released' if released else ''

    def elbo(logp: Array, chances: Chances) -> Array:
        return exact.expected_elbo(logp, base._replace(probability=chances[key]), estimator.elbo)

    def eubo(beta: float) -> Callable[[Array, Chances], Array]:
        return lambda logp, chances: exact.eubo_of_all_draws(
            logp, base._replace(probability=chances[key]), beta, within
        )

    uppers = [Estimate(f'EUBO {beta:g}{mark}', masks, eubo(beta)) for beta in betas]
    return [Estimate(f'ELBO{mark}', masks, elbo), *uppers]


def _chance(kind: str, strength: float | None) -> str:
    """The name of a law of masks."""
    return kind if strength is None else f'{kind} {strength:g}'


def _token_tables(table: Array) -> Array:
    """log pi of every token of every completion under every mask, [Q, X, 2**C, C]."""
    log_prob = jax.nn.log_softmax(table[:PROMPTS], axis=-1)
    return jax.vmap(lambda x: exact.token_table(x, LENGTH, SYMBOLS))(log_prob)


@jax.jit
def _token_slopes(toy: Toy) -> Array:
    """The derivatives of `_token_tables` with respect to the parameters, [Q, X, 2**C, C, W]."""
    states = exact.masked_states(LENGTH, SYMBOLS)[:, :, None]  # [X, 2**C, 1]
    places = np.arange(LENGTH)[None, None]
    tokens = exact.every_completion(LENGTH, SYMBOLS)[:, None]  # [X, 1, C]
    jacobian = toy.jacobian.reshape(*toy.table.shape, -1)[:PROMPTS]  # [Q, N, C, V, W]
    mean = jnp.einsum('qncv,qncvw->qncw', jax.nn.softmax(toy.table[:PROMPTS], axis=-1), jacobian)
    return jacobian[:, states, places, tokens] - mean[:, states, places]


def _laws_of_masks(table: Array, decoding: SamplingConfig) -> Chances:
    """The law of masks of each completion, by the name of `_chance`, [Q, X, K].

    Informed masks depend on the order in which the tokens of a completion were committed, over
    which the law is averaged as the decoder makes it.
    """

    def of_prompt(logits: Array) -> Chances:
        orders, joint = exact.path_law(logits, decoding, SYMBOLS, MASK)  # [X, O]
        share = joint / jnp.maximum(joint.sum(-1, keepdims=True), 1e-30)
        top = jax.nn.softmax(logits, axis=-1)[..., :SYMBOLS].max(-1)  # [N, C]
        confidence = top[exact.masked_states(LENGTH, SYMBOLS)]  # [X, 2**C, C]
        influence = exact.influence_along(confidence, orders, informed.WINDOW)  # [X, O, C]
        chances = {}
        for kind, length in (('uniform', LENGTH), ('block', decoding.block_length)):
            plain = exact.uniform_masks(LENGTH, length).probability  # [K]
            chances[kind] = jnp.broadcast_to(plain[None], (len(joint), len(plain)))
            for strength in STRENGTHS:

                def chance(influence: Array, length: int = length, d: float = strength) -> Array:
                    return exact.informed_masks(influence, length, d).probability

                each = jax.vmap(jax.vmap(chance))(influence)  # [X, O, K]
                chances[_chance(kind, strength)] = jnp.einsum('xo,xok->xk', share, each)
        return chances

    return jax.lax.stop_gradient(jax.lax.map(of_prompt, table[:PROMPTS]))


def spreads(toys: list[Toy], decoding: SamplingConfig) -> list[Spread]:
    """The bias and spread of estimates from M draws of the real corruptions, over random draws.

    The completions are those of the decoder, as in `measure`.
    """
    rows = []
    for kind in ('uniform', 'block'):
        compiled = quick(_make_spread(kind, decoding), toys[0].table)
        per_toy = [np.stack(compiled(toy.table)) for toy in toys]  # [2, DRAWS, bounds]
        bias, variance = np.mean(per_toy, axis=0)
        names = ('ELBO', *(f'EUBO {beta:g}' for beta in BETAS))
        rows += [
            Spread(name, kind, draws, float(bias[d, n]), float(variance[d, n]) ** 0.5)
            for n, name in enumerate(names)
            for d, draws in enumerate(DRAWS)
        ]
    return rows


def _make_spread(kind: str, decoding: SamplingConfig) -> Callable[[Array], tuple[Array, Array]]:
    """A function from the table of a toy to the biases and variances [DRAWS, 1 + BETAS]."""
    within = decoding.block_length if kind == 'block' else 0
    corruption = Corruption(
        kind, max(DRAWS), decoding.block_length, prompt_rate=0.0, perturb_completion=False
    )
    estimator = bounds.estimator('block' if within else 'released', decoding.block_length)
    masks = exact.uniform_masks(LENGTH, within or LENGTH)
    scored = jnp.ones(LENGTH, bool)
    orders = jnp.asarray(BETAS)

    def of_set(rows: Array, masked: Array, block: Array) -> Array:
        """rows [M, C], masked [M, C], block [M] -> [1 + BETAS]."""
        upper = jax.vmap(lambda beta: estimator.eubo(rows, masked, scored, block, beta))(orders)
        return jnp.append(upper, estimator.elbo(rows, masked, scored, block))

    def spread(table: Array) -> tuple[Array, Array]:
        logps = _token_tables(table)
        law = laws(table, decoding).reshape(-1) / PROMPTS  # [Q X]

        def of_completion(piece: tuple[Array, Array]) -> tuple[Array, Array]:
            logp, key = piece
            keys = jax.random.split(key, SETS)
            drawn = jax.vmap(corruption, (0, None, None))(keys, jnp.zeros(0, bool), scored)
            bits = (drawn.masked * 2 ** np.arange(LENGTH)[None, None]).sum(-1)  # [sets, M]
            rows = logp[bits]  # [sets, M, C]
            limit = [exact.expected_elbo(logp, masks, estimator.elbo)]
            limit += [exact.eubo_of_all_draws(logp, masks, beta, within) for beta in BETAS]
            # Draw k is the same whatever M is, so that fewer draws are the first of many.
            values = jnp.stack(
                [
                    jax.vmap(of_set)(rows[:, :m], drawn.masked[:, :m], drawn.block[:, :m])
                    for m in DRAWS
                ]
            )  # [DRAWS, sets, BETAS + 1]
            values = jnp.roll(values, 1, axis=-1)  # The ELBO comes first.
            return values.mean(1) - jnp.stack(limit)[None], values.var(1)

        pieces = logps.reshape(-1, *logps.shape[2:]), jax.random.split(jax.random.key(5), len(law))
        figures = jax.lax.map(of_completion, pieces)
        return jax.tree.map(lambda x: jnp.einsum('x,xdn->dn', law, x), figures)

    return spread

"""GDSD and GDSD-TLC (arXiv 2605.29398; GaryBall/GDSD @ 3fb6780): a regression on the advantage.

With the pairs of masks of ESPO, and the score of a pair k, in which every token counts once,

    s_k = 1/2 sum_{i <= C} l_{k,i}
    loss = mean_j sum_k (clamp(s_k - s_k,old, log(1 - e), log(1 + e)) / C - p A_j)^2
           + b mean_{j,k} (s_k - s_k,ref)^2 / (2 C)

`weights='tlc'` weighs the tokens as ESPO does, by (C + 1) / (number masked with it), so that s_k is
in nats of a sequence. The clamp is of a difference of log-likelihoods and not of a ratio; outside
it the gradient is that of the divergence alone. Advantages have the mean of the other completions
as their baseline. Tokens after the EOS count as any others.

The released code also centres logits before a softmax in GDSD-TLC, and refreshes its reference
under adapters. Neither changes anything, and both are left out. The default of `kl` is that of
GSM8K; other maths tasks have 1e-4, with a learning rate of 1e-5.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax import Array

from spg_jax.errors import check_one_of
from spg_jax.rl.advantages import leave_one_out
from spg_jax.rl.objectives.espo import spread_pairs
from spg_jax.rl.objectives.objective import Batch, Loss, Objective, Protocol, never, setting
from spg_jax.rl.objectives.ratios import k2
from spg_jax.rl.objectives.sequences import draw_scores

WEIGHTS = ('equal', 'tlc')
RECIPE = {
    'rl.inner_updates': 8,
    'optimizer.learning_rate': 3e-6,
    'optimizer.schedule': 'constant',
    'sampling.temperature': 1.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of GDSD."""

    epsilon: float = setting(4e-4, 'changes are clamped to log(1 - epsilon) and log(1 + epsilon)')
    strength: float = setting(10.0, 'p; the change per token is drawn to p times the advantage')
    kl: float = setting(1e-3, 'weight of the k2 estimate of the divergence from the base policy')
    weights: str = setting('equal', 'how tokens of a pair are weighed: equal or tlc')
    pairs: int = setting(2, 'pairs of a mask and its complement for each sequence')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if a setting has no meaning.
    """
    check_one_of('gdsd.weights', settings.weights, WEIGHTS)
    if not 0 < settings.epsilon < 1:
        raise ValueError(
            f'gdsd.epsilon is {settings.epsilon}; changes are clamped to log(1 - epsilon), use a '
            'number between 0 and 1'
        )

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C], pairs being neighbours."""
        rows, _, length = logp.shape
        if settings.weights == 'equal':
            equal = jnp.full_like(batch.draws.weight, 0.5)
            batch = batch.replace(draws=batch.draws.replace(weight=equal))

        def scores(readouts: Array) -> Array:
            return draw_scores(readouts, batch).reshape(rows, settings.pairs, 2).sum(-1)

        change = scores(logp) - scores(batch.others['behaviour'])  # [b, pairs] nats
        low, high = jnp.log1p(-settings.epsilon), jnp.log1p(settings.epsilon)
        target = settings.strength * batch.advantage[:, None]
        losses = jnp.square(jnp.clip(change, low, high) / length - target).sum(-1)  # [b]
        clamped = ((change < low) | (change > high)).sum().astype(jnp.float32)
        metrics = {'clip_share': (clamped, jnp.float32(change.size))}
        if settings.kl:
            divergence = k2(scores(batch.others['reference']) - scores(logp)).mean(-1) / length
            losses += settings.kl * divergence
            metrics['kl'] = (divergence.sum(), jnp.float32(rows))
        return Loss(total=losses.sum(), weight=jnp.float32(rows), metrics=metrics)

    return Objective(
        corruption=partial(spread_pairs, pairs=settings.pairs, rows=protocol.batching.rows),
        draws=2 * settings.pairs,
        loss=loss,
        advantage=leave_one_out,
        behaviour=True,
        refuses={
            'rl.clip': 'it clamps changes of log-likelihoods already, to gdsd.epsilon',
            'rl.advantage=raw': 'changes of log-likelihoods are drawn to the advantages, and '
            'cannot all be positive; use one whose sum over a group is zero',
        },
        looks_at=('reference',) if settings.kl else (),
        kept={'reference': never} if settings.kl else {},
    )

"""SPG, Sandwiched Policy Gradient (arXiv 2510.09541, eq. 3 to 8; released code).

    loss = -sum_j A_j L_j / sum_j n_j,    L_j = ELBO_j if A_j > 0, else the negative estimate

A_j is the reward of completion j minus the mean of its group; n_j is the length of the completion.

The advantages of a group sum to zero, which cancels what all its completions share, as long as both
signs use one functional. With the ELBO above and the EUBO below, a part in one direction is left in
every update. `baseline='each'` centres each functional by itself, at no cost: with A+ = max(A, 0),
A- = min(A, 0) and a the mean of A+ in the group,

    loss = -sum_j [(A+_j - a) ELBO_j + (A-_j + a) U_j] / sum_j n_j

which is the published loss where U is the ELBO.

Left out is an omega that adapts itself to minimise the variance of the gradient (Proposition 1).
With its exact moments, which no rule for training has, nothing was gained (docs/results.md).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion import bounds
from spg_jax.errors import check_one_of
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Objective,
    Protocol,
    configured,
    setting,
    without_advantage,
)

UPPER = {'plain': 'eubo', 'strict': 'strict_eubo', 'loose': 'loose_eubo'}
NEGATIVES = ('mixture', 'eubo', 'elbo', 'none')
BASELINES = ('advantage', 'each')
NOT_CENTRED = "spg.baseline 'each' needs advantages whose sum over a group is zero"
RECIPE = {
    'rl.group_size': 6,
    'rl.inner_updates': 4,
    'corruption.kind': 'block',
    'corruption.draws': 2,
    'optimizer.learning_rate': 3e-6,
    'optimizer.schedule': 'constant',
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of SPG, as in the released scripts for the mixture."""

    negative: str = setting('mixture', 'bound for worse completions: mixture, eubo, elbo or none')
    # 'paper' goes with uniform corruption and 'block' with block corruption.
    estimator: str = setting('released', 'how draws become bounds: released, paper or block')
    bound: str = setting('plain', 'which upper bound (EUBO) is used: plain, strict or loose')
    beta: float = setting(1.5, 'the Renyi order of the EUBO, at least 1')
    omega: float = setting(0.5, 'the share of the EUBO in the mixture; the ELBO has the rest')
    baseline: str = setting('advantage', 'what is centred: the advantage, or each functional')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the SPG objective.

    With the block estimator the completion tokens of earlier blocks are not perturbed.

    Raises:
      ValueError: if a setting has no meaning, or the estimator bounds no likelihood under this
        corruption; the message names the setting.
    """
    check_one_of('spg.negative', settings.negative, NEGATIVES)
    check_one_of('spg.bound', settings.bound, UPPER)
    if not 1 <= settings.beta < math.inf:
        raise ValueError(f'spg.beta is {settings.beta}; the Renyi order of the EUBO is at least 1')
    if not 0 <= settings.omega <= 1:
        raise ValueError(f'spg.omega is {settings.omega}; a share lies within [0, 1]')
    check_one_of('spg.baseline', settings.baseline, BASELINES)
    corruption = dataclasses.replace(
        protocol.corruption, perturb_completion=settings.estimator != 'block'
    )
    bounds.check_pairing(settings.estimator, corruption)
    estimator = bounds.estimator(settings.estimator, corruption.block_length)
    group_size = protocol.batching.group_size if settings.baseline == 'each' else 0
    return Objective(
        corruption=configured(corruption),
        draws=corruption.draws,
        records=corruption.records,
        couples='group' if group_size else 'row',
        refuses={'rl.advantage=raw': NOT_CENTRED} if group_size else {},
        loss=partial(
            spg_loss,
            lower=estimator.elbo,
            upper=partial(getattr(estimator, UPPER[settings.bound]), beta=settings.beta),
            negative=settings.negative,
            omega=settings.omega,
            group_size=group_size,
            in_blocks=settings.estimator == 'block',
        ),
        idle=partial(without_gain, group_size=group_size),
    )


def spg_loss(
    logp: Array,
    batch: Batch,
    *,
    lower: Callable[..., Array],
    upper: Callable[..., Array],
    negative: str,
    omega: float,
    group_size: int = 0,
    in_blocks: bool = False,
) -> Loss:
    """The sum -sum_j A_j L_j over the rows, and its weight sum_j n_j.

    The loss raises the ELBO of a completion that is better than its group (A_j > 0). It lowers the
    estimate `negative` of a worse one, which should be an upper bound, because a lower bound can
    fall while the likelihood does not. There is no importance ratio, no clipping and no KL. The
    released code averages the ratio of sum and weight over microbatches of 6; here the whole batch
    has one ratio.

    Args:
      logp: [B, M, C] log-probabilities of the completion tokens under each draw, in nats.
      batch: the rows and their draws.
      lower, upper: the ELBO and the EUBO of one example, (logp, masked, scored, block) -> nats.
      negative: 'mixture', 'eubo', 'elbo' or 'none'.
      omega: share of the EUBO in the mixture.
      in_blocks: whether the bounds are those of blocks, which may begin before the completion.
      group_size: G, if each functional is centred within its group by itself; 0 if not.
    """

    def estimate(bound: Callable[..., Array]) -> Array:
        """A bound of each row, [b]."""
        examples = logp, batch.masked, batch.scored, batch.block
        if batch.draws.offset is None or not in_blocks:
            return jax.vmap(bound)(*examples)
        offset = batch.draws.offset[:, 0]  # [b]
        return jax.vmap(lambda offset, *row: bound(*row, offset=offset))(offset, *examples)

    elbo, eubo = estimate(lower), estimate(upper)
    estimates = {
        'mixture': bounds.mixture(eubo, elbo, omega),
        'eubo': eubo,
        'elbo': elbo,
        'none': jnp.zeros_like(elbo),
    }
    better = batch.advantage > 0
    total = -(batch.advantage * jnp.where(better, elbo, estimates[negative])).sum()
    if group_size:
        of_elbo, of_negative = centred_parts(batch.advantage, group_size)
        total = -(of_elbo * elbo + of_negative * estimates[negative]).sum()
    length = batch.scored.sum(axis=1).astype(jnp.float32)
    tokens, rows = length.sum(), jnp.float32(len(length))
    worse = (batch.advantage < 0).astype(jnp.float32)
    return Loss(
        total=total,
        weight=tokens,
        metrics={
            'elbo': (elbo.sum(), tokens),
            'eubo': (eubo.sum(), tokens),
            'eubo_minus_elbo': ((eubo - elbo).sum(), tokens),
            'elbo_of_better': (jnp.where(better, elbo, 0.0).sum(), (better * length).sum()),
            'elbo_of_worse': ((worse * elbo).sum(), (worse * length).sum()),
            'share_better': (better.sum().astype(jnp.float32), rows),
        },
    )


def centred_parts(advantage: Array, group_size: int) -> tuple[Array, Array]:
    """A+ - a and A- + a, the factors of the ELBO and of the negative estimate, each [b]."""
    gain = jnp.maximum(advantage, 0.0)  # [b] A+
    mean_gain = gain.reshape(-1, group_size).mean(axis=1)  # [b / G] a
    mean_gain = jnp.repeat(mean_gain, group_size)  # [b]
    return gain - mean_gain, jnp.minimum(advantage, 0.0) + mean_gain


def without_gain(batch: Batch, group_size: int) -> Array:
    """[B] bool, the rows that no bound is raised or lowered for.

    With `baseline='each'` a row without an advantage in a group with one still has two factors.
    Under `negative='none'` worse rows move nothing either; they stay, so that the log shows what
    becomes of their likelihood.
    """
    if not group_size:
        return without_advantage(batch)
    of_elbo, of_negative = centred_parts(batch.advantage, group_size)
    return (of_elbo == 0) & (of_negative == 0)

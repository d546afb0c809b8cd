"""SPG, Sandwiched Policy Gradient (arXiv 2510.09541, eq. 3 to 8; released code).

    loss = -sum_j A_j L_j / sum_j n_j,    L_j = ELBO_j if A_j > 0, else the negative estimate

A_j is the reward of completion j minus the mean of its group; n_j is the length of the completion.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion import bounds
from spg_jax.diffusion.corruption import Corruption
from spg_jax.errors import check_one_of
from spg_jax.rl.objectives.objective import Batch, Loss, Objective

UPPER = {'plain': 'eubo', 'strict': 'strict_eubo', 'loose': 'loose_eubo'}
NEGATIVES = ('mixture', 'eubo', 'elbo', 'none')


class Settings(NamedTuple):
    """The numbers of SPG."""

    negative: str  # the estimate for worse completions, one of NEGATIVES
    estimator: str  # how draws become bounds; see `spg_jax.diffusion.bounds`
    bound: str  # the upper bound, a key of UPPER
    beta: float  # Renyi order of the EUBO
    omega: float  # share of the EUBO in the mixture


def build(settings: Settings, corruption: Corruption) -> Objective:
    """Makes the SPG objective.

    With the block estimator the completion tokens of earlier blocks are not perturbed.

    Raises:
      ValueError: if a setting has no meaning, or the estimator bounds no likelihood under this
        corruption; the message names the setting.
    """
    check_one_of('rl.negative', settings.negative, NEGATIVES)
    check_one_of('rl.bound', settings.bound, UPPER)
    if not 1 <= settings.beta < math.inf:
        raise ValueError(f'rl.beta is {settings.beta}; the Renyi order of the EUBO is at least 1')
    if not 0 <= settings.omega <= 1:
        raise ValueError(f'rl.omega is {settings.omega}; a share lies within [0, 1]')
    corruption = dataclasses.replace(corruption, perturb_completion=settings.estimator != 'block')
    bounds.check_pairing(settings.estimator, corruption)
    estimator = bounds.estimator(settings.estimator, corruption.block_length)
    return Objective(
        corruption=corruption,
        loss=partial(
            spg_loss,
            lower=estimator.elbo,
            upper=partial(getattr(estimator, UPPER[settings.bound]), beta=settings.beta),
            negative=settings.negative,
            omega=settings.omega,
        ),
    )


def spg_loss(
    logp: Array,
    batch: Batch,
    *,
    lower: Callable[[Array, Array, Array, Array], Array],
    upper: Callable[[Array, Array, Array, Array], Array],
    negative: str,
    omega: float,
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
    """
    elbo = jax.vmap(lower)(logp, batch.masked, batch.scored, batch.block)
    eubo = jax.vmap(upper)(logp, batch.masked, batch.scored, batch.block)
    estimates = {
        'mixture': bounds.mixture(eubo, elbo, omega),
        'eubo': eubo,
        'elbo': elbo,
        'none': jnp.zeros_like(elbo),
    }
    better = batch.advantage > 0
    bound = jnp.where(better, elbo, estimates[negative])
    length = batch.scored.sum(axis=1).astype(jnp.float32)
    tokens, rows = length.sum(), jnp.float32(len(length))
    worse = (batch.advantage < 0).astype(jnp.float32)
    return Loss(
        total=-(batch.advantage * bound).sum(),
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

"""SPG, Sandwiched Policy Gradient (arXiv 2510.09541, eq. 3 to 8; released code)."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
from jax import Array

from spg_jax.config import corruption_of
from spg_jax.diffusion import bounds
from spg_jax.rl.objectives.objective import Batch, Loss, Objective

UPPER = {'plain': 'eubo', 'strict': 'strict_eubo', 'loose': 'loose_eubo'}
NEGATIVES = ('mixture', 'eubo', 'elbo', 'none')


def build(config: ml_collections.ConfigDict) -> Objective:
    """The SPG objective of a configuration (groups `rl`, `corruption`, `sampling`).

    Raises:
      ValueError: on a setting it cannot use; names the key.
    """
    for key, value, known in (
        ('negative', config.rl.negative, NEGATIVES),
        ('bound', config.rl.bound, tuple(UPPER)),
    ):
        if value not in known:
            raise ValueError(f'rl.{key} is {value!r}; use one of {", ".join(known)}')
    if not 1 <= config.rl.beta < math.inf:
        raise ValueError(f'rl.beta is {config.rl.beta}; the Renyi order of the EUBO is at least 1')
    if not 0 <= config.rl.omega <= 1:
        raise ValueError(f'rl.omega is {config.rl.omega}; a share lies within [0, 1]')
    estimator = bounds.estimator(config.rl.estimator, config.sampling.block_length)
    return Objective(
        corruption=corruption_of(config),
        loss=partial(
            spg_loss,
            lower=estimator.elbo,
            upper=partial(getattr(estimator, UPPER[config.rl.bound]), beta=config.rl.beta),
            negative=config.rl.negative,
            omega=config.rl.omega,
        ),
    )


def spg_loss(logp: Array, batch: Batch, *, lower, upper, negative: str, omega: float) -> Loss:
    """-sum_j A_j L_j over the rows and its weight sum_j n_j, n_j the length of completion j.

    L_j is the ELBO of a completion better than its group (A_j > 0), otherwise `negative`: what is
    pushed down must lie above the log-likelihood, or pushing it down teaches nothing. No
    importance ratio, no clipping, no KL. The released code averages the ratio over microbatches of
    6; here it is one ratio.

    Args:
      logp: [B, M, C] log-probabilities of the completion tokens under each draw, in nats.
      batch: the rows and their draws.
      lower, upper: ELBO and EUBO of one example, (logp, masked, scored, block) -> nats.
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

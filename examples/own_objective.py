"""Advantage-weighted likelihood (arXiv 1910.00177) for masked diffusion: imitate what was better.

    loss = -sum_j w_j ELBO_j / sum_j n_j,    w_j = exp(A_j / temperature)

A_j is the reward of completion j minus the mean of its group, n_j its length, and ELBO_j a lower
bound of its log-likelihood in nats, n_j times the mean over draws of the mean over masked tokens.
All weights are positive, so nothing is pushed down and the lower bound is enough. Run it with

    python -m spg_jax.train --config=countdown --config.rl.objective=examples.own_objective
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from spg_jax.rl.objectives import Batch, Loss, Objective, Protocol
from spg_jax.rl.objectives.objective import configured, setting

RECIPE = {}


@dataclasses.dataclass(frozen=True)
class Settings:
    temperature: float = setting(0.3, 'the advantage that weighs e times as much as none')


def build(settings: Settings, protocol: Protocol) -> Objective:
    if settings.temperature <= 0:
        raise ValueError(f'own_objective.temperature is {settings.temperature}; use more than 0')

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C] log-probabilities of the tokens under each draw, in nats."""
        length = batch.scored.sum(axis=1)  # [b] n_j
        masked = jnp.maximum(batch.target.sum(axis=2), 1)  # [b, M]
        per_token = jnp.where(batch.target, logp, 0.0).sum(axis=2) / masked
        elbo = length * per_token.mean(axis=1)  # [b]
        weight = jnp.exp(batch.advantage / settings.temperature)
        tokens = length.sum().astype(jnp.float32)
        return Loss(-(weight * elbo).sum(), tokens, {'elbo': (elbo.sum(), tokens)})

    return Objective(configured(protocol.corruption), protocol.corruption.draws, loss)

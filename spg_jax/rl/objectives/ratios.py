"""What several objectives are made of: clipped ratios, distances between policies, advantages."""

import jax.numpy as jnp
from jax import Array

from spg_jax.rl.objectives.objective import PPO, UNCONDITIONAL, Batch, Loss, Metrics


def clipped(
    log_ratio: Array, advantage: Array, low: float, high: float | None = None, clip: str = PPO
) -> Array:
    """min(r A, clip(r, 1 - low, 1 + high) A) of PPO (arXiv 1707.06347, eq. 7), r = exp(log_ratio).

    Unconditional clipping is clip(r, 1 - low, 1 + high) A. It also stops the gradient of a ratio
    that the advantage would bring back into the range.

    Args:
      log_ratio: log of the ratio of policy to behaviour, of any shape.
      advantage: of the same shape, or one that broadcasts to it.
      low, high: the clip range; `high` is `low` where it is None.
      clip: 'ppo' or 'unconditional'.
    """
    ratio = jnp.exp(log_ratio)
    limited = jnp.clip(ratio, 1.0 - low, 1.0 + (low if high is None else high))
    if clip == UNCONDITIONAL:
        return limited * advantage
    return jnp.minimum(ratio * advantage, limited * advantage)


def is_clipped(
    log_ratio: Array, advantage: Array, low: float, high: float | None = None, clip: str = PPO
) -> Array:
    """Where `clipped` stops the gradient, bool."""
    ratio = jnp.exp(log_ratio)
    top = 1.0 + (low if high is None else high)
    if clip == UNCONDITIONAL:
        return ((ratio > top) | (ratio < 1.0 - low)) & (advantage != 0)
    over = (ratio > top) & (advantage > 0)
    return over | ((ratio < 1.0 - low) & (advantage < 0))


def k2(log_ratio: Array) -> Array:
    """Half the square of log(other / policy), an estimate of their divergence (Schulman, 2020)."""
    return 0.5 * jnp.square(log_ratio)


def k3(log_ratio: Array) -> Array:
    """e^x - x - 1 with x = log(other / policy), an estimate of their divergence that is never
    negative (Schulman, 2020)."""
    return jnp.expm1(log_ratio) - log_ratio


def token_losses(
    logp: Array, batch: Batch, epsilon: float, kl: float, to: str = 'reference'
) -> tuple[Array, Metrics]:
    """The clipped loss of each token, -min(r A, clip(r) A) + kl k3; 0 outside `batch.target`.

    How the ratio is clipped is `batch.clip`.

    Args:
      logp: [b, M, C] of the policy.
      batch: the rows, with the readouts 'behaviour' among the others.
      epsilon: the clip range of the ratio r of policy to behaviour.
      kl: weight of the divergence; with 0 no other policy is looked at.
      to: the policy whose divergence from this one is estimated.

    Returns:
      ([b, M, C], metrics clip_share and, with a weight, kl).
    """
    advantage = batch.advantage[:, None, None]
    log_ratio = jnp.where(batch.target, logp - batch.others['behaviour'], 0.0)
    losses = -clipped(log_ratio, advantage, epsilon, clip=batch.clip)
    tokens = batch.target.sum().astype(jnp.float32)
    stopped = is_clipped(log_ratio, advantage, epsilon, clip=batch.clip) & batch.target
    metrics = {'clip_share': (stopped.sum().astype(jnp.float32), tokens)}
    if kl:
        divergence = jnp.where(batch.target, k3(batch.others[to] - logp), 0.0)
        losses += kl * divergence
        metrics['kl'] = (divergence.sum(), tokens)
    return jnp.where(batch.target, losses, 0.0), metrics


def state_losses(logp: Array, batch: Batch, epsilon: float, kl: float) -> Loss:
    """The mean over draws of a clipped loss, as Gen-Verse/dLLM-RL @ 10b4fd1 takes it.

        loss = mean_draws [ mean_i -min(r_i A, clip(r_i) A) + kl sum_i k3_i ]

    over the positions i in `batch.target` of a draw. The divergence k3 is the one from the
    behaviour policy, and it is not divided by the number of positions. Draws without a position do
    not count.

    Args:
      logp: [b, M, C] of the policy.
      batch: the rows, with the readouts 'behaviour' among the others.
      epsilon: the clip range of the ratio r of policy to behaviour.
      kl: weight of the divergence.
    """
    losses, metrics = token_losses(logp, batch, epsilon, kl=0.0)
    positions = batch.target.sum(axis=2)  # [b, M]
    losses = losses.sum(axis=2) / jnp.maximum(positions, 1)  # [b, M]
    divergence = jnp.where(batch.target, k3(batch.others['behaviour'] - logp), 0.0)
    metrics['kl'] = (divergence.sum(), positions.sum().astype(jnp.float32))
    if kl:
        losses += kl * divergence.sum(axis=2)
    return Loss(losses.sum(), (positions > 0).sum().astype(jnp.float32), metrics)

"""Coupled GRPO of DiffuCoder (apple/ml-diffucoder @ f735e01, src/open_r1/coupled_grpo.py).

Three views of a completion after a clean prompt, afresh at every update: all of it masked; each
token masked with probability t; and the complement of that mask. One t ~ U(0.2, 0.8) holds for the
whole batch. Tokens after the EOS are masked as any other. The estimate of a token is

    l_i = ( l_i,full + l_i,mask / t ) / 2    if the second view masks it,
    l_i = ( l_i,full + l_i,complement / (1 - t) ) / 2    if the third one does,

    loss = sum_i ( -min(r_i A, clip(r_i, 1 - e, 1 + e) A) + b k3_i ) / sum_i 1,
    r_i = exp(l_i - l_i of the behaviour policy)

over the scored tokens i of a group; several groups are averaged. All policies are read out in the
same views. A is the reward minus the mean of the other completions of the group.

The reference starts as the initial policy, and every 64 updates it becomes 0.6 times the policy
plus 0.4 times itself. The authors train every parameter. With adapters their code would leave the
reference as it is; here it then mixes the matrices of the adapters. The released clip metric
broadcasts wrongly and can exceed 1; ours is the share of tokens whose gradient the clip stops.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.advantages import leave_one_out
from spg_jax.rl.objectives.objective import (
    Batch,
    Metrics,
    Moment,
    Objective,
    Protocol,
    Refresh,
    never,
    over_groups,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.ratios import token_losses
from spg_jax.rl.rollout import Rollout

RECIPE = {
    'rl.group_size': 10,
    'rl.inner_updates': 2,
    'optimizer.learning_rate': 1e-6,
    'optimizer.schedule': 'cosine',
    'optimizer.final_share': 0.1,
    'sampling.temperature': 1.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of coupled GRPO."""

    epsilon: float = setting(0.5, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    kl: float = setting(0.01, 'weight of the k3 estimate of the divergence from the reference')
    lowest: float = setting(0.2, 'the least mask ratio t')
    highest: float = setting(0.8, 'the largest mask ratio t')
    refresh_every: int = setting(64, 'updates between two changes of the reference; 0 for none')
    refresh_share: float = setting(0.6, 'share of the policy that is mixed into the reference')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if the mask ratios or the numbers of the refresh have no meaning.
    """
    if not 0 < settings.lowest <= settings.highest < 1:
        raise ValueError(
            f'coupled_grpo.lowest {settings.lowest} and coupled_grpo.highest {settings.highest} '
            'divide log-probabilities; use 0 < lowest <= highest < 1'
        )
    if settings.refresh_every < 0 or not 0 <= settings.refresh_share <= 1:
        raise ValueError(
            f'coupled_grpo.refresh_every is {settings.refresh_every} and coupled_grpo.refresh_share'
            f' {settings.refresh_share}; use 0 or more, and a share within [0, 1]'
        )

    def corruption(row: Rollout, moment: Moment) -> Draws:
        low, high = settings.lowest, settings.highest
        ratio = jax.random.uniform(moment.shared, minval=low, maxval=high)  # [] t
        masked = jax.random.uniform(moment.row, row.completion.shape) < ratio  # [C]
        views = jnp.stack([jnp.ones_like(masked), masked, ~masked])  # [3, C]
        prompt = jnp.zeros((len(views), len(row.prompt)), bool)
        weight = 1.0 / jnp.stack([jnp.ones(()), ratio, 1.0 - ratio])
        return Draws(masked=jnp.concatenate([prompt, views], axis=1), weight=weight)

    def loss_of_group(logp: Array, batch: Batch) -> tuple[Array, Metrics]:
        """logp: [G, 3, C]."""

        def estimate(logp: Array) -> Array:
            """l_i, [G, 1, C]."""
            weighted = jnp.where(batch.masked, batch.draws.weight[:, :, None] * logp, 0.0)
            return 0.5 * weighted.sum(axis=1, keepdims=True)

        others = {name: estimate(readouts) for name, readouts in batch.others.items()}
        draws = batch.draws.replace(target=batch.scored[:, None, :])
        combined = batch.replace(others=others, draws=draws)
        losses, metrics = token_losses(estimate(logp), combined, settings.epsilon, settings.kl)
        return losses.sum() / batch.scored.sum(), metrics

    refresh = mixed_every(settings.refresh_every, settings.refresh_share)
    return Objective(
        corruption=corruption,
        draws=3,
        loss=over_groups(loss_of_group, protocol.batching.group_size),
        couples='group',
        advantage=leave_one_out,
        behaviour=True,
        clips=True,
        looks_at=('reference',) if settings.kl else (),
        kept={'reference': refresh} if settings.kl else {},
        idle=None if settings.kl else without_advantage,
    )


def mixed_every(updates: int, share: float) -> Refresh:
    """A refresh that mixes a share of the trained policy into a kept one.

    Args:
      updates: between two changes; with 0 the kept policy stays as it is.
      share: of the trained policy, within [0, 1].
    """
    if not updates:
        return never

    def refresh(step: Array, kept: Any, trained: Any) -> Any:
        is_due = step % updates == 0

        def mix(old: Array, new: Array) -> Array:
            return jnp.where(is_due, share * new + (1.0 - share) * old, old)

        return jax.tree.map(mix, kept, trained)

    return refresh

"""DMPO (yuchen-zhu-zyc/DMPO @ 96af1a4, `wdce`): cross-entropy weighted by a tilted reference.

    loss = -1/M sum_k sum_j (w+_j - w-_j) mean_{i in S_k} l_{k,i}
    w+- = softmax over the group of s_ref - s_beh +- R / alpha

The sum over j runs over a group; several groups are averaged. (Microbatches of the released code
hold a half or a quarter of a group, which makes its loss a half or a quarter of this one.) s_ref
and s_beh are ELBOs, in nats, of the initial policy and of the one that sampled, taken when the
rollout arrives, both under the same draws, which are others than those of the loss:

    s = mean_k C / |S_k| sum_{i in S_k} l_{k,i}

A draw masks each of the C positions, after the EOS too, with probability uniform over [0.1, 1] (a
comment in the released code says [0.1, 0.9]); each draw is followed by its complement. Which draws
the ELBOs take was left open: here they are drawn as those of the loss. A draw without a masked
position adds nothing.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.advantages import groups_with_signal
from spg_jax.rl.objectives.objective import (
    Batch,
    Metrics,
    Moment,
    Objective,
    Protocol,
    never,
    over_groups,
    setting,
)
from spg_jax.rl.objectives.sequences import after_clean_prompt, draw_scores
from spg_jax.rl.rollout import Rollout

LOG_RATIO = 'log_ratio'  # extras: s_ref - s_beh [B], nats
RECIPE = {
    'rl.group_size': 16,
    'rl.inner_updates': 8,
    'optimizer.learning_rate': 1e-6,
    'optimizer.schedule': 'constant',
    'sampling.temperature': 0.2,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of DMPO."""

    alpha: float = setting(0.04, 'rewards are divided by it before they tilt the reference')
    pairs: int = setting(2, 'pairs of a mask and its complement for each sequence')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if alpha is not positive.
    """
    if not settings.alpha > 0:
        raise ValueError(
            f'dmpo.alpha is {settings.alpha}; rewards are divided by it, use a number above 0'
        )

    group_size = protocol.batching.group_size

    def draws(key: Array, row: Rollout) -> Draws:
        rate_key, mask_key = jax.random.split(key)
        size = (settings.pairs, row.completion.size)
        rate = jax.random.uniform(rate_key, (settings.pairs, 1), minval=0.1, maxval=1.0)
        masked = jax.random.uniform(mask_key, size) < rate
        masked = jnp.concatenate([masked, ~masked])  # [M, C]
        weight = 1.0 / (len(masked) * jnp.maximum(masked.sum(-1), 1))
        return after_clean_prompt(row, masked, target=masked, weight=weight)

    def corruption(row: Rollout, moment: Moment) -> Draws:
        return draws(moment.row, row)

    def at_rollout(
        read: Callable[[str, Draws], Array], rollout: Rollout, first: Moment
    ) -> dict[str, Array]:
        keys = jax.vmap(jax.random.fold_in, (0, None))(first.row, 1)  # not those of the loss
        batch = Batch(rollout, jax.vmap(draws)(keys, rollout), {}, jnp.int32(0))
        difference = read('reference', batch.draws) - read('policy', batch.draws)  # [B, M, C]
        return {LOG_RATIO: difference.shape[-1] * draw_scores(difference, batch).sum(-1)}

    def loss_of_group(logp: Array, batch: Batch) -> tuple[Array, Metrics]:
        """logp: [G, M, C]."""
        tilt = batch.rows.reward / settings.alpha
        log_ratio = batch.rows.extras[LOG_RATIO]
        better, worse = jax.nn.softmax(log_ratio + tilt), jax.nn.softmax(log_ratio - tilt)
        score = draw_scores(logp, batch).sum(-1)  # [G]
        # The effective number of completions, as a share, says how few of them carry the weights.
        effective = 1.0 / jnp.square(better).sum() / len(score)
        metrics = {'effective_share': (effective, jnp.float32(1))}
        return -((better - worse) * score).sum(), metrics

    def idle(batch: Batch) -> Array:
        """[B] bool. Equal rewards tilt nothing: both weights of a completion are then the same."""
        return jnp.repeat(~groups_with_signal(batch.rows.reward, group_size), group_size)

    return Objective(
        corruption=corruption,
        draws=2 * settings.pairs,
        loss=over_groups(loss_of_group, group_size),
        couples='group',
        at_rollout=at_rollout,
        kept={'reference': never},
        refuses={
            'rl.advantage': 'its weights are softmaxes over the group, which a baseline leaves as '
            'they are; dmpo.alpha is their scale'
        },
        idle=idle,
    )

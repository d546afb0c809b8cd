"""d2, StepMerge (kuleshov-group/d2 @ 381b9f1, diffu-grpo/diffu_grpo_trainer.py): rollout states.

The S steps of a rollout are merged into N segments, which start at the steps floor(i S / N). A draw
is the state of the completion at the start of a segment, after a prompt whose tokens are masked
with probability 0.15, afresh at every update and the same in all segments. It gives
l_i = log pi(x_i | state) of the tokens committed in the segment, so that N passes give each token
once, and

    loss = sum_i ( -min(r_i A, clip(r_i, 1 - e, 1 + e) A) + b k3_i ) / sum_i 1,
    r_i = exp(l_i - l_i of the behaviour policy)

over the scored tokens i of a group, as in d1; several groups are averaged. (The released code takes
a segment at a time, N sum_segment / sum of all tokens, and averages the segments, which is the
same. The refresh of its reference does nothing with adapters, so that here it stays the base
policy.)
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.rl.objectives.objective import (
    Batch,
    Metrics,
    Moment,
    Objective,
    Protocol,
    never,
    over_groups,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.ratios import token_losses
from spg_jax.rl.objectives.trajectory import replay
from spg_jax.rl.rollout import Rollout

RECIPE = {
    'rl.inner_updates': 8,  # 12 on maths
    'optimizer.schedule': 'constant',
    'sampling.temperature': 0.9,  # 0.3 on Sudoku
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of d2."""

    segments: int = setting(16, 'N, the states of a rollout; 8 on GSM8K')
    epsilon: float = setting(0.5, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    kl: float = setting(0.04, 'weight of the k3 estimate of the divergence from the base policy')
    prompt_rate: float = setting(0.15, 'probability that a token of the prompt is masked')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if a segment would hold no step.
    """
    segments, steps = settings.segments, protocol.rollout_steps
    if not 1 <= segments <= steps:
        raise ValueError(
            f'd2.segments is {segments}, of the {steps} steps of a rollout (sampling.steps); '
            f'use 1 to {steps}'
        )
    one_step = Corruption('full', draws=1, block_length=1, prompt_rate=settings.prompt_rate)

    def corruption(row: Rollout, moment: Moment) -> Draws:
        edges = steps * jnp.arange(segments + 1) // segments  # [N + 1]
        masked, target = replay(row.commit_step, edges[:-1], edges[1:])  # [N, C]
        prompt = one_step(moment.row, row.prompt_mask, row.scored).masked[:, : len(row.prompt)]
        return Draws(
            masked=jnp.concatenate([jnp.repeat(prompt, segments, axis=0), masked], axis=1),
            target=target & row.scored[None, :],
        )

    def loss_of_group(logp: Array, batch: Batch) -> tuple[Array, Metrics]:
        """logp: [G, N, C]."""
        losses, metrics = token_losses(logp, batch, settings.epsilon, settings.kl)
        return losses.sum() / batch.scored.sum(), metrics

    return Objective(
        corruption=corruption,
        draws=segments,
        loss=over_groups(loss_of_group, protocol.batching.group_size),
        couples='group',
        behaviour=True,
        clips=True,
        looks_at=('reference',) if settings.kl else (),
        kept={'reference': never} if settings.kl else {},
        idle=None if settings.kl else without_advantage,
    )

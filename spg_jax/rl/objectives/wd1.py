"""wd1 (xiaohangt/wd1 @ 0898985): weighted likelihood, without ratios to any other policy.

Every completion token is masked, after the EOS too, and each prompt token with probability 0.15,
afresh at every update. One forward pass gives l_i = log pi(x_i | corrupted prompt), and

    loss = sum_j (w-_j - w+_j) sum_i l_ji,    w+ = softmax(A / T), w- = softmax(-A / T)

over the completions j of a group and their scored tokens i, with T = 1. Several groups are
averaged. The sum within a group is divided neither by its tokens nor by G, so that the clip of the
gradient sets the size of a step. The weights stand in the place of the advantage, because they
depend on nothing but the rewards of a group. (In the released code the refresh of the reference
does nothing, as no reference is looked at.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Corruption
from spg_jax.rl.advantages import group_advantages
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Objective,
    Protocol,
    configured,
    setting,
    without_advantage,
)

RECIPE = {
    'rl.group_size': 6,
    'rl.inner_updates': 12,  # 8 on Sudoku
    'optimizer.learning_rate': 3e-6,
    'optimizer.schedule': 'constant',
    'optimizer.grad_clip': 0.2,
    'sampling.temperature': 0.9,  # 0.3 on Sudoku
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of wd1."""

    temperature: float = setting(1.0, 'of both softmaxes, in units of reward')
    negative: bool = setting(True, 'whether worse completions are pushed down, by w-')
    prompt_rate: float = setting(0.15, 'probability that a token of the prompt is masked')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if the temperature is not positive.
    """
    if not settings.temperature > 0:
        raise ValueError(f'wd1.temperature is {settings.temperature}; use a positive number')
    group_size = protocol.batching.group_size

    def weights(reward: Array, group_size: int) -> Array:
        """w+ - w- of each completion, [B]."""
        logits = group_advantages(reward, group_size).reshape(-1, group_size) / settings.temperature
        better = jax.nn.softmax(logits, axis=1)  # [B / G, G]
        worse = jax.nn.softmax(-logits, axis=1) if settings.negative else 0.0
        return (better - worse).reshape(-1)

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, 1, C]."""
        likelihood = jnp.where(batch.scored, logp[:, 0], 0.0).sum(axis=1)  # [b]
        tokens = batch.scored.sum().astype(jnp.float32)
        return Loss(
            total=-(batch.advantage * likelihood).sum(),
            weight=jnp.float32(len(likelihood) / group_size),
            metrics={'token_log_prob': (likelihood.sum(), tokens)},
        )

    one_step = Corruption('full', draws=1, block_length=1, prompt_rate=settings.prompt_rate)
    return Objective(
        corruption=configured(one_step),
        draws=1,
        loss=loss,
        advantage=weights,
        refuses={
            'rl.advantage': 'its weights are softmaxes over the group, which a baseline leaves as '
            'they are; wd1.temperature is their scale'
        },
        idle=without_advantage,
    )

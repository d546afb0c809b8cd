"""Rejection sampling (RFT, arXiv 2308.01825): fine-tune the base policy on its right completions.

    python -m spg_jax.train --config=countdown --config.rl.objective=spg_jax.rl.rejection

This is no policy gradient; it is what every method of reinforcement learning has to beat. Before
the first update the base policy samples `batches` batches of prompts, and nothing is sampled later.
Each update takes as many right completions as a batch has rows, at random and none of them twice,
and imitates them with the loss by which base policies are trained (LLaDA, arXiv 2502.09992): with
a number k ~ U{1..C} of the C positions masked, EOS filling included,

    loss = -mean_j (1 / k_j) sum_i log pi(x_ij | masked)

over the right completions j and the masked positions i. A completion is right if its reward is at
least `least_reward`. Others fill the batch where there are too few right ones, and leave the
update.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Corruption, Draws
from spg_jax.rl.objectives import Batch, Loss, Moment, Objective, Protocol, Ring
from spg_jax.rl.objectives.objective import never, setting
from spg_jax.rl.rollout import Rollout

BASE = 'base'  # the kept policy that samples
NEVER = 2**31  # updates between two collections, more than any run has
RECIPE = {}
NOT_COMPARED = 'it imitates what is right, and compares no completions'


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of rejection sampling."""

    batches: int = setting(32, 'batches of rl.prompts prompts that the base policy samples')
    least_reward: float = setting(1.0, 'the least reward of a completion that is imitated')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: nothing would be sampled.
    """
    if settings.batches < 1:
        raise ValueError(f'rejection.batches is {settings.batches}; use 1 or more')
    batching = protocol.batching
    subset = Corruption('uniform', draws=1, block_length=1, prompt_rate=0.0)

    def corruption(row: Rollout, moment: Moment) -> Draws:
        everywhere = jnp.ones_like(row.scored)
        draws = subset(moment.row, row.prompt_mask, everywhere)
        return draws.replace(target=draws.masked[:, len(row.prompt) :])

    def is_right(rows: Rollout) -> Array:
        """[B] bool. The slack forgives the last bit of a reward that is a sum of shares."""
        return rows.reward >= settings.least_reward - 1e-6

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, 1, C] in nats."""
        right, target = is_right(batch.rows), batch.target[:, 0]
        mean = jnp.where(target, logp[:, 0], 0.0).sum(-1) / target.sum(-1)  # [b]
        number = right.sum().astype(jnp.float32)
        share = {'imitated': (number, jnp.float32(len(right)))}
        return Loss(-jnp.where(right, mean, 0.0).sum(), number, share)

    return Objective(
        corruption=corruption,
        draws=1,
        loss=loss,
        advantage=lambda reward, group_size: reward,
        kept={BASE: never},
        sampled_by=BASE,
        experience=Ring(settings.batches * batching.prompts, NEVER, batching.rows, is_right),
        compares=False,
        idle=lambda batch: ~is_right(batch.rows),
        refuses={'rl.advantage': NOT_COMPARED},
    )

"""EBPO, of the report of LLaDA2.1 (eq. 4 and 5): a clipped ratio of ELBOs in nats of a sequence.

    s = mean_k sum_{i in S_k} l_{k,i} / (share of its block's tokens that S_k masks)
    loss = -mean_j min(r_j A_j, clip(r_j, 1 - e, 1 + e) A_j),   r_j = exp(s_j - s_j,old)

A draw masks a part of every block at once: floor(u n_b) + 1 of the n_b tokens of block b, with one
u for each draw and block, a random offset plus the points of an even grid over all draws and blocks
of the row, modulo 1. Blocks are those of the sampler, and sequences end at their EOS. The ratio is
not divided by a length, so that a change of s by a few tenths of a nat is clipped.

Read in a port (yjyddq/DARE @ 83ae8a3), which was written from the report; the report has no code.
The models of the method let no block see later ones, whereas attention here is what the policy has.
In the port of today blocks are counted from the start of the prompt; in the stored results they are
those of the completion, as here. That advantages are divided by their standard deviation is taken
from the port's bgpo, which has the same trainer.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws, subset_of_size
from spg_jax.rl.advantages import standardised
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Moment,
    Objective,
    Protocol,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.sequences import (
    after_clean_prompt,
    clipped_rows,
    cut_at_eos,
)
from spg_jax.rl.rollout import Rollout

RECIPE = {
    'rl.group_size': 8,
    'optimizer.schedule': 'constant',
    'sampling.block_length': 32,
    'sampling.temperature': 0.6,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of EBPO."""

    epsilon: float = setting(0.2, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    draws: int = setting(16, 'masks of each sequence')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective."""
    block_length = protocol.sampling.block_length

    def in_blocks(x: Array) -> Array:
        """[..., C] -> [..., blocks, positions of a block]."""
        return x.reshape(*x.shape[:-1], -1, block_length)

    def corruption(row: Rollout, moment: Moment) -> Draws:
        offset_key, mask_key = jax.random.split(moment.row)
        scored = in_blocks(row.scored)
        size = scored.sum(-1)[None]  # [1, blocks] n_b
        reached = (size > 0).sum()
        # The grid has a point for each draw and block that the completion reaches.
        place = jnp.arange(settings.draws)[:, None] * reached + jnp.arange(size.size)[None]
        level = (jax.random.uniform(offset_key) + place / (settings.draws * reached)) % 1.0
        counts = jnp.floor(level * size).astype(jnp.int32) + 1  # [M, blocks]
        noise = in_blocks(jax.random.uniform(mask_key, (settings.draws, row.scored.size)))
        subsets = jax.vmap(jax.vmap(subset_of_size), (0, None, 0))
        masked = subsets(noise, scored, counts).reshape(settings.draws, -1)
        return after_clean_prompt(row, masked, valid=cut_at_eos(row, settings.draws))

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C]."""
        size = in_blocks(batch.scored).sum(-1)[:, None]  # [b, 1, blocks]
        rate = in_blocks(batch.target).sum(-1) / jnp.maximum(size, 1)  # [b, M, blocks]
        change = jnp.where(batch.target, logp - batch.others['behaviour'], 0.0)
        of_blocks = in_blocks(change).sum(-1) / jnp.where(rate > 0, rate, 1.0)
        log_ratio = of_blocks.sum(-1).mean(-1)  # [b] nats
        losses, metrics = clipped_rows(log_ratio, batch, settings.epsilon)
        return Loss(total=losses.sum(), weight=jnp.float32(len(losses)), metrics=metrics)

    return Objective(
        corruption=corruption,
        draws=settings.draws,
        loss=loss,
        advantage=partial(standardised, epsilon=1e-6),
        behaviour=True,
        clips=True,
        idle=without_advantage,
    )

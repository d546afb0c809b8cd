"""ESPO (ML-GSAI/ESPO @ b5f2dac, espo/espo_trainer.py): one clipped ratio for each sequence.

A pair of draws masks x random positions of all C and then the others, so that every token is scored
once in each pair:

    s = mean over pairs of 1/2 sum_{i <= C} l_i (C + 1) / (x where i is masked first, else C - x)
    loss = -mean_j min(r_j A_j, clip(r_j, 1 - e, 1 + e) A_j) + b mean_j (s_j - s_j,ref)^2 / (2 C),
    r_j = exp((s_j - s_j,old) / C)

in nats of a sequence, with advantages whose baseline is the mean of the other completions. Numbers
of masked positions are spread over the batch: x of row b is round(k + b (C + 1) / B) mod (C + 1)
with k uniform over 0 to C, one k for all rows, afresh for each pair and update.

Tokens after the EOS are masked and scored as any others; those that `sampling.stop_early` did not
sample are scored as well. The paper divides by the length of the completion, the released code and
this one by C. The released code draws k for the rows of a device's microbatch, here for those of an
update. Its option `reduce_var` and the refresh of its reference, which do nothing, are left out.
The defaults are those of Sudoku; Countdown has epsilon 0 and kl 3e-3, the maths tasks kl 1e-3.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.advantages import leave_one_out
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Moment,
    Objective,
    Protocol,
    never,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.ratios import k2
from spg_jax.rl.objectives.sequences import (
    after_clean_prompt,
    clipped_rows,
    draw_scores,
    random_masks,
)
from spg_jax.rl.rollout import Rollout

RECIPE = {
    'rl.group_size': 6,
    'rl.inner_updates': 8,
    'optimizer.learning_rate': 3e-6,
    'optimizer.schedule': 'constant',
    'optimizer.weight_decay': 0.01,
    'sampling.temperature': 1.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of ESPO."""

    epsilon: float = setting(0.2, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    kl: float = setting(0.01, 'weight of the k2 estimate of the divergence from the base policy')
    pairs: int = setting(2, 'pairs of a mask and its complement for each sequence')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective."""

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C], pairs being neighbours."""
        length = logp.shape[-1]

        def score(readouts: Array) -> Array:
            return draw_scores(readouts, batch).sum(-1) / settings.pairs  # [b] nats

        change = score(logp) - score(batch.others['behaviour'])
        losses, metrics = clipped_rows(change / length, batch, settings.epsilon)
        rows = jnp.float32(len(losses))
        if settings.kl:
            divergence = k2(score(batch.others['reference']) - score(logp)) / length
            losses += settings.kl * divergence
            metrics['kl'] = (divergence.sum(), rows)
        return Loss(total=losses.sum(), weight=rows, metrics=metrics)

    return Objective(
        corruption=partial(spread_pairs, pairs=settings.pairs, rows=protocol.batching.rows),
        draws=2 * settings.pairs,
        loss=loss,
        advantage=leave_one_out,
        behaviour=True,
        clips=True,
        looks_at=('reference',) if settings.kl else (),
        kept={'reference': never} if settings.kl else {},
        idle=None if settings.kl else without_advantage,
    )


def spread_pairs(row: Rollout, moment: Moment, *, pairs: int, rows: int) -> Draws:
    """Masks and their complements, with the weights (C + 1) / 2 |S_k| of the draws.

    Args:
      row, moment: what is corrupted, and when.
      pairs: M / 2; the two draws of a pair are neighbours.
      rows: B, the rows of an update, over which the numbers of masked positions are spread.
    """
    length = row.completion.size
    first = jax.random.randint(moment.shared, (pairs,), 0, length + 1)
    counts = jnp.round(first + moment.rank * (length + 1) / rows).astype(jnp.int32) % (length + 1)
    masked = random_masks(moment.row, jnp.ones(length, bool), counts)  # [M / 2, C]
    masked = jnp.stack([masked, ~masked], axis=1).reshape(2 * pairs, length)
    weight = 0.5 * (length + 1) / jnp.maximum(masked.sum(-1), 1)
    return after_clean_prompt(row, masked, target=masked, weight=weight)

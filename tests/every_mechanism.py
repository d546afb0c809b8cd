"""An objective that uses what an objective may ask for, for tests/test_objectives_go_on.py: all but
readouts of the behaviour policy, which rows of a ring cannot have.

It is no method: its loss only has to depend on every part.
"""

import dataclasses

import jax
import jax.numpy as jnp

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.objectives.dtm import read_distributions
from spg_jax.rl.objectives.objective import Objective, Phase, Ring, never, over_groups, setting
from spg_jax.rl.objectives.trajectory import replay

RECIPE = {}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a run of a few updates."""

    phase: int = setting(2, 'updates of a phase')
    every: int = setting(1, 'updates between two refreshes of the ring')


def build(settings, protocol):
    """States of the rollout, groups, other policies, a ring, phases, and extras at the rollout."""
    batching, steps = protocol.batching, protocol.sampling.steps

    def corruption(row, moment):
        middle = jax.random.randint(moment.row, (), 1, steps)  # one cut of the rollout a row
        edges = jnp.stack([jnp.int32(0), middle, jnp.int32(steps)])
        masked, target = replay(row.commit_step, edges[:-1], edges[1:])
        clean = jnp.zeros((2, row.prompt_mask.size), bool)
        return Draws(jnp.concatenate([clean, masked], axis=1), target=target & row.scored[None, :])

    def at_rollout(read, rollout, first):
        draws = jax.vmap(lambda row: corruption(row, first_of(first)))(rollout)
        return {'at_rollout': read('policy', draws)['token'].mean((1, 2))}

    def first_of(moment):
        return jax.tree.map(lambda x: x[0] if x.ndim else x, moment)

    def loss_of_group(readouts, batch):
        def score(each):
            return jnp.where(batch.target, each['token'] + each['teacher'], 0.0).sum((1, 2))

        change = score(readouts)
        away = score(readouts) - score(batch.others['reference'])
        weights = jax.nn.softmax(batch.rows.extras['at_rollout'])
        return (weights * (0.01 * away**2 - batch.advantage * change)).sum(), {}

    def decay(step, kept, trained):
        return jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, kept, trained)

    return Objective(
        corruption=corruption,
        draws=2,
        loss=over_groups(loss_of_group, batching.group_size),
        couples='group',
        readout=read_distributions,
        teacher='teacher',
        looks_at=('reference',),
        kept={'teacher': never, 'average': decay, 'reference': never},
        sampled_by='teacher',
        at_rollout=at_rollout,
        experience=Ring(2 * batching.prompts, settings.every, batching.rows),
        phase=Phase(
            settings.phase,
            lambda trained, kept: (kept['average'], kept | {'teacher': kept['average']}),
        ),
        rate=lambda count: 1.0 / (1.0 + count),
    )

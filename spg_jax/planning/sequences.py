"""How many sequences a method sends through the network, forwards and backwards, by formula.

One sequence is one pass of a whole row, prompt and completion, through the network. Counted is what
a method needs:

- each denoising step of a rollout, twice under classifier-free guidance;
- what is read out when a rollout arrives: the policy that sampled, and estimates of the objective;
- at each update the draws of every row, forwards and backwards, and forwards once more for each
  other policy that the loss looks at.

The counts are those of a rollout in which no row ends early and of an update that no row leaves, so
that they depend on settings alone. Validations, diagnoses, recomputation, and a second pass that
only saves memory are not counted, because they are not the method's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.assembly import Parts
from spg_jax.diffusion.corruption import Draws
from spg_jax.errors import check_one_of
from spg_jax.rl.experience import collections_due
from spg_jax.rl.rollout import rollout_shapes
from spg_jax.rl.scores import moments

# In what a budget can be counted. 'sequences' are those forwards and those backwards together.
UNITS = ('sequences', 'forward', 'backward', 'updates')


def counts(parts: Parts, updates: int) -> np.ndarray:
    """The sequences of the first updates, [updates + 1, 2] int64: forwards and backwards.

    Args:
      parts: what the settings of a run describe.
      updates: the number of updates; row u holds the sums over the first u.
    """
    objective, batching = parts.objective, parts.batching
    teacher = 2 if objective.teacher else 1  # It is read out with every readout.
    draws = rows_of_update(parts) * objective.draws
    per_update = draws * (teacher + len(objective.looks_at))
    guided = 2 if parts.sampling.guidance else 1
    per_row = guided * parts.sampling.steps + teacher * draws_at_arrival(parts)
    collected = np.asarray(
        [collections_due(objective, batching, step) for step in range(updates)], np.int64
    )
    forward = per_update + collected * batching.rows * per_row
    backward = np.full_like(forward, draws)
    return np.concatenate([np.zeros((1, 2), np.int64), np.stack([forward, backward], 1).cumsum(0)])


def amounts(parts: Parts, updates: int, unit: str) -> np.ndarray:
    """What the first updates take of a budget, [updates + 1] int64, counted in a unit of UNITS.

    Raises:
      ValueError: there is no such unit.
    """
    check_one_of('budget', unit, UNITS)
    if unit == 'updates':
        return np.arange(updates + 1)
    forward, backward = counts(parts, updates).T
    return {'forward': forward, 'backward': backward, 'sequences': forward + backward}[unit]


def updates_within(parts: Parts, amount: int, unit: str) -> int:
    """The most updates that take no more than an amount of a budget; one at least.

    Args:
      parts: what the settings of a run describe.
      amount: the budget.
      unit: what it is counted in, of UNITS.
    """
    tried = 1
    while amounts(parts, tried, unit)[-1] <= amount:
        tried *= 2
    return max(1, int(np.searchsorted(amounts(parts, tried, unit), amount, side='right')) - 1)


def rows_of_update(parts: Parts) -> int:
    """The rows that an update learns from."""
    ring = parts.objective.experience
    return ring.rows if ring else parts.batching.rows


def draws_at_arrival(parts: Parts) -> int:
    """The draws of each row that are read out when a rollout arrives, of all policies together."""
    objective, batching = parts.objective, parts.batching
    draws = batching.inner_updates * objective.draws if objective.behaviour else 0
    if not objective.at_rollout:
        return draws
    length, numbers = parts.sampling.length, []

    def read(policy: str, draws: Draws) -> Array:
        numbers.append(draws.masked.shape[1])
        return jnp.zeros((*draws.masked.shape[:2], length))

    def arrive(rows: Any) -> Any:
        first = moments(0, rows, jnp.int32(0), jnp.int32(0))
        return objective.at_rollout(read, rows, first)

    jax.eval_shape(arrive, rollout_shapes(batching.rows, parts.prompt_lengths[-1], length))
    return draws + sum(numbers)

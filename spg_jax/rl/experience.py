"""What updates learn from: the last rollout, or a ring of rows from several.

A ring is a `Rollout` of more rows than an update takes, saved with the checkpoints. Everything that
happens to it is a function of the number of updates done: when prompts are collected, which rows
they replace, and which rows an update takes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.diffusion.sampling import SamplingConfig, record_shapes
from spg_jax.random import Purpose, step_key
from spg_jax.rl.batching import Batching
from spg_jax.rl.objectives import Objective, Ring
from spg_jax.rl.rollout import Rollout, draft_shapes, rollout_shapes
from spg_jax.rl.scores import BIRTH
from spg_jax.sharding import constrain_rows
from spg_jax.training.train_state import TrainState


def rows_of_update(ring: Ring | None, seed: int, step: Array, experience: Rollout) -> Rollout:
    """The rows that an update learns from: all of a rollout, or random ones of a ring.

    An update takes no row of a ring twice.
    """
    if ring is None:
        return experience
    rows = len(experience.reward)
    order = jax.random.permutation(step_key(seed, Purpose.RING, step), rows)
    if ring.first is not None:
        order = order[jnp.argsort(~ring.first(experience)[order], stable=True)]
    order = order[: ring.rows]
    return constrain_rows(jax.tree.map(lambda x: x[order], experience))


def collections_due(objective: Objective, batching: Batching, step: int) -> int:
    """How many batches of prompts are collected before an update.

    Args:
      objective: says what updates learn from.
      batching: prompts of a batch, and updates on each rollout without a ring.
      step: updates done.
    """
    ring = objective.experience
    if ring is None:
        return int(step % batching.inner_updates == 0)
    since = step % objective.phase.length if objective.phase else step
    return ring.prompts // batching.prompts if since == 0 else int(since % ring.every == 0)


def first_row(objective: Objective, batching: Batching, step: int, collected: int) -> int:
    """The row of a ring from which on a batch is written.

    Args:
      objective, batching, step: as in `collections_due`.
      collected: batches collected before this one, for the same update.
    """
    ring = objective.experience
    since = step % objective.phase.length if objective.phase else step
    place = collected if since == 0 else since // ring.every - 1
    return place % (ring.prompts // batching.prompts) * batching.rows


def collected_shapes(
    rows: int, prompt_length: int, decoding: SamplingConfig, vocab_size: int, sharding: Any = None
) -> Rollout:
    """The shapes of a rollout when it is collected, with what the sampler recorded.

    Args:
      rows: B.
      prompt_length, decoding, vocab_size, sharding: as in `experience_shapes`.
    """
    extras = record_shapes(decoding, rows, vocab_size)
    if decoding.edits:
        extras |= draft_shapes(rows, decoding.length)
    shapes = rollout_shapes(rows, prompt_length, decoding.length).replace(extras=extras)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def experience_shapes(
    objective: Objective,
    batching: Batching,
    arrival: Callable[[TrainState, Rollout], Rollout] | None,
    state: TrainState,
    prompt_length: int,
    decoding: SamplingConfig,
    vocab_size: int,
    sharding: Any = None,
) -> Rollout:
    """The shapes of what updates learn from, as it is saved.

    Args:
      objective, batching: as in `collections_due`.
      arrival: adds extras to a rollout; None adds none.
      state: a train state, or its shapes.
      prompt_length: P.
      decoding: how completions are decoded, and what is recorded of them.
      vocab_size: V, of the model.
      sharding: of every field.
    """
    shapes = collected_shapes(batching.rows, prompt_length, decoding, vocab_size)
    if arrival:
        shapes = jax.eval_shape(arrival, state, shapes)
    ring = objective.experience
    if ring:
        born = jax.ShapeDtypeStruct((batching.rows,), jnp.int32)
        shapes = shapes.replace(extras=shapes.extras | {BIRTH: born})
    rows = ring.prompts * batching.group_size if ring else batching.rows
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding), shapes
    )


def make_keep(
    objective: Objective, batching: Batching, prompt_length: int
) -> Callable[[Rollout | None, Rollout, int, int], Rollout]:
    """A function (experience, fresh rollout, step, collected) -> experience.

    Without a ring the fresh rollout takes the place of the old one. The ring's prompts are padded
    to `prompt_length`.
    """
    ring = objective.experience
    if ring is None:
        return lambda experience, fresh, step, collected: fresh
    rows = ring.prompts * batching.group_size

    def pad(rollout: Rollout) -> Rollout:
        missing = prompt_length - rollout.prompt.shape[1]
        widths = ((0, 0), (missing, 0))
        return rollout.replace(
            prompt=jnp.pad(rollout.prompt, widths),
            prompt_mask=jnp.pad(rollout.prompt_mask, widths),
        )

    @jax.jit
    def write(experience: Rollout, fresh: Rollout, first: Array) -> Rollout:
        def replace(old: Array, new: Array) -> Array:
            start = (first,) + (0,) * (old.ndim - 1)
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

        return constrain_rows(jax.tree.map(replace, experience, fresh))

    @jax.jit
    def begin(fresh: Rollout) -> Rollout:
        empty = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), fresh)
        return constrain_rows(empty)

    def keep(experience: Rollout | None, fresh: Rollout, step: int, collected: int) -> Rollout:
        born = jnp.full(fresh.reward.shape, step, jnp.int32)
        fresh = pad(fresh.replace(extras=fresh.extras | {BIRTH: born}))
        if experience is None:
            experience = begin(fresh)
        first = np.int32(first_row(objective, batching, step, collected))
        return write(experience, fresh, first)

    return keep

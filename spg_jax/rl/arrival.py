"""What is read out of policies when a rollout arrives, before any update has changed them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.models.policy import Policy
from spg_jax.random import Seeded
from spg_jax.rl.batching import Batching
from spg_jax.rl.gradient import join_passes, other_policies, split_passes
from spg_jax.rl.objectives import Objective
from spg_jax.rl.objectives.objective import BEHAVIOUR
from spg_jax.rl.packing import join_parts, split_parts
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import Reader, corrupt, moments
from spg_jax.training.train_state import TrainState

POLICY = 'policy'  # the trained policy, which samples unless `Objective.sampled_by` names another


def make_arrival(
    policy: Policy, objective: Objective, batching: Batching, seed: int
) -> Callable[[TrainState, Rollout], Rollout] | None:
    """A compiled (state, rollout) -> rollout with extras; None where an objective asks for none.

    The readouts of the behaviour policy are those of the draws of all turns: a draw is a function
    of identity, so the same draws come again in the updates, and no copy of the parameters is kept.
    """
    if not objective.behaviour and objective.at_rollout is None:
        return None
    reader = Reader(policy, objective.readout, objective.teacher)
    sampled_by = objective.sampled_by or POLICY

    def arrival(seed: Array, state: TrainState, rollout: Rollout) -> Rollout:
        policies = other_policies(state.frozen, state.kept) | {POLICY: state.variables}

        def read(name: str, draws: Draws) -> Any:
            """Readouts [B, M, C] of a policy, a microbatch and a pass over draws at a time."""
            count = draws.masked.shape[1]
            at_once = batching.draws_per_pass
            passes = count // at_once if at_once and count % at_once == 0 else 1

            def read_rows(piece: tuple[Rollout, Draws]) -> Any:
                rows, draws = piece

                def read_pass(draws: Draws) -> Any:
                    return reader(policies[name], rows, draws, state.step, None, policies)

                cuts = jax.tree.map(lambda x: split_passes(x, passes), draws)
                return jax.tree.map(join_passes, jax.lax.map(read_pass, cuts))

            parts = len(rollout.reward) // batching.microbatch
            pieces = jax.tree.map(lambda x: split_parts(x, parts), (rollout, draws))
            return jax.tree.map(join_parts, jax.lax.map(read_rows, pieces))

        extras = dict(rollout.extras)
        if objective.behaviour:

            def of_turn(turn: Array) -> Array:
                moment = moments(seed, rollout, state.step + turn, turn)
                return read(sampled_by, corrupt(objective.corruption, rollout, moment))

            turns = jax.lax.map(of_turn, jnp.arange(batching.inner_updates, dtype=jnp.int32))
            # [B, turns, M, C]
            extras[BEHAVIOUR] = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), turns)
        if objective.at_rollout is not None:
            first = moments(seed, rollout, state.step, jnp.int32(0))
            extras |= objective.at_rollout(read, rollout, first)
        return rollout.replace(extras=extras)

    return Seeded(arrival, seed)

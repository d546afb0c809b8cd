"""What is read out of policies when a rollout arrives, before any update has changed them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.models.policy import Policy
from spg_jax.rl.batching import Batching
from spg_jax.rl.learner import BEHAVIOUR, other_policies
from spg_jax.rl.objectives import Objective
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import Reader, corrupt, moments
from spg_jax.training.train_state import TrainState

POLICY = 'policy'  # the trained policy, which at this moment is the one that sampled


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

    @jax.jit
    def arrival(state: TrainState, rollout: Rollout) -> Rollout:
        policies = other_policies(state.frozen, state.kept) | {POLICY: state.variables}

        def read(name: str, draws: Draws) -> Array:
            """Readouts [B, M, C] of a policy, a microbatch and a pass over draws at a time."""

            def read_rows(piece: tuple[Rollout, Draws]) -> Array:
                rows, draws = piece
                return reader(policies[name], rows, draws, state.step, None, policies)

            parts = len(rollout.reward) // batching.microbatch
            pieces = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), (rollout, draws)
            )
            return jax.tree.map(
                lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]),
                jax.lax.map(read_rows, pieces),
            )

        extras = dict(rollout.extras)
        if objective.behaviour:

            def of_turn(turn: Array) -> Array:
                moment = moments(seed, rollout, state.step + turn, turn)
                return read(POLICY, corrupt(objective.corruption, rollout, moment))

            turns = jax.lax.map(of_turn, jnp.arange(batching.inner_updates, dtype=jnp.int32))
            # [B, turns, M, C]
            extras[BEHAVIOUR] = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), turns)
        if objective.at_rollout is not None:
            first = moments(seed, rollout, state.step, jnp.int32(0))
            extras |= objective.at_rollout(read, rollout, first)
        return rollout.replace(extras=extras)

    return arrival

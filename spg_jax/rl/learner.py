"""The learner: one gradient step of an objective on a rollout."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from spg_jax.models.policy import Policy
from spg_jax.random import Purpose, Seeded, example_keys
from spg_jax.rl.batching import Batching
from spg_jax.rl.experience import rows_of_update
from spg_jax.rl.gradient import make_gradient
from spg_jax.rl.objectives import Objective
from spg_jax.rl.objectives.objective import BEHAVIOUR, REFERENCE, never
from spg_jax.rl.rollout import Rollout, rollout_metrics
from spg_jax.rl.scores import corrupt, moments
from spg_jax.training.train_state import Metrics, TrainState, apply_gradient


def make_update(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batching: Batching,
    seed: int,
    shardings: TrainState,
) -> Seeded:
    """A compiled (state, experience) -> (state, metrics), which reuses the memory of the old state.

    Every update corrupts the rows afresh, with keys made from seed, step and identity of the row.

    Args:
      policy: the model.
      objective: the corruption and the loss.
      optimizer: how a gradient changes the parameters.
      batching: how the rows are cut into pieces.
      seed: the root of the run's random numbers.
      shardings: `shardings_of` the state, which the new state keeps.
    """
    gradient_of = make_gradient(
        policy,
        objective,
        microbatch=batching.microbatch,
        draws_per_pass=batching.draws_per_pass,
        group_size=batching.group_size,
    )
    lora = policy.config.lora

    def dropout_keys(seed: Array, step: Array, rollout: Rollout) -> Array | None:
        if lora is None or not lora.dropout:
            return None
        keys = example_keys(seed, Purpose.DROPOUT, step, rollout.example_id)
        return jax.vmap(lambda key: jax.random.split(key, objective.draws))(keys)

    def update(seed: Array, state: TrainState, experience: Rollout) -> tuple[TrainState, Metrics]:
        rollout = rows_of_update(objective.experience, seed, state.step, experience)
        turn = jnp.int32(0) if objective.experience else state.step % batching.inner_updates
        draws = corrupt(objective.corruption, rollout, moments(seed, rollout, state.step, turn))
        others = {}
        if objective.behaviour:
            others[BEHAVIOUR] = jax.tree.map(lambda x: x[:, turn], rollout.extras[BEHAVIOUR])
        loss, gradient, metrics = gradient_of(
            state.trained,
            state.frozen,
            rollout,
            draws,
            dropout_keys(seed, state.step, rollout),
            others=others,
            kept=state.kept,
            step=state.step,
        )
        state, applied = apply_gradient(state, gradient, loss, optimizer)
        state = after_update(objective, optimizer, state)
        # In a ring groups are neighbours, which they are not among the random rows of an update.
        metrics |= applied | rollout_metrics(
            experience, batching.group_size, policy.eos_id, policy.config.vocab_size
        )
        return state, metrics | {'loss': (loss, jnp.float32(1))}

    return Seeded(update, seed, donate_argnums=1, out_shardings=(shardings, None))


def after_update(
    objective: Objective, optimizer: optax.GradientTransformation, state: TrainState
) -> TrainState:
    """Changes the kept policies by their rules, and ends a phase where it is over."""
    kept = {
        name: refresh(state.step, state.kept[name], state.trained)
        for name, refresh in objective.kept.items()
        if name in state.kept
    }
    state = state.replace(kept=kept)
    phase = objective.phase
    if phase is None:
        return state

    def end(state: TrainState) -> TrainState:
        trained, kept = phase.end(state.trained, state.kept)
        return state.replace(trained=trained, kept=kept, opt_state=optimizer.init(trained))

    return jax.lax.cond(state.step % phase.length == 0, end, lambda state: state, state)


def kept_policies(objective: Objective, new_adapters: bool) -> list[str]:
    """The names of the policies that a train state keeps beside the trained one.

    Args:
      objective: asks for them.
      new_adapters: whether the trained policy is a model with adapters that change nothing yet.
    """
    return [
        name
        for name, refresh in objective.kept.items()
        if not (new_adapters and name == REFERENCE and refresh is never)
    ]

"""What a training carries from one step to the next, in both trainings, and the step itself."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh

from spg_jax import optimizers, sharding
from spg_jax.models.policy import Params, Policy


@struct.dataclass
class TrainState:
    """Everything a run carries from one update to the next."""

    step: Array  # [] int32, updates done
    params: Any  # trained parameters
    opt_state: Any
    average: Any  # decaying average of the parameters (pre-training), or None
    skipped: Array  # [] int32, non-finite updates since the last finite one


Metrics = dict[str, tuple[Array, Array]]


def shardings_of(tree: Any) -> Any:
    """The sharding of every array; left to itself the compiler may gather what was split."""
    return jax.tree.map(lambda x: x.sharding, tree)


def apply_gradient(
    state: TrainState, gradient: Params, loss: Array, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimiser step, or none if the loss or the gradient is not finite: then only counters
    move."""
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    one = jnp.float32(1)
    metrics = {
        'gradient_norm': (norm, one),
        'skipped': (1.0 - finite.astype(jnp.float32), one),
        'skipped_in_a_row': (skipped.astype(jnp.float32), one),
    }
    return state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, skipped=skipped
    ), metrics


def initial_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    policy: Policy,
    mesh: Mesh,
    *,
    average: bool,
) -> TrainState:
    """A train state at step 0, every array sharded like its parameter."""
    shardings = sharding.param_shardings(policy.model, mesh)
    whole = sharding.replicated(mesh)
    opt_shardings = optimizers.state_shardings(optimizer, params, shardings, whole)
    zero = jax.device_put(jnp.int32(0), whole)
    return TrainState(
        step=zero,
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=opt_shardings)(params),
        average=jax.tree.map(jnp.copy, params) if average else None,
        skipped=jnp.copy(zero),
    )

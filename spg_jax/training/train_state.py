"""The train state and the optimiser step, which pre-training and RL share."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.models.policy import Policy, Variables
from spg_jax.training import optimizers


@struct.dataclass
class TrainState:
    """Everything that a training carries from one update to the next."""

    step: Array  # [] int32, updates done
    trained: Variables  # the collection that the optimiser changes
    frozen: Variables  # the other collections: 'params' if adapters are trained, otherwise {}
    opt_state: Any  # of the optimiser
    average: Any  # decaying average of `trained` in pre-training; None in RL
    skipped: Array  # [] int32, non-finite updates since the last finite one
    # Policies that an objective keeps beside the trained one, by name; each is like `trained`.
    kept: dict[str, Variables] = struct.field(default_factory=dict)

    @property
    def variables(self) -> Variables:
        """All collections of parameters, as the functions of a policy take them."""
        return self.frozen | self.trained


Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, weight)


def shardings_of(tree: Any) -> Any:
    """The sharding of every array of a tree.

    A compiled update is told to keep these shardings, because the compiler might otherwise gather
    arrays that were split.
    """
    return jax.tree.map(lambda x: x.sharding, tree)


def apply_gradient(
    state: TrainState, gradient: Variables, loss: Array, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimiser step; if the loss or the gradient is not finite, only the counters change."""
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (trained, opt_state),
        (state.trained, state.opt_state),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    weight = jnp.float32(1)
    metrics = {
        'gradient_norm': (norm, weight),
        'skipped': (1.0 - finite.astype(jnp.float32), weight),
        'skipped_in_a_row': (skipped.astype(jnp.float32), weight),
    }
    return state.replace(
        step=state.step + 1, trained=trained, opt_state=opt_state, skipped=skipped
    ), metrics


def initial_state(
    variables: Variables,
    optimizer: optax.GradientTransformation,
    policy: Policy,
    mesh: Mesh,
    *,
    average: bool,
    kept: Sequence[str] = (),
) -> TrainState:
    """The train state at step 0, in which every array is sharded like its parameter.

    Args:
      variables: the collections of parameters.
      optimizer: changes the collection that `policy` trains.
      policy: the model.
      mesh: where the arrays live.
      average: whether the state keeps a decaying average of the trained parameters.
      kept: names of policies that the state keeps; each starts as a copy of the trained one.
    """
    name = policy.trained
    trained = {name: variables[name]}
    shardings = {name: sharding.param_shardings(policy.model, mesh, collection=name)}
    whole = sharding.replicated(mesh)
    opt_shardings = optimizers.state_shardings(optimizer, trained, shardings, whole)
    zero = jax.jit(lambda: jnp.int32(0), out_shardings=whole)
    return TrainState(
        step=zero(),
        trained=trained,
        frozen={key: value for key, value in variables.items() if key != name},
        opt_state=jax.jit(optimizer.init, out_shardings=opt_shardings)(trained),
        average=jax.tree.map(jnp.copy, trained) if average else None,
        skipped=zero(),
        kept={name: jax.tree.map(jnp.copy, trained) for name in kept},
    )

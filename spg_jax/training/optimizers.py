"""The optimisers of pre-training and RL, and the shardings of their state."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array

from spg_jax.errors import check_one_of

SCHEDULES = ('constant', 'linear', 'cosine')
# The scales of norms and biases never decay, because they are few and set the size of activations.
UNDECAYED = re.compile('(scale|bias)$')


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The optimiser of RL: AdamW with a linear warm-up and a schedule after it.

    Raises:
      ValueError: on an unknown schedule, or a final share outside [0, 1].
    """

    learning_rate: float  # after the warm-up
    warmup_fraction: float  # share of the run's updates in the warm-up
    b1: float  # decay of the running mean of gradients
    b2: float  # decay of the running mean of their squares
    weight_decay: float  # of all parameters except the scales of norms
    grad_clip: float  # a gradient with a larger norm is scaled down to this norm
    schedule: str = 'constant'  # one of SCHEDULES
    final_share: float = 0.0  # of the learning rate, where 'linear' and 'cosine' end

    def __post_init__(self) -> None:
        check_one_of('optimizer.schedule', self.schedule, SCHEDULES)
        if not 0 <= self.final_share <= 1:
            raise ValueError(
                f'optimizer.final_share is {self.final_share}; use a share within [0, 1]'
            )


def for_rl(
    settings: AdamW, total_steps: int, share: Callable[[Array], Array] | None = None
) -> optax.GradientTransformation:
    """The optimiser of RL for a run of `total_steps` updates, with gradient clipping.

    Args:
      settings: the numbers of AdamW.
      total_steps: the updates over which the schedule stretches.
      share: (updates done) -> share of the learning rate, in place of the configured schedule.
    """
    warmup = round(settings.warmup_fraction * total_steps)
    peak, last = settings.learning_rate, settings.learning_rate * settings.final_share
    rate = optax.schedules.linear_schedule(peak / (warmup + 1), peak, warmup)
    after = max(1, total_steps - warmup)
    if settings.schedule == 'linear':
        fall = optax.schedules.linear_schedule(peak, last, after)
        rate = optax.schedules.join_schedules([rate, fall], [warmup])
    elif settings.schedule == 'cosine':
        fall = optax.schedules.cosine_decay_schedule(peak, after, settings.final_share)
        rate = optax.schedules.join_schedules([rate, fall], [warmup])
    if share is not None:

        def rate(count: Array) -> Array:
            return peak * share(count)

    adamw = optax.adamw(
        rate, settings.b1, settings.b2, weight_decay=settings.weight_decay, mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(settings.grad_clip), adamw)


def with_schedules_at(opt_state: Any, count: Callable[[], Array]) -> Any:
    """The state of an optimiser whose schedules go on from another number of updates.

    The count with which Adam corrects the bias of its moments stays, as the moments do.

    Args:
      opt_state: of the optimiser.
      count: makes the number, an array of its own for each schedule, since updates reuse memory.
    """

    def is_schedule(state: Any) -> bool:
        return isinstance(state, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda state: state._replace(count=count()) if is_schedule(state) else state,
        opt_state,
        is_leaf=is_schedule,
    )


def for_pretraining(
    learning_rate: float,
    weight_decay: float,
    grad_clip: float,
    total_steps: int,
    muon_rate: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW with gradient clipping, or Muon for the kernels of the layers and, with Nesterov's
    momentum, AdamW for the rest.

    Learning rates rise over 1/40 of the steps, then fall along a cosine to 1/10 of their peak.

    Args:
      learning_rate: the peak of AdamW's.
      weight_decay: of all parameters except the scales of norms.
      grad_clip: a gradient with a larger norm is scaled down to this norm.
      total_steps: the steps of all stages together.
      muon_rate: the peak of Muon's (Keller Jordan et al., 2024: kellerjordan.github.io/posts/muon);
        0 leaves all parameters to AdamW.
    """

    def schedule(peak: float) -> optax.Schedule:
        return optax.schedules.warmup_cosine_decay_schedule(
            0.0,
            peak,
            warmup_steps=max(1, total_steps // 40),
            decay_steps=max(2, total_steps),
            end_value=peak / 10,
        )

    if muon_rate:
        optimizer = optax.contrib.muon(
            schedule(muon_rate),
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            adam_learning_rate=schedule(learning_rate),
            adam_b1=0.9,
            adam_b2=0.98,
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=_kernels_of_layers,
        )
    else:
        optimizer = optax.adamw(
            schedule(learning_rate), b1=0.9, b2=0.98, weight_decay=weight_decay, mask=decayed
        )
    return optax.chain(optax.clip_by_global_norm(grad_clip), optimizer)


def _kernels_of_layers(params: Any) -> Any:
    """What Muon makes orthogonal: the last two axes of a parameter, behind that of the layers.

    Embedding and scales are None, because they are no products of a layer.
    """

    def numbers(parameter: Any) -> optax.contrib.MuonDimensionNumbers | None:
        last = parameter.ndim - 1
        return optax.contrib.MuonDimensionNumbers(last - 1, last) if last > 1 else None

    return jax.tree.map(numbers, params)


def decayed(params: Any) -> Any:
    """A tree of bool like `params`, True where weight decay applies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (
            not UNDECAYED.search(jax.tree_util.keystr(path, simple=True, separator='/'))
        ),
        params,
    )


def state_shardings(
    optimizer: optax.GradientTransformation, abstract_params: Any, shardings: Any, replicated: Any
) -> Any:
    """The shardings of the optimiser's state: moments lie where their parameters lie, and the rest
    is replicated.

    Args:
      optimizer: the optimiser.
      abstract_params: the parameters that it changes, or their shapes.
      shardings: the shardings of these parameters.
      replicated: the sharding of everything else.
    """
    places = dict(jax.tree_util.tree_leaves_with_path(shardings))

    def place(path: tuple[Any, ...], _: Any) -> Any:
        # The state repeats the tree of the parameters, or a part of it, in trees of its own.
        ends = (path[start:] for start in range(len(path)))
        return next((places[end] for end in ends if end in places), replicated)

    state = jax.eval_shape(optimizer.init, abstract_params)
    return jax.tree_util.tree_map_with_path(place, state)

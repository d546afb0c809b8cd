"""Optimisers of the two trainings, and the shardings of their state."""

import dataclasses
import re
from typing import Any

import jax
import optax

# Scales of the norms are few and set the size of activations: never decayed.
UNDECAYED = re.compile('scale$')


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The optimiser of RL: AdamW whose rate is constant after a linear warm-up."""

    learning_rate: float
    warmup_fraction: float  # of the updates of the run
    b1: float  # decay of the mean gradient
    b2: float  # decay of the mean square
    weight_decay: float  # of everything but norms
    grad_clip: float  # largest gradient norm


def for_rl(settings: AdamW, total_steps: int) -> optax.GradientTransformation:
    """The optimiser of RL, in a run of `total_steps` updates."""
    warmup = round(settings.warmup_fraction * total_steps)
    rate = optax.schedules.linear_schedule(
        settings.learning_rate / (warmup + 1), settings.learning_rate, warmup
    )
    adamw = optax.adamw(
        rate, settings.b1, settings.b2, weight_decay=settings.weight_decay, mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(settings.grad_clip), adamw)


def for_pretraining(
    learning_rate: float, weight_decay: float, grad_clip: float, total_steps: int
) -> optax.GradientTransformation:
    """AdamW with gradient clipping; warm-up over a fortieth of the steps, then cosine to a tenth.

    Args:
      learning_rate: the peak.
      weight_decay: of everything but norms.
      grad_clip: largest gradient norm.
      total_steps: steps of all stages.
    """
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0,
        learning_rate,
        warmup_steps=max(1, total_steps // 40),
        decay_steps=max(2, total_steps),
        end_value=learning_rate / 10,
    )
    adamw = optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(grad_clip), adamw)


def decayed(params: Any) -> Any:
    """True at the parameters that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (
            not UNDECAYED.search(jax.tree_util.keystr(path, simple=True, separator='/'))
        ),
        params,
    )


def state_shardings(
    optimizer: optax.GradientTransformation, abstract_params: Any, shardings: Any, replicated: Any
) -> Any:
    """Shardings of the optimiser's state: moments where their parameters are, the rest
    replicated."""
    state = jax.eval_shape(optimizer.init, abstract_params)
    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated,
    )

"""Optimisers of the two trainings, and the shardings of their state."""

import re
from typing import Any

import jax
import ml_collections
import optax

# Scales of the norms are few and set the size of activations: never decayed.
UNDECAYED = re.compile('scale$')


def for_rl(config: ml_collections.ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """AdamW with gradient clipping; the rate is constant after a linear warm-up.

    Args:
      config: the `optimizer` group.
      total_steps: updates of the run, of which `warmup_fraction` warm up.
    """
    warmup = round(config.warmup_fraction * total_steps)
    rate = optax.schedules.linear_schedule(
        config.learning_rate / (warmup + 1), config.learning_rate, warmup
    )
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.adamw(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed),
    )


def for_pretraining(
    config: ml_collections.ConfigDict, total_steps: int
) -> optax.GradientTransformation:
    """AdamW with gradient clipping; warm-up over a fortieth of the steps, then cosine to a tenth.

    Args:
      config: the `base` group.
    """
    rate = optax.schedules.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup_steps=max(1, total_steps // 40),
        decay_steps=max(2, total_steps),
        end_value=config.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=config.weight_decay, mask=decayed),
    )


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

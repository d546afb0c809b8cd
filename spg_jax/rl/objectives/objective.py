"""What an objective is: a corruption, and a loss of the log-probabilities under its draws."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
from jax import Array

from spg_jax.diffusion.corruption import Corruption


@struct.dataclass
class Batch:
    """Rows of a rollout with the corruption of this update, as a loss sees them."""

    completion: Array  # [B, C] int32
    scored: Array  # [B, C] bool, True through the first EOS
    masked: Array  # [B, M, C] bool, completion part of the draws
    block: Array  # [B, M] int32, chosen block of each draw
    advantage: Array  # [B] float32


@struct.dataclass
class Loss:
    """A loss as a sum and its weight: divided once, after all microbatches, so accumulation is
    exact."""

    total: Array  # [] float32, differentiated with respect to logp
    weight: Array  # [] float32, not a function of the policy
    metrics: dict[str, tuple[Array, Array]]  # name -> (sum, weight)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A policy-gradient method.

    Attributes:
      corruption: how each row is corrupted, afresh at every update.
      loss: (logp [B, M, C] in nats, Batch) -> Loss. The policy enters through logp alone, which is
        what lets the learner differentiate draw by draw (see `spg_jax.rl.learner`).
    """

    corruption: Corruption
    loss: Callable[[Array, Batch], Loss]


class Method(NamedTuple):
    """How an objective is made: the numbers of its own, and the function that takes them."""

    settings: Any  # a NamedTuple class, whose fields are settings of the group `rl`
    build: Callable[[Any, Corruption], Objective]  # (settings, the configured corruption)

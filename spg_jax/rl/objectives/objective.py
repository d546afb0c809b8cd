"""An objective: a corruption, and a loss of the log-probabilities under its draws."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
from jax import Array

from spg_jax.diffusion.corruption import Corruption


@struct.dataclass
class Batch:
    """Rows of a rollout with the draws of one update, as a loss sees them."""

    completion: Array  # [B, C] int32
    scored: Array  # [B, C] bool, True through the first EOS
    masked: Array  # [B, M, C] bool, True where the draw masks a completion token
    block: Array  # [B, M] int32, the block that each draw chose
    advantage: Array  # [B] float32


@struct.dataclass
class Loss:
    """A loss as a sum and its weight.

    The division happens once after all microbatches, so that their sizes do not change the loss.
    """

    total: Array  # [] float32, differentiated with respect to logp
    weight: Array  # [] float32, which does not depend on the policy
    metrics: dict[str, tuple[Array, Array]]  # name -> (sum, weight)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A policy-gradient method.

    Attributes:
      corruption: how each row is corrupted, afresh at every update.
      loss: (logp [B, M, C] in nats, Batch) -> Loss. It depends on the policy only through logp, so
        that the learner can differentiate draw by draw (see `spg_jax.rl.learner`).
    """

    corruption: Corruption
    loss: Callable[[Array, Batch], Loss]


class Method(NamedTuple):
    """How an objective is made: its settings, and the function that builds it from them."""

    settings: Any  # a NamedTuple class, whose fields are settings of the group `rl`
    build: Callable[[Any, Corruption], Objective]  # (settings, the configured corruption)

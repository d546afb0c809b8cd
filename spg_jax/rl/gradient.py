"""The gradient of an objective on a batch, in microbatches and passes of draws.

A loss depends on the policy only through its readouts [b, M, C]. Its gradient is therefore the
product of d loss / d readouts, which is cheap, and the Jacobian of the readouts. This product can
be computed a piece at a time, a piece being some rows and some of their draws. A first stage
computes all readouts without a gradient, and from them d loss / d readouts. Then each piece is
differentiated, weighted by its part of d loss / d readouts, which stays fixed. Memory then does not
grow with the draws, nor with the rows that a loss couples, at the price of one more forward pass.
The gradient is the same. Where all that a loss couples is one piece, there is one stage.

Rows that cannot move the gradient (`Objective.idle`) leave the update (rl/packing.py): the program
differentiates only the pieces that hold a row which can. The gradient is the same sum.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.models.policy import Policy, Variables
from spg_jax.rl.objectives import Batch, Loss, Objective
from spg_jax.rl.objectives.objective import REFERENCE, token_log_probs
from spg_jax.rl.packing import (
    Pieces,
    loss_of_idle,
    loss_of_live,
    packed,
    rows_of_piece,
    whole_units,
)
from spg_jax.rl.rollout import Rollout
from spg_jax.rl.scores import Reader
from spg_jax.sharding import current_row_shards
from spg_jax.training.train_state import Metrics


class Rows(NamedTuple):
    """Rows of a batch with all that an update needs to differentiate them, [b, ...]."""

    rollout: Rollout
    draws: Draws  # [b, M, ...]
    dropout: Array | None  # [b, M] keys of the adapters' dropout
    others: dict[str, Array]  # readouts [b, M, C] that are there already
    idle: Array | None = None  # [b] bool, rows that leave the update; None where none can


def make_gradient(
    policy: Policy,
    objective: Objective,
    *,
    microbatch: int,
    draws_per_pass: int,
    group_size: int = 1,
) -> Callable[..., tuple[Array, Variables, Metrics]]:
    """A function (trained, frozen, rollout, draws, dropout=None, others={}, kept={}, step=0) ->
    (loss, gradient, metrics) over the whole batch.

    Args:
      policy: the model.
      objective: its loss is differentiated; its corruption made `draws`, [B, M, ...].
      microbatch: rows that are differentiated at once; it divides B. Where rows can be idle, they
        may be fewer, see `rows_at_once`.
      draws_per_pass: draws that are differentiated at once; it divides M, and 0 stands for all.
      group_size: G, for an objective that couples the rows of a group.

    The function differentiates by `trained` only. `frozen` holds the policy's other collections,
    `dropout` the keys [B, M] of the adapters' dropout, `others` readouts [B, M, C] that are there
    already, `kept` the kept policies by name, and `step` is the number of updates done.
    """
    reader = Reader(policy, objective.readout, objective.teacher)
    group = group_size if objective.couples == 'group' else 1

    def gradient_of(
        trained: Variables,
        frozen: Variables,
        rollout: Rollout,
        draws: Draws,
        dropout: Array | None = None,
        others: Mapping[str, Array] | None = None,
        kept: Mapping[str, Variables] | None = None,
        step: Array | int = 0,
    ) -> tuple[Array, Variables, Metrics]:
        rows = Rows(rollout, draws, dropout, dict(others or {}))
        batch_size = len(rollout.reward)
        at_once = rows_at_once(objective, batch_size, microbatch, group_size, current_row_shards())
        # Whether a piece of rows holds all that its loss couples.
        whole = rows_together(objective.couples, batch_size, at_once, group_size) == at_once
        stages = Stages(
            objective=objective,
            reader=reader,
            trained=trained,
            frozen=frozen,
            policies=other_policies(frozen, kept or {}),
            step=jnp.asarray(step, jnp.int32),
            coupled={'row': 1, 'group': group_size, 'batch': batch_size}[objective.couples],
            passes=draws.masked.shape[1] // draws_per_pass if draws_per_pass else 1,
        )
        pieces, of_idle = Pieces(batch_size // at_once, group if whole else 1), None
        if objective.idle is not None:
            batch = Batch(rollout, draws, rows.others, stages.step)
            rows = rows._replace(idle=whole_units(objective.idle(batch), group))
            pieces = packed(rows.idle, at_once, pieces.unit)
            of_idle = loss_of_idle(
                stages.loss_of, batch, rows.idle, stages.coupled, objective.looks_at
            )
        if whole:
            gradient, loss = pieces.fold(stages.add, stages.zero(), pieces.split(rows), of_idle)
        else:
            gradient, loss = stages.in_two(rows, pieces)
            if of_idle is not None:
                loss = jax.tree.map(jnp.add, loss, of_idle)
        weight = jnp.maximum(loss.weight, 1.0)
        return loss.total / weight, jax.tree.map(lambda g: g / weight, gradient), loss.metrics

    return gradient_of


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """Differentiates the loss of rows, in one stage or in two.

    Attributes:
      objective: whose loss it is.
      reader: reads policies out.
      trained: the parameters that the loss is differentiated by.
      frozen: the other parameters of the trained policy.
      policies: the parameters of all other policies, by name.
      step: [] int32, updates done.
      coupled: the number of neighbouring rows that the loss must see together.
      passes: the parts that the draws of a row are differentiated in, one after the other.
    """

    objective: Objective
    reader: Reader
    trained: Variables
    frozen: Variables
    policies: dict[str, Variables]
    step: Array
    coupled: int
    passes: int

    def zero(self) -> Variables:
        """A gradient of zeros."""
        return jax.tree.map(jnp.zeros_like, self.trained)

    def loss_of(self, readouts: Array, batch: Batch) -> Loss:
        """The loss of a batch, with the spread of its draws among the metrics."""
        loss = self.objective.loss(readouts, batch)
        if self.objective.readout is token_log_probs:
            loss = loss.replace(metrics=loss.metrics | elbo_spread(readouts, batch))
        return loss

    def add(self, gradient: Variables, rows: Rows) -> tuple[Variables, Loss]:
        """The gradient with that of rows added, and their loss. They are all that it couples."""
        if self.passes == 1:
            addend, loss = self.in_one(rows)
        else:
            addend, loss = self.in_two(rows, Pieces(1))
        return jax.tree.map(jnp.add, gradient, addend), loss

    def in_one(self, rows: Rows) -> tuple[Variables, Loss]:
        """The gradient of the loss of rows, and the loss, by one forward and backward pass."""
        readouts, pull_back = jax.vjp(lambda trained: self._read(trained, rows), self.trained)
        others = jax.lax.stop_gradient(self._read_others(rows))
        weights, loss = self._weights(readouts, rows, others)
        return pull_back(weights)[0], loss

    def in_two(self, rows: Rows, pieces: Pieces) -> tuple[Variables, Loss]:
        """The same, a piece of the rows and a pass over their draws at a time."""
        parts = pieces.split(rows)
        readouts, others = pieces.join(pieces.map(self._read_in_passes, parts))
        weights, loss = self._weights(readouts, rows, others)
        zero, weighted_parts = self.zero(), (parts, pieces.split(weights))
        return pieces.fold(self._add_in_passes, zero, weighted_parts)[0], loss

    def _read(self, trained: Variables, rows: Rows) -> Array:
        """The readouts [b, m, C] of the trained policy under the draws of rows."""
        variables = self.frozen | trained
        return self.reader(
            variables, rows.rollout, rows.draws, self.step, rows.dropout, self.policies
        )

    def _read_others(self, rows: Rows) -> dict[str, Array]:
        """The readouts of the policies that the loss looks at, by name."""
        return {
            name: self.reader(
                self.policies[name], rows.rollout, rows.draws, self.step, None, self.policies
            )
            for name in self.objective.looks_at
        }

    def _weights(self, readouts: Array, rows: Rows, others: dict[str, Array]) -> tuple[Array, Loss]:
        """d loss / d readouts [b, M, C], and the loss of rows whose other readouts are `others`."""

        def loss_of_rows(readouts: Array) -> tuple[Array, Loss]:
            batch = Batch(rows.rollout, rows.draws, rows.others | others, self.step)
            if rows.idle is None:
                loss = self.loss_of(readouts, batch)
            else:
                loss = loss_of_live(self.loss_of, readouts, batch, rows.idle, self.coupled)
            return loss.total, loss

        return jax.grad(loss_of_rows, has_aux=True)(readouts)

    def _read_in_passes(self, part: Rows) -> tuple[Array, dict[str, Array]]:
        """The readouts of the trained policy, and those of others, under all draws of rows."""

        def read_pass(cut: tuple[Draws, Array | None]) -> tuple[Array, dict[str, Array]]:
            piece = Rows(part.rollout, *cut, {})
            return self._read(self.trained, piece), self._read_others(piece)

        cuts = jax.tree.map(lambda x: split_passes(x, self.passes), (part.draws, part.dropout))
        return jax.tree.map(join_passes, jax.lax.map(read_pass, cuts))

    def _add_in_passes(
        self, gradient: Variables, part: tuple[Rows, Array]
    ) -> tuple[Variables, None]:
        """The gradient with that of rows added, whose readouts have weights [b, M, C]."""
        rows, weights = part

        def add_pass(gradient: Variables, cut: Any) -> tuple[Variables, None]:
            *draws, weights = cut

            def weighted(trained: Variables) -> Array:
                return optax.tree.vdot(weights, self._read(trained, Rows(rows.rollout, *draws, {})))

            return jax.tree.map(jnp.add, gradient, jax.grad(weighted)(self.trained)), None

        cuts = jax.tree.map(
            lambda x: split_passes(x, self.passes), (rows.draws, rows.dropout, weights)
        )
        return jax.lax.scan(add_pass, gradient, cuts)[0], None


def elbo_spread(log_probs: Array, batch: Batch) -> Metrics:
    """How far the draws of a completion disagree about its likelihood, in nats per token.

    Each draw estimates the ELBO per token by the mean of its log-probabilities. The metric is the
    standard deviation of these estimates, without bias in its square, as a mean over the rows of
    which two draws or more have a token in the loss.

    Args:
      log_probs: [b, M, C] in nats.
      batch: the rows and their draws.
    """
    target = batch.target  # [b, M, C]
    tokens = target.sum(-1)  # [b, M]
    estimate = jnp.where(target, log_probs, 0.0).sum(-1) / jnp.maximum(tokens, 1)  # [b, M]
    draws = (tokens > 0).sum(-1)  # [b]
    mean = jnp.where(tokens > 0, estimate, 0.0).sum(-1) / jnp.maximum(draws, 1)  # [b]
    squares = jnp.where(tokens > 0, jnp.square(estimate - mean[:, None]), 0.0).sum(-1)  # [b]
    spread = jnp.sqrt(squares / jnp.maximum(draws - 1, 1))
    counted = draws > 1
    total = jnp.where(counted, spread, 0.0).sum()
    return {'elbo_spread': (total, counted.sum().astype(jnp.float32))}


def other_policies(frozen: Variables, kept: Mapping[str, Variables]) -> dict[str, Variables]:
    """The parameters of the policies beside the trained one, by name.

    The reference is kept where every parameter is trained; otherwise it is the model without its
    adapters.
    """
    policies = {name: frozen | params for name, params in kept.items()}
    return {REFERENCE: frozen} | policies


def rows_at_once(
    objective: Objective, rows: int, microbatch: int, group_size: int, shards: int
) -> int:
    """The rows that are differentiated at once: a microbatch, or less where rows can be idle.

    Args:
      objective: of the update.
      rows: B.
      microbatch: which divides B.
      group_size: G.
      shards: the parts that rows are split into over devices.
    """
    if objective.idle is None or (objective.couples == 'batch' and microbatch == rows):
        return microbatch  # A part of a coupled batch would need two stages.
    whole_groups = objective.couples == 'group' and microbatch % group_size == 0
    return rows_of_piece(rows, microbatch, math.lcm(shards, group_size if whole_groups else 1))


def rows_together(couples: str, rows: int, microbatch: int, group_size: int) -> int:
    """The rows that a loss sees at once: a microbatch if that holds all that it couples."""
    whole = {'row': True, 'group': microbatch % group_size == 0, 'batch': microbatch == rows}
    return microbatch if whole[couples] else rows


def split_passes(x: Array, passes: int) -> Array:
    """[b, M, ...] -> [passes, b, M / passes, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], passes, -1, *x.shape[2:]), 1, 0)


def join_passes(x: Array) -> Array:
    """[passes, b, m, ...] -> [b, passes * m, ...]: the inverse of `split_passes`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

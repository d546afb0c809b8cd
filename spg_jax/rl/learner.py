"""The learner: one gradient step of an objective on a rollout, in microbatches and passes of draws.

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

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.models.policy import Policy, Variables
from spg_jax.random import Purpose, example_keys
from spg_jax.rl.batching import Batching
from spg_jax.rl.experience import rows_of_update
from spg_jax.rl.objectives import Batch, Loss, Objective
from spg_jax.rl.objectives.objective import never, token_log_probs
from spg_jax.rl.packing import (
    Pieces,
    loss_of_idle,
    loss_of_live,
    packed,
    rows_of_piece,
    whole_units,
)
from spg_jax.rl.rollout import Rollout, rollout_metrics
from spg_jax.rl.scores import Reader, corrupt, moments
from spg_jax.sharding import current_row_shards
from spg_jax.training.train_state import Metrics, TrainState, apply_gradient

BEHAVIOUR = 'behaviour'  # extras: readouts [B, turns, M, C] of the policy that sampled the rollout
REFERENCE = 'reference'  # the initial policy


class Rows(NamedTuple):
    """Rows of a batch with all that an update needs to differentiate them, [b, ...]."""

    rollout: Rollout
    draws: Draws  # [b, M, ...]
    dropout: Array | None  # [b, M] keys of the adapters' dropout
    others: dict[str, Array]  # readouts [b, M, C] that are there already
    idle: Array | None = None  # [b] bool, rows that leave the update; None where none can


def make_update(
    policy: Policy,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batching: Batching,
    seed: int,
    shardings: TrainState,
) -> Callable[[TrainState, Rollout], tuple[TrainState, Metrics]]:
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

    def dropout_keys(step: Array, rollout: Rollout) -> Array | None:
        if lora is None or not lora.dropout:
            return None
        keys = example_keys(seed, Purpose.DROPOUT, step, rollout.example_id)
        return jax.vmap(lambda key: jax.random.split(key, objective.draws))(keys)

    def update(state: TrainState, experience: Rollout) -> tuple[TrainState, Metrics]:
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
            dropout_keys(state.step, rollout),
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

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


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

    def loss_of(readouts: Array, batch: Batch) -> Loss:
        loss = objective.loss(readouts, batch)
        if objective.readout is token_log_probs:
            loss = loss.replace(metrics=loss.metrics | elbo_spread(readouts, batch))
        return loss

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
        step = jnp.asarray(step, jnp.int32)
        policies = other_policies(frozen, kept or {})
        rows = Rows(rollout, draws, dropout, dict(others or {}))
        batch_size = len(rollout.reward)
        at_once = rows_at_once(objective, batch_size, microbatch, group_size, current_row_shards())
        together = rows_together(objective.couples, batch_size, at_once, group_size)
        passes = draws.masked.shape[1] // draws_per_pass if draws_per_pass else 1
        coupled = {'row': 1, 'group': group_size, 'batch': batch_size}[objective.couples]

        def read(variables: Variables, piece: Rows, dropout: Array | None) -> Array:
            return reader(variables, piece.rollout, piece.draws, step, dropout, policies)

        def loss_of_rows(
            readouts: Array, rows: Rows, others: dict[str, Array]
        ) -> tuple[Array, Loss]:
            batch = Batch(rows.rollout, rows.draws, rows.others | others, step)
            if rows.idle is None:
                loss = loss_of(readouts, batch)
            else:
                loss = loss_of_live(loss_of, readouts, batch, rows.idle, coupled)
            return loss.total, loss

        weights_of = jax.grad(loss_of_rows, has_aux=True)  # -> (d loss / d readouts, Loss)

        def read_others(piece: Rows) -> dict[str, Array]:
            return {name: read(policies[name], piece, None) for name in objective.looks_at}

        def in_one_stage(rows: Rows) -> tuple[Variables, Loss]:
            readouts, pull_back = jax.vjp(
                lambda trained: read(frozen | trained, rows, rows.dropout), trained
            )
            weights, loss = weights_of(readouts, rows, jax.lax.stop_gradient(read_others(rows)))
            return pull_back(weights)[0], loss

        def in_two_stages(rows: Rows, pieces: Pieces) -> tuple[Variables, Loss]:
            parts = pieces.split(rows)

            def read_part(part: Rows) -> tuple[Array, dict[str, Array]]:
                def read_pass(cut: tuple[Draws, Array | None]) -> tuple[Array, dict[str, Array]]:
                    piece = Rows(part.rollout, *cut, {})
                    return read(frozen | trained, piece, piece.dropout), read_others(piece)

                cuts = jax.tree.map(lambda x: split_passes(x, passes), (part.draws, part.dropout))
                return jax.tree.map(join_passes, jax.lax.map(read_pass, cuts))

            readouts, others = pieces.join(pieces.map(read_part, parts))
            weights, loss = weights_of(readouts, rows, others)

            def add_part(gradient: Variables, part: tuple[Rows, Array]) -> tuple[Variables, None]:
                rows, weights = part

                def add_pass(gradient: Variables, cut: Any) -> tuple[Variables, None]:
                    *draws, weights = cut

                    def weighted(trained: Variables) -> Array:
                        piece = Rows(rows.rollout, *draws, {})
                        readouts = read(frozen | trained, piece, piece.dropout)
                        return optax.tree.vdot(weights, readouts)

                    return jax.tree.map(jnp.add, gradient, jax.grad(weighted)(trained)), None

                cuts = jax.tree.map(
                    lambda x: split_passes(x, passes), (rows.draws, rows.dropout, weights)
                )
                return jax.lax.scan(add_pass, gradient, cuts)[0], None

            zero = jax.tree.map(jnp.zeros_like, trained)
            return pieces.fold(add_part, zero, (parts, pieces.split(weights)))[0], loss

        def add(gradient: Variables, rows: Rows) -> tuple[Variables, Loss]:
            if passes == 1:
                addend, loss = in_one_stage(rows)
            else:
                addend, loss = in_two_stages(rows, Pieces(1))
            return jax.tree.map(jnp.add, gradient, addend), loss

        is_whole = together == at_once  # whether a piece holds all that its loss couples
        unit = group_size if is_whole and objective.couples == 'group' else 1
        pieces, of_idle = Pieces(batch_size // at_once, unit), None
        if objective.idle is not None:
            batch = Batch(rollout, draws, rows.others, step)
            idle = whole_units(
                objective.idle(batch), group_size if objective.couples == 'group' else 1
            )
            rows = rows._replace(idle=idle)
            pieces = packed(idle, at_once, unit)
            of_idle = loss_of_idle(loss_of, batch, idle, coupled)
        if is_whole:
            zero = jax.tree.map(jnp.zeros_like, trained)
            gradient, loss = pieces.fold(add, zero, pieces.split(rows), of_idle)
        else:
            gradient, loss = in_two_stages(rows, pieces)
            if of_idle is not None:
                loss = jax.tree.map(jnp.add, loss, of_idle)
        weight = jnp.maximum(loss.weight, 1.0)
        return loss.total / weight, jax.tree.map(lambda g: g / weight, gradient), loss.metrics

    return gradient_of


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

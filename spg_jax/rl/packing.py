"""How the rows of an update are cut into pieces, and how rows that cannot move the gradient leave.

`Pieces` holds all rows. `Packed` holds the live rows in its first pieces, and its loops end after
the last piece with a live row. The number of live rows is read on the device by a loop of the
compiled program, so that one program serves every batch and the host waits for nothing.

Letters of axes: `B` rows, `b` rows of a piece.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.rl.objectives.objective import Batch, Loss, over_units
from spg_jax.sharding import constrain_rows

# Where all rows fit into one microbatch, idle rows are left out in steps of a quarter of the batch.
# Smaller pieces would save more, but they take longer where no row is idle (docs/performance.md).
MOST_PIECES = 4

LossFunction = Callable[[Any, Batch], Loss]
Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Cuts of a batch into equal pieces.

    Attributes:
      number: of pieces.
      unit: rows that stay neighbours in one piece.
    """

    number: int
    unit: int = 1

    def split(self, rows: Any) -> Any:
        """A pytree [B, ...] -> [number, b, ...]."""
        return jax.tree.map(lambda x: split_parts(x, self.number, self.unit), rows)

    def join(self, pieces: Any) -> Any:
        """The inverse of `split`, for units of one row."""
        return jax.tree.map(join_parts, pieces)

    def map(self, function: Callable[[Any], Any], pieces: Any) -> Any:
        """The results of a function of each piece, with a leading axis `number`."""
        return jax.lax.map(function, pieces)

    def fold(self, step: Step, carry: Any, pieces: Any, start: Any = None) -> tuple[Any, Any]:
        """Takes the steps of all pieces; returns the last carry and the sum of the addends.

        Args:
          step: (carry, piece) -> (carry, addend).
          carry: what the first step gets.
          pieces: [number, b, ...].
          start: what the sum starts from. `Packed` needs it unless addends are None.
        """
        carry, addends = jax.lax.scan(step, carry, pieces)
        total = jax.tree.map(lambda x: x.sum(0), addends)
        return carry, total if start is None else jax.tree.map(jnp.add, start, total)


@dataclasses.dataclass(frozen=True)
class Packed(Pieces):
    """Cuts of a batch whose live rows come first.

    Attributes:
      order: [B] int32, the rows, live ones first.
      live: [] int32, the number of pieces that hold a live row. The others are not computed.
    """

    order: Array = dataclasses.field(kw_only=True)
    live: Array = dataclasses.field(kw_only=True)

    def split(self, rows: Any) -> Any:
        # `Pieces.split` deals units out in turn, so that each device has an equal part of every
        # piece. This order makes it deal out the rows of `order` piece by piece.
        dealt = self.order.reshape(self.number, -1, self.unit)
        dealt = dealt.transpose(1, 0, 2).reshape(-1)
        return super().split(constrain_rows(jax.tree.map(lambda x: x[dealt], rows)))

    def join(self, pieces: Any) -> Any:
        place = jnp.argsort(self.order)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[place], pieces)

    def map(self, function: Callable[[Any], Any], pieces: Any) -> Any:
        """As for `Pieces`; the result of a piece without live rows is 0."""
        shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
        results = jax.tree.map(lambda x: jnp.zeros((self.number, *x.shape), x.dtype), shapes)

        def put(index: Array, results: Any) -> Any:
            values = function(_at(pieces, index))
            return jax.tree.map(lambda old, new: old.at[index].set(new), results, values)

        return self._loop(put, results)

    def fold(self, step: Step, carry: Any, pieces: Any, start: Any = None) -> tuple[Any, Any]:
        def add(index: Array, loop: tuple[Any, Any]) -> tuple[Any, Any]:
            carry, total = loop
            carry, addend = step(carry, _at(pieces, index))
            return carry, jax.tree.map(jnp.add, total, addend)

        return self._loop(add, (carry, start))

    def _loop(self, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """Calls body(index, carry) -> carry for each live piece."""

        def is_left(loop: tuple[Array, Any]) -> Array:
            # The first limit is known to the compiler, and `planning.collectives` reads it.
            return (loop[0] < self.number) & (loop[0] < self.live)

        def run(loop: tuple[Array, Any]) -> tuple[Array, Any]:
            index, carry = loop
            return index + 1, body(index, carry)

        return jax.lax.while_loop(is_left, run, (jnp.int32(0), carry))[1]


def packed(idle: Array, rows: int, unit: int) -> Packed:
    """Packs the live rows of a batch into its first pieces.

    Args:
      idle: [B] bool; the rows of a unit are all idle or all live.
      rows: of a piece.
      unit: rows that stay neighbours.
    """
    live_rows = (~idle).sum()
    return Packed(
        number=len(idle) // rows,
        unit=unit,
        order=jnp.argsort(idle, stable=True).astype(jnp.int32),
        live=((live_rows + rows - 1) // rows).astype(jnp.int32),
    )


def whole_units(idle: Array, unit: int) -> Array:
    """[B] bool, True for the rows of units of neighbours that are all idle."""
    return jnp.repeat(idle.reshape(-1, unit).all(axis=1), unit)


def rows_of_piece(rows: int, microbatch: int, multiple: int) -> int:
    """The rows of a piece where rows can be idle: a microbatch, or a part of one that is the batch.

    The part is the smallest that makes at most MOST_PIECES of the batch. A batch that is cut into
    microbatches already stays cut as it is, because its programs are planned with their size.

    Args:
      rows: B.
      microbatch: which divides B.
      multiple: the rows of a piece are a multiple of it.
    """
    if rows == microbatch:
        for part in range(multiple, microbatch, multiple):
            if microbatch % part == 0 and MOST_PIECES * part >= rows:
                return part
    return microbatch


def loss_of_live(loss: LossFunction, readouts: Array, batch: Batch, idle: Array, unit: int) -> Loss:
    """The loss of rows without the part of idle ones that fill up a piece.

    Args:
      loss: of rows that consist of whole units.
      readouts: [b, M, C].
      batch: the rows.
      idle: [b] bool.
      unit: rows that a loss must see together.
    """
    losses = over_units(loss, unit)(readouts, batch)
    live = ~idle.reshape(-1, unit).all(axis=1)
    return jax.tree.map(lambda x: jnp.where(live, x, 0.0).sum(), losses)


def loss_of_idle(
    loss: LossFunction, batch: Batch, idle: Array, unit: int, looks_at: Iterable[str] = ()
) -> Loss:
    """The part of the idle rows in weight and metrics, though nothing was read out for them.

    Their readouts are NaN. A metric of theirs that is then NaN depends on readouts; it is left out
    with its weight, and becomes a figure of the live rows alone. Any other metric, and the weight,
    is what it would be if they had been read out. A metric that compares readouts hides their NaN,
    so it has to leave out rows without an advantage by itself, as clip shares do.

    Args:
      loss: of rows that consist of whole units.
      batch: all rows of an update.
      idle: [B] bool.
      unit: rows that a loss must see together.
      looks_at: the other policies that the loss looks at, which were not read out either.
    """
    unread = jnp.full(batch.target.shape, jnp.nan, jnp.float32)
    batch = batch.replace(others=batch.others | dict.fromkeys(looks_at, unread))
    losses = over_units(loss, unit)(unread, batch)
    units = idle.reshape(-1, unit).all(axis=1)

    def known(metric: tuple[Array, Array]) -> tuple[Array, Array]:
        total, weight = metric
        counted = units & ~jnp.isnan(total) & ~jnp.isnan(weight)
        return jnp.where(counted, total, 0.0).sum(), jnp.where(counted, weight, 0.0).sum()

    return Loss(
        total=jnp.zeros(()),
        weight=jnp.where(units, losses.weight, 0.0).sum(),
        metrics={name: known(metric) for name, metric in losses.metrics.items()},
    )


def split_parts(x: Array, parts: int, unit: int = 1) -> Array:
    """[B, ...] -> [parts, B / parts, ...], with neighbours of a unit in one part.

    The stride keeps rows on their devices.
    """
    split = x.reshape(len(x) // (parts * unit), parts, unit, *x.shape[1:])
    return jnp.moveaxis(split, 1, 0).reshape(parts, -1, *x.shape[1:])


def join_parts(x: Array) -> Array:
    """[parts, b, ...] -> [parts * b, ...]: the inverse of `split_parts` with units of one row."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _at(pieces: Any, index: Array) -> Any:
    """The piece at an index of a pytree [number, b, ...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), pieces)

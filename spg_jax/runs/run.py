"""One training on disk, from its first update to its last: checkpoints, metrics and samples."""

import contextlib
import functools
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax import Array

from spg_jax.process import distributed
from spg_jax.runs.arrays import abstract
from spg_jax.runs.checkpoints import Record, RunCheckpoints
from spg_jax.runs.metrics import MetricsWriter, SampleWriter, Watch
from spg_jax.runs.wandb_log import open_wandb


class Run:
    """The directory of a training that may be cut at any moment and goes on where it was.

    A checkpoint holds arrays and the `record`, a JSON object. Rows of metrics and samples that were
    written after the newest checkpoint are dropped when the training goes on, because they come
    again.

    Attributes:
      directory: where everything is written.
      step: updates done so far.
      record: JSON values that come back with the newest checkpoint; {} in a new training.
      resumes: whether there are checkpoints to go on from.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        wandb: str = '',
        settings: dict[str, Any] | None = None,
        watch: Watch | None = None,
    ):
        """Looks for the newest checkpoint.

        Args:
          directory: of the training.
          keep: newest checkpoints that are kept.
          wandb: project of Weights & Biases to log to as well; '' logs to none.
          settings: every setting of the training, for Weights & Biases.
          watch: takes the row of each update and returns figures to add to it.
        """
        self.directory = directory
        self._started = time.monotonic()
        self._checkpoints = RunCheckpoints(directory / 'checkpoints', keep)
        self.resumes = bool(self._checkpoints.steps())
        self.record = self._newest_record()
        self.step = self._first_step = 0
        self._seconds_before = 0.0
        self._wandb, self._settings = wandb, settings or {}
        self._watch = watch

    @property
    def seconds(self) -> float:
        """Time spent on this training, over all its starts."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def last_row(self) -> dict[str, Any]:
        """The newest metrics of an update; {} before the first."""
        return self._metrics.last_row

    def restore(self, arrays_of: Callable[[Record], Any]) -> Any:
        """Goes on from the newest checkpoint that is whole, and returns its arrays.

        Args:
          arrays_of: gives arrays of the same shapes and types for a record; the checkpoint is
            placed on devices as they are, whatever the mesh was that wrote it.

        Raises:
          ValueError: no checkpoint is whole or fits; the message names a directory.
        """
        step, arrays, self.record = self._checkpoints.load_newest(
            lambda record: abstract(arrays_of(record))
        )
        self.step = self._first_step = step
        self._seconds_before = self.record['seconds']
        return arrays

    def load(self, step: int, arrays_of: Callable[[Record], Any]) -> tuple[Any, Record]:
        """Arrays and record of the checkpoint of a step; `arrays_of` is as in `restore`.

        Raises:
          ValueError: the checkpoint is gone, damaged or does not fit; the message names it.
        """
        return self._checkpoints.load_agreed(step, lambda record: abstract(arrays_of(record)))

    def push(self, metrics: Mapping[str, tuple[Array, Array]]) -> None:
        """Counts an update that was just dispatched and writes the metrics of the one before."""
        self.step += 1
        self._metrics.push(self.step, metrics)

    def flush(self) -> None:
        """Waits for the newest update and writes its metrics."""
        self._metrics.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes a row of figures beside those of the updates, at the current step."""
        self._metrics.write({'step': self.step} | dict(row))

    @functools.cached_property
    def samples(self) -> SampleWriter:
        """The file of completions to look at."""
        return SampleWriter(self.directory, self._first_step)

    def skipped(self, limit: int) -> bool:
        """Whether the newest `limit` updates in a row had no finite loss or gradient."""
        return self.last_row.get('skipped_in_a_row', 0) >= limit

    def check_progress(self, limit: int, remedy: str) -> None:
        """Refuses to go on with a training that only skips updates.

        Args:
          limit: as in `skipped`.
          remedy: what to do about it; it ends the message.

        Raises:
          FloatingPointError: the newest `limit` updates were skipped.
        """
        if self.skipped(limit):
            raise FloatingPointError(
                f'{self.directory}: {limit} non-finite updates in a row, saved at step '
                f'{self.step}; {remedy}'
            )

    def save(self, arrays: Any, **record: Any) -> None:
        """Writes a checkpoint and returns when it is on disk.

        Args:
          arrays: the pytree that `restore` gives back.
          record: JSON values to add to the record.
        """
        self.flush()
        self.record |= record | {'seconds': self.seconds, 'last_row': self.last_row}
        self._checkpoints.save(self.step, arrays, self.record)
        self._metrics.flush_events()

    def close(self) -> None:
        """Finishes all files."""
        self._metrics.close()

    def _newest_record(self) -> Record:
        """The record of the newest checkpoint whose record can be read; {} if there is none."""
        for step in reversed(self._checkpoints.steps()):
            with contextlib.suppress(ValueError):  # `restore` says what is wrong with it
                return self._checkpoints.record(step)
        return {}

    @functools.cached_property
    def _metrics(self) -> MetricsWriter:
        """Opened at the first row, so that a start that fails before it changes no file."""
        log = None
        if self._wandb and distributed.is_leader():
            run_id = self.record.setdefault('wandb_id', uuid.uuid4().hex[:12])
            log = open_wandb(self._wandb, self.directory, run_id, self._settings)
        return MetricsWriter(
            self.directory,
            self._first_step if self._first_step else -1,
            self.record.get('last_row'),
            wandb=log,
            seconds=self.seconds,
            watch=self._watch,
        )

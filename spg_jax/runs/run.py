"""One training on disk, from its first update to its last: checkpoints, metrics and samples."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax import Array

from spg_jax.runs.checkpoints import RunCheckpoints, abstract
from spg_jax.runs.metrics import MetricsWriter, SampleWriter


class Run:
    """The directory of a training that may be cut at any moment and goes on where it was.

    A checkpoint holds arrays and the `record`, a JSON object. Rows of metrics and samples that were
    written after the newest checkpoint are dropped when the training goes on, because they come
    again.

    Attributes:
      directory: where everything is written.
      step: updates done so far.
      record: JSON values that come back with the newest checkpoint; {} in a new training.
    """

    def __init__(self, directory: Path, keep: int, wandb: str = ''):
        """Looks for the newest checkpoint.

        Args:
          directory: of the training.
          keep: newest checkpoints that are kept.
          wandb: project of Weights & Biases to log to as well; '' logs to none.
        """
        self.directory = directory
        self._started = time.monotonic()
        self._checkpoints = RunCheckpoints(directory / 'checkpoints', keep)
        self.step = self._first_step = self._checkpoints.latest_step or 0
        self.record: dict[str, Any] = self._checkpoints.record() if self.step else {}
        self._seconds_before = self.record.get('seconds', 0.0)
        self._wandb = wandb

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._first_step > 0

    @property
    def seconds(self) -> float:
        """Time spent on this training, over all its starts."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def last_row(self) -> dict[str, Any]:
        """The newest metrics of an update; {} before the first."""
        return self._metrics.last_row

    def restore(self, arrays: Any) -> Any:
        """The arrays of the newest checkpoint, in the shapes and shardings of `arrays`.

        Raises:
          ValueError: the checkpoint does not fit or is damaged; names its directory.
        """
        return self._checkpoints.restore(abstract(arrays))

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

    def save(self, arrays: Any, **record: Any) -> None:
        """Writes a checkpoint and returns when it is on disk.

        Args:
          arrays: the pytree that `restore` gives back.
          record: JSON values to add to the record.
        """
        self.flush()
        self.record |= record | {'seconds': self.seconds, 'last_row': self.last_row}
        self._checkpoints.save(self.step, arrays, self.record)

    def close(self) -> None:
        """Finishes all files."""
        self._metrics.close()
        self._checkpoints.close()

    @functools.cached_property
    def _metrics(self) -> MetricsWriter:
        """Opened at the first row, so that a start that fails before it changes no file."""
        return MetricsWriter(
            self.directory,
            self._first_step if self.resumes else -1,
            self.record.get('last_row'),
            wandb=self._wandb,
            seconds=self.seconds,
        )

"""Metrics and sample completions of a run, written as JSON lines and TensorBoard events.

On the devices a metric is a pair (sum, weight), which is divided when the metric is written.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax import Array
from tensorboardX import SummaryWriter

from spg_jax.process import distributed
from spg_jax.process.files import write_whole
from spg_jax.rl.rollout import Rollout
from spg_jax.sharding import own_values

Watch = Callable[[Mapping[str, Any]], Mapping[str, float]]

SAMPLES = 4  # completions of each rollout that are written to a file for people to read
MOST_STEPS = 2**32  # more than any training has; a row of a later step is damaged


def read(metrics: Mapping[str, tuple[Array, Array]]) -> dict[str, float]:
    """Fetches metrics from the devices and divides each sum by its weight.

    A metric whose weight is 0 is left out.
    """
    fetched = jax.device_get(dict(metrics))
    return {name: float(total / weight) for name, (total, weight) in fetched.items() if weight != 0}


class MetricsWriter:
    """Writes rows of metrics; the step of a row is the number of updates done.

    When a run goes on, the rows after its checkpoint are dropped, because they will come again.

    Args:
      directory: where `metrics.jsonl` and the TensorBoard events are written.
      start: the number of updates done when writing begins; rows of later steps are dropped.
      last_row: the row of the last update before `start`, which is added if the file has lost it.
      wandb: a run of Weights & Biases to log to as well, from `open_wandb`; None logs to none.
      seconds: the time spent before writing begins, from which the rows count on.
      watch: takes the row of each update and returns figures to add to it.
    """

    def __init__(
        self,
        directory: Path,
        start: int = 0,
        last_row: dict[str, Any] | None = None,
        wandb: Any = None,
        seconds: float = 0.0,
        watch: Watch | None = None,
    ):
        self._watch = watch
        self.last_row: dict[str, Any] = last_row or {}
        self._pending: tuple[int, Mapping[str, tuple[Array, Array]]] | None = None
        self._started = time.monotonic() - seconds
        self._is_writer = distributed.is_leader()  # Other processes only need `last_row`.
        if not self._is_writer:
            return
        path = directory / 'metrics.jsonl'
        if start and not path.exists():
            print(f'{path} is gone; it begins again after step {start}', file=sys.stderr)
        keep_rows(path, start, last_row)
        self._file = path.open('a')
        self._events = SummaryWriter(str(directory / 'events'), purge_step=start + 1)
        self._wandb = wandb

    def push(self, step: int, metrics: Mapping[str, tuple[Array, Array]]) -> None:
        """Takes the metrics of an update just dispatched; writes those of the update before it."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Writes the metrics that were pushed last; waits for their update to finish."""
        if self._pending:
            step, metrics = self._pending
            self._pending = None
            row = {'step': step, **read(metrics), 'seconds': time.monotonic() - self._started}
            row = {name: _finite(value) for name, value in row.items()}
            self.last_row = row | (self._watch(row) if self._watch else {})
            self.write(self.last_row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row. Values that are not finite become null, because JSON has no NaN."""
        if not self._is_writer:
            return
        row = {name: _finite(value) for name, value in row.items()}
        self._file.write(json.dumps(row) + '\n')
        self._file.flush()
        for name, value in row.items():
            if name != 'step' and isinstance(value, int | float):
                self._events.add_scalar(name, value, row['step'])
        if self._wandb:
            self._wandb.log(row, step=row['step'])

    def flush_events(self) -> None:
        """Brings the TensorBoard events to disk, where a cut run then has them."""
        if self._is_writer:
            self._events.flush()

    def close(self) -> None:
        """Writes the metrics that were pushed last and closes all files."""
        self.flush()
        if not self._is_writer:
            return
        self._file.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()


class SampleWriter:
    """Writes a few completions of every rollout with their rewards to `completions.jsonl`."""

    def __init__(self, directory: Path, start: int):
        self._path = directory / 'completions.jsonl'
        if distributed.is_leader():
            keep_rows(self._path, start - 1)  # A rollout is written at the step at which it starts.

    def write(
        self, step: int, examples: Sequence[Any], texts: Sequence[str], rollout: Rollout
    ) -> None:
        """Appends the first rows of a rollout; `texts` has G completions for each example."""
        if not distributed.is_leader():
            return
        reward, advantage = own_values(rollout.reward), own_values(rollout.advantage)
        group_size = len(texts) // len(examples)
        with self._path.open('a') as file:
            for row in range(min(SAMPLES, len(texts))):
                sample = {
                    'step': step,
                    'example': examples[row // group_size],
                    'completion': texts[row],
                    'reward': float(reward[row]),
                    'advantage': float(advantage[row]),
                }
                file.write(json.dumps(sample) + '\n')


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file that are whole; [] if there is no file."""
    return _sorted_rows(path)[0]


def keep_rows(path: Path, last_step: int, last_row: dict[str, Any] | None = None) -> None:
    """Drops the rows after `last_step`, because they will be written again.

    A line that is no row is set aside in a file beside, whose name is printed. `last_row` is added
    if the file has lost it. The file is replaced as a whole, so that no cut can lose a row.
    """
    rows, damaged = _sorted_rows(path)
    if damaged:
        place = path.with_name(path.name + '.damaged')
        with place.open('ab') as file:
            file.writelines(line + b'\n' for line in damaged)
        print(f'{path}: {len(damaged)} damaged lines set aside in {place}', flush=True)
    rows = [row for row in rows if row['step'] <= last_step]
    if last_row and last_row not in rows:
        rows.append(last_row)
    write_whole(path, ''.join(json.dumps(row) + '\n' for row in rows))


def _sorted_rows(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The rows of a JSON lines file, and the lines that are none."""
    rows, damaged = [], []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        step = row.get('step') if isinstance(row, dict) else None
        if type(step) is int and 0 <= step <= MOST_STEPS:
            rows.append(row)
        else:
            damaged.append(line)
    return rows, damaged


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

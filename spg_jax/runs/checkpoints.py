"""The checkpoints of a run, written by Orbax: everything that the run needs to go on.

`checkpoints/<step>/` holds the train state without frozen parameters and, in RL, the current
rollout. Its metadata is a JSON record, with the state of the data iterator, the last row of metrics
and, in RL, the best figures on validation. A checkpoint appears whole or not at all. Policies,
which are made for use, are in `spg_jax.runs.policies`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from spg_jax.errors import one_line


class RunCheckpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, keep: int):
        """Opens or creates the directory, in which the newest `keep` checkpoints are kept."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The number of updates done at the newest checkpoint; None if there is no checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON record, and returns when both are on disk."""
        self._checkpointer.save(step, arrays, custom_metadata=record, force=True, overwrite=True)

    def record(self) -> dict[str, Any]:
        """The JSON record of the newest checkpoint."""
        return self._checkpointer.metadata(self.latest_step).custom_metadata

    def restore(self, target: Any) -> Any:
        """The arrays of the newest checkpoint, in the shapes, types and shardings of `target`.

        Raises:
          ValueError: if the checkpoint is damaged or does not fit; the message names the directory.
        """
        path = self._directory / str(self.latest_step)
        return restored(path, lambda _: self._checkpointer.load(None, target))

    def close(self) -> None:
        """Waits until everything is written."""
        self._checkpointer.close()


def abstract(tree: Any) -> Any:
    """The shapes, types and shardings of a tree of arrays, into which a tree can be restored."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def restored(path: Path, load: Callable[[Path], Any]) -> Any:
    """The result of `load` at a path.

    Raises:
      ValueError: if `load` fails; the message is one line that names the path.
    """
    # Orbax and TensorStore raise exceptions of a dozen types, with messages of many lines.
    try:
        return load(path.absolute())
    except Exception as error:
        raise ValueError(
            f'{path} cannot be restored ({one_line(error)[:300]}); the checkpoint is damaged or of '
            'another configuration: use another one, or delete it and run again'
        ) from error

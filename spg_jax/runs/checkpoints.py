"""The checkpoints of a run: everything that it needs to go on, by Orbax.

`checkpoints/<step>/` holds the train state without what is frozen, the current rollout and, as
metadata, the state of the data iterator, the best-on-validation record and the last metrics row. It
appears whole or not at all. Policies, which are for use, are in `spg_jax.runs.policies`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from spg_jax.errors import one_line


class RunCheckpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, directory: Path, keep: int):
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Updates done at the newest whole checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON record, and returns when both are on disk."""
        self._checkpointer.save(step, arrays, custom_metadata=record, force=True, overwrite=True)

    def record(self) -> dict[str, Any]:
        """The JSON record of the newest checkpoint."""
        return self._checkpointer.metadata(self.latest_step).custom_metadata

    def restore(self, target: Any) -> Any:
        """The arrays of the newest checkpoint as `target` (abstract, with shardings).

        Raises:
          ValueError: the checkpoint does not fit `target` or is damaged; names the directory.
        """
        path = self._directory / str(self.latest_step)
        return restored(path, lambda _: self._checkpointer.load(None, target))

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays: the target to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def restored(path: Path, load: Callable[[Path], Any]) -> Any:
    """What `load` reads at a path.

    Raises:
      ValueError: it does not; names the path, on one line.
    """
    # Orbax and TensorStore raise a dozen types, with messages of many lines.
    try:
        return load(path.absolute())
    except Exception as error:
        raise ValueError(
            f'{path} cannot be restored ({one_line(error)[:300]}); the checkpoint is damaged or of '
            'another configuration: use another one, or delete it and run again'
        ) from error

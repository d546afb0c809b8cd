"""The checkpoints of a run: everything that it needs to go on, written by Orbax.

`checkpoints/<step>/` holds the arrays of a training without its frozen parameters and, as metadata,
a record of JSON values with digests of both. A checkpoint appears whole or not at all, and it is
believed only if its digests agree. Policies, which are for use, are in `spg_jax.runs.policies`.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from orbax.checkpoint import v1 as ocp

from spg_jax.process import distributed
from spg_jax.runs.arrays import abstract, restored, saving
from spg_jax.training.digests import digest_arrays

Record = dict[str, Any]  # JSON values
NEEDED = 'needed'  # in a record: steps of the checkpoints that are kept as long as this one
DAMAGED = '.damaged'  # ends the name of a checkpoint that could not be read
T = TypeVar('T')


class RunCheckpoints:
    """The checkpoints of one run.

    Attributes:
      directory: holds a folder for each checkpoint, which is called by its step.
    """

    def __init__(self, directory: Path, keep: int):
        """Makes the directory if need be.

        Args:
          directory: of the checkpoints.
          keep: number of newest checkpoints that are kept.
        """
        self.directory = directory
        self._keep = keep
        if distributed.is_leader():
            directory.mkdir(parents=True, exist_ok=True)
            for unfinished in directory.glob('*.orbax-checkpoint-tmp*'):
                shutil.rmtree(unfinished, ignore_errors=True)
        distributed.barrier(f'checkpoints of {directory}')

    def steps(self) -> list[int]:
        """The steps of all checkpoints, whole or damaged, in ascending order."""
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, arrays: Any, record: Record) -> None:
        """Writes a checkpoint, reads it back, and deletes the ones that are no longer kept.

        The newest are kept, and those that the record of one of the newest says it needs.

        Raises:
          OSError: it could not be written, or what was read back is not what was written.
        """
        path = self.directory / str(step)
        digest = digest_arrays(arrays)
        metadata = {'record': record, 'arrays': digest, 'digest': _digest_record(record)}
        with saving(path):
            ocp.save(path.absolute(), arrays, overwrite=True, custom_metadata=metadata)
            self.load(step, lambda _: abstract(arrays))
        steps = self.steps()
        needed = {old for step in steps[-self._keep :] for old in self._needed(step)}
        if distributed.is_leader():
            for old in set(steps[: -self._keep]) - needed:
                shutil.rmtree(self.directory / str(old), ignore_errors=True)

    def record(self, step: int) -> Record:
        """The record of a checkpoint.

        Raises:
          ValueError: it is damaged, or it was written before there were digests.
        """
        metadata = self._metadata(step)
        if _digest_record(metadata['record']) != metadata['digest']:
            raise ValueError(f'{self.directory / str(step)}: the record is not the one saved')
        return metadata['record']

    def load(self, step: int, target_of: Callable[[Record], Any]) -> tuple[Any, Record]:
        """The arrays and the record of a checkpoint.

        Args:
          step: of the checkpoint.
          target_of: gives the shapes, types and shardings of the arrays, for a record.

        Raises:
          ValueError: the checkpoint is damaged or does not fit; the message names its directory.
        """
        path = self.directory / str(step)
        record = self.record(step)
        arrays = restored(path, lambda path: ocp.load(path, target_of(record)))
        if digest_arrays(arrays) != self._metadata(step)['arrays']:
            raise ValueError(f'{path}: the arrays are not those that were saved')
        return arrays, record

    def load_newest(self, target_of: Callable[[Record], Any]) -> tuple[int, Any, Record]:
        """Step, arrays and record of the newest checkpoint that is whole.

        A newer one that some process cannot read is set aside under another name, and the reason is
        printed; nothing is ever deleted because it could not be read.

        Raises:
          ValueError: no checkpoint is whole; the message names the newest and says what is wrong.
        """
        failures: dict[int, ValueError] = {}
        for step in reversed(self.steps()):
            try:
                arrays, record = self.load_agreed(step, target_of)
            except ValueError as error:
                failures[step] = error
                continue
            for damaged, error in failures.items():
                place = self._set_aside(damaged)
                print(f'{error}: set aside as {place.name}, going on from step {step}', flush=True)
            return step, arrays, record
        newest = next(iter(failures.values()))
        raise ValueError(
            f'{newest}; no older checkpoint is whole either: restore one, or move '
            f'{self.directory.parent} away to begin anew'
        )

    def load_agreed(self, step: int, target_of: Callable[[Record], Any]) -> tuple[Any, Record]:
        """`load`, which counts only if every process can; raises ValueError as it does."""
        path = self.directory / str(step)
        # Orbax waits for all processes, so none of them may begin to load alone.
        _agreed(path, lambda: self.record(step))
        return _agreed(path, lambda: self.load(step, target_of))

    def _needed(self, step: int) -> list[int]:
        """The checkpoints that one needs; [] if its record cannot be read."""
        with contextlib.suppress(ValueError):
            return self.record(step).get(NEEDED, [])
        return []

    def _set_aside(self, step: int) -> Path:
        path, number = self.directory / str(step), 1
        place = path.with_name(path.name + DAMAGED)
        while place.exists():
            number += 1
            place = path.with_name(f'{path.name}{DAMAGED}{number}')
        if distributed.is_leader():
            path.rename(place)
        distributed.barrier(f'set aside {path}')
        return place

    def _metadata(self, step: int) -> dict[str, Any]:
        path = self.directory / str(step)
        metadata = restored(path, lambda path: ocp.metadata(path).custom_metadata)
        if not isinstance(metadata, dict) or not {'record', 'arrays', 'digest'} <= set(metadata):
            raise ValueError(f'{path} has no digests: it is damaged, or older than they are')
        return metadata


def _agreed(path: Path, read: Callable[[], T]) -> T:
    """The result of `read` for a path, which counts only if every process has one.

    Raises:
      ValueError: `read` fails in this process or in another one.
    """
    result, failure = None, None
    try:
        result = read()
    except ValueError as error:
        failure = error
    if distributed.largest(int(failure is not None)):
        raise failure or ValueError(f'{path} cannot be read by another process')
    return result


def _digest_record(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

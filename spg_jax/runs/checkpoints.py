"""The checkpoints of a run: everything that it needs to go on, written by Orbax.

`checkpoints/<step>/` holds the arrays of a training without its frozen parameters and, as metadata,
a record of JSON values with digests of both. A checkpoint appears whole or not at all, and it is
believed only if its digests agree. Policies, which are for use, are in `spg_jax.runs.policies`.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from spg_jax.errors import one_line
from spg_jax.process import distributed
from spg_jax.training.digests import digest_arrays

Record = dict[str, Any]  # JSON values
DAMAGED = '.damaged'  # ends the name of a checkpoint that could not be read


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

        Raises:
          OSError: it could not be written, or what was read back is not what was written.
        """
        path = self.directory / str(step)
        digest = digest_arrays(arrays)
        metadata = {'record': record, 'arrays': digest, 'digest': _digest_record(record)}
        try:
            with _silent_logs():
                ocp.save(path.absolute(), arrays, overwrite=True, custom_metadata=metadata)
            self.load(step, lambda _: abstract(arrays))
        except Exception as error:  # Orbax and TensorStore raise a dozen types.
            raise OSError(f'{path} could not be saved ({one_line(error)[:300]})') from error
        if distributed.is_leader():
            for old in self.steps()[: -self._keep]:
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

        A newer one that is not whole is set aside under another name, and the reason is printed;
        nothing is ever deleted because it could not be read.

        Raises:
          ValueError: no checkpoint is whole; the message names the newest and says what is wrong.
        """
        failures: dict[int, ValueError] = {}
        for step in reversed(self.steps()):
            try:
                arrays, record = self.load(step, target_of)
            except ValueError as error:
                failures[step] = error
                continue
            for damaged, error in failures.items():
                place = self._set_aside(damaged)
                print(f'{error}: set aside as {place.name}, going on from step {step}', flush=True)
            return step, arrays, record
        newest = next(iter(failures.values()))
        raise ValueError(
            f'{newest}; no older checkpoint is whole either: restore one, or use another --workdir'
        )

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


def abstract(tree: Any) -> Any:
    """The shapes, types and shardings of a tree of arrays, as a target to restore into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def restored(path: Path, load: Callable[[Path], Any]) -> Any:
    """The result of `load` for a path.

    Raises:
      ValueError: `load` fails; the message has one line and names the path.
    """
    # Orbax and TensorStore raise a dozen types, with messages of many lines.
    try:
        with _silent_logs():
            return load(path.absolute())
    except Exception as error:
        raise ValueError(
            f'{path} cannot be read: it is damaged or of another configuration '
            f'({one_line(error)[:300]})'
        ) from error


@contextlib.contextmanager
def _silent_logs() -> Iterator[None]:
    """Keeps hundreds of lines off the screen, in which Orbax logs an error that it also raises."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _digest_record(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

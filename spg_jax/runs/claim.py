"""Who may work in the directory of a training, and whether the training there is the one meant."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spg_jax.process import distributed
from spg_jax.process.files import local_path, locked, make_folder, write_whole
from spg_jax.process.interruption import Interruption
from spg_jax.process.json_files import check_json, read_json
from spg_jax.runs.directory import CONFIG, RESTORE
from spg_jax.runs.identity import Settings, changed_settings

WAIT_SECONDS = 1.0  # between two looks whether another process has ended


@contextlib.contextmanager
def claimed(
    workdir: Path,
    settings: Settings,
    finished: bool = False,
    waiting: Interruption | None = None,
) -> Iterator[bool]:
    """Claims a directory for a training with these settings; no other training can enter it.

    The settings of a training that never saved a checkpoint are overwritten, so that a mistake in
    them can be corrected in the same directory. Settings that do not change what is learned may
    differ from those of an earlier start, and a line says which do.

    Args:
      workdir: the directory, which is created if it does not exist.
      settings: the settings of the training.
      finished: whether the training has nothing left to do. Its settings are then kept, even
        without a checkpoint.
      waiting: if given, another process that is training in the directory is waited for, until a
        stop is requested.

    Yields:
      Whether the directory is claimed. If not, a stop was requested before it was free.

    Raises:
      ValueError: if the directory holds a training with other settings (the message names the first
        setting that differs) or the configuration of something else, or if nothing could be read
        back from a directory of its name.
      FileNotFoundError: if the settings of the training in the directory are gone.
      BlockingIOError: if another process is training in the directory, unless `waiting` is given.
    """
    local_path(str(workdir.absolute()), saves=True)
    make_folder(workdir, 'give one that can be written: --workdir, or base.cache for a base policy')
    path = workdir / CONFIG
    settings = json.loads(json.dumps(settings))  # As they will be read: tuples become lists.
    with contextlib.ExitStack() as held:
        if distributed.is_leader():
            _refuse_others(path)
        announced = False
        while not _holds_lock(held, workdir, waits=waiting is not None):
            if not announced:
                print(f'waiting for another process that is training {workdir}', flush=True)
                announced = True
            if waiting.requested():
                print('stopped while waiting; run the same command to go on', flush=True)
                yield False
                return
            time.sleep(WAIT_SECONDS)  # Waiting in the lock itself would not notice a Ctrl-C.
        if distributed.is_leader():
            _settle(workdir, settings, finished)
        distributed.barrier(f'claimed {workdir}')
        yield True


def _refuse_others(path: Path) -> None:
    """Raises ValueError if a file is the configuration of something else than a training."""
    if path.is_file() and 'task' not in _read_object(path):
        raise ValueError(
            f'{path} is not the configuration of a training, and would be replaced by one; use '
            'another --workdir'
        )


def _holds_lock(held: contextlib.ExitStack, workdir: Path, waits: bool) -> bool:
    """Tries once to lock a directory until `held` is left.

    The leader holds the lock for all processes of a training. Every process has to call this
    function.

    Raises:
      BlockingIOError: as `claimed`.
    """
    is_busy = False
    if distributed.is_leader():
        try:
            held.enter_context(locked(workdir / 'lock', wait=False))
        except BlockingIOError:
            if not waits:
                raise BlockingIOError(
                    f'another process is training in {workdir}; wait for it, or use another '
                    'directory'
                ) from None
            is_busy = True
    return not distributed.largest(int(is_busy))


def _settle(workdir: Path, settings: Settings, finished: bool) -> None:
    """Compares the settings of a training with those of an earlier start, and saves them.

    Raises:
      ValueError, FileNotFoundError: as `claimed`.
    """
    path = workdir / CONFIG
    if finished or has_checkpoint(workdir):
        if not path.is_file():
            raise FileNotFoundError(
                f'{path} is gone, the settings of the training that {workdir} holds; {RESTORE}'
            )
        saved = check_json(_read_object(path), Settings, path, RESTORE)
        changes = changed_settings(workdir, saved, settings, CONFIG)
        if finished or not changes:
            return
        print(f'{workdir}: going on with {", ".join(changes)}', flush=True)
    write_whole(path, json.dumps(settings, indent=1))


def has_checkpoint(workdir: Path) -> bool:
    """Whether a training has saved a checkpoint, whole or damaged, to go on from."""
    return any(path.name.isdigit() for path in (workdir / 'checkpoints').glob('*'))


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], RESTORE)

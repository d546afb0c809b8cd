"""One program in several processes: how they find each other, agree on values and end together.

Every process runs the same entry point over the same mesh. One of them, the leader, speaks on
standard output and writes what is not an array; all of them see one file system. With one process
everything here does nothing.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np

# `jax.distributed` has no public way to its store of keys and values.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30  # without a sign of life from a process, the others end
POLL_SECONDS = 1.0
_FAILED = 'spg_jax/failed'


def start() -> None:
    """Joins the processes of a job, before anything else of JAX is used.

    On TPU VMs and under Slurm (one process a node, with all its GPUs) JAX finds them; elsewhere
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so.

    Raises:
      ValueError: none of that is there, or the processes did not find each other in time.
    """
    count, number = os.environ.get('JAX_NUM_PROCESSES'), os.environ.get('JAX_PROCESS_ID')
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(number) if number else None,
            local_device_ids=_gpus_of_the_node(),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f'--distributed found no other processes ({error}); use it on TPU VMs or under srun, '
            'or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID'
        ) from error
    if not is_leader():
        sys.stdout = open(os.devnull, 'w')  # what all would say is said once
    stop = threading.Event()
    watcher = threading.Thread(target=_end_with_the_others, args=(stop,), daemon=True)
    watcher.start()
    # Registered after JAX's own, so called before it: the store must outlive its reader.
    atexit.register(lambda: (stop.set(), watcher.join()))


def _gpus_of_the_node() -> list[int] | None:
    """All of the node; JAX would give each process of Slurm one GPU. None leaves it to JAX."""
    tasks, nodes = os.environ.get('SLURM_NTASKS'), os.environ.get('SLURM_STEP_NUM_NODES')
    gpus = os.environ.get('SLURM_GPUS_ON_NODE')
    return list(range(int(gpus))) if gpus and tasks == nodes else None


def is_leader() -> bool:
    """Whether this process speaks and writes."""
    return global_state.process_id == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if global_state.num_processes > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """Lets the leader through the block before the others: it makes the files that they read."""
    if not is_leader():
        barrier(name)
    yield
    if is_leader():
        barrier(name)


def largest(value: int) -> int:
    """The largest of the processes' values."""
    if global_state.num_processes == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def merge(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Completes an array of which every process knows some rows.

    Args:
      values: [N, ...] of 32 bits; of one shape everywhere.
      known: [N] bool, rows that are right here. Between them the processes know all of them.
    """
    if global_state.num_processes == 1:
        return values
    all_values, all_known = multihost_utils.process_allgather((values, known))
    return all_values[all_known.argmax(0), np.arange(len(values))]


def fail(message: str) -> NoReturn:
    """Ends this process with one line and status 1, and the others with it."""
    print(f'error: {message}', file=sys.stderr, flush=True)
    if global_state.num_processes == 1:
        sys.exit(1)
    with contextlib.suppress(Exception):  # another process may have been first
        global_state.client.key_value_set(_FAILED, f'process {global_state.process_id}: {message}')
    _leave()


def _end_with_the_others(stop: threading.Event) -> None:
    """Ends this process when another one says that it failed. If that one could not say so, JAX
    ends this process after HEARTBEAT_SECONDS, with a line of its own."""
    while not stop.wait(POLL_SECONDS):
        try:
            why = global_state.client.key_value_try_get(_FAILED)
        except Exception:  # not set, so far
            continue
        if not why.startswith(f'process {global_state.process_id}:'):
            print(f'error: ended with {why}', file=sys.stderr, flush=True)
            _leave()


def _leave() -> NoReturn:
    """Exits with status 1 at once: an orderly exit would wait for processes that may be waiting for
    an array from here."""
    if is_leader():
        time.sleep(4 * POLL_SECONDS)  # the others read why from a store in this process
    os._exit(1)

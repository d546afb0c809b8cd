"""One program in several processes: how they find each other, agree on values and end together.

Every process runs the same entry point over the same mesh. One of them, the leader, prints to
standard output and writes every file that does not hold sharded arrays. All processes see one file
system. In a run of one process nothing here waits or communicates.
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

# `jax.distributed` has no public function for its store of keys and values.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30  # after this time without a sign of life from a process, the others end
POLL_SECONDS = 1.0  # between two looks at whether another process has failed
_FAILED = 'spg_jax/failed'  # key in the store of JAX: the message of the process that failed


def start() -> None:
    """Joins the processes of a job; it has to be called before anything else of JAX is used.

    On TPU VMs and under Slurm (one process for each node and all its GPUs) JAX finds the processes.
    Elsewhere the variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID describe the job.

    Raises:
      ValueError: if nothing describes the job, or the processes did not find each other in time.
    """
    count, number = os.environ.get('JAX_NUM_PROCESSES'), os.environ.get('JAX_PROCESS_ID')
    try:
        with _no_proxy():
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
        sys.stdout = open(os.devnull, 'w')  # Only the leader prints what all would print.
    stop = threading.Event()
    watcher = threading.Thread(target=_end_with_the_others, args=(stop,), daemon=True)
    watcher.start()
    # Exit handlers run in reverse order: this one ends the thread that reads the store before that
    # of JAX closes the store.
    atexit.register(lambda: (stop.set(), watcher.join()))


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    """Hides the proxies of the environment, through which gRPC would look for the other processes.

    A proxy leads to the internet and knows no machine of the job. Downloads need it, so it is only
    hidden while the processes connect.
    """
    names = ('grpc_proxy', 'http_proxy', 'https_proxy')
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _gpus_of_the_node() -> list[int] | None:
    """The indices of all GPUs if Slurm runs one process on each node; None leaves it to JAX.

    JAX itself would give each process of Slurm one GPU.
    """
    tasks, nodes = os.environ.get('SLURM_NTASKS'), os.environ.get('SLURM_STEP_NUM_NODES')
    gpus = os.environ.get('SLURM_GPUS_ON_NODE')
    return list(range(int(gpus))) if gpus and tasks == nodes else None


def is_leader() -> bool:
    """Whether this process is the leader, which prints and writes."""
    return global_state.process_id == 0


def several() -> bool:
    """Whether this process is one of several; asking starts no device."""
    return global_state.num_processes > 1


def barrier(name: str) -> None:
    """Returns when every process has called it with this name."""
    if several():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """Lets the leader run the block before the others, because it makes files that they read."""
    if not is_leader():
        barrier(name)
    yield
    if is_leader():
        barrier(name)


def largest(value: int) -> int:
    """The largest of the values that the processes call it with."""
    if not several():
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def merge(values: np.ndarray, is_local: np.ndarray) -> np.ndarray:
    """Completes an array of which every process has a part of the rows.

    Args:
      values: [N, ...] of a type of 32 bits, with the same shape in every process.
      is_local: [N] bool, True for the rows that this process has. Every row must be True in at
        least one process.
    """
    if not several():
        return values
    all_values, owners = multihost_utils.process_allgather((values, is_local))  # [process, N, ...]
    return all_values[owners.argmax(0), np.arange(len(values))]


def fail(message: str, status: int = 1) -> NoReturn:
    """Ends this process with a message of one line and a status, and makes the others end too."""
    print(f'error: {message}', file=sys.stderr, flush=True)
    if not several():
        sys.exit(status)
    with contextlib.suppress(Exception):  # Another process may have set the key already.
        global_state.client.key_value_set(_FAILED, f'process {global_state.process_id}: {message}')
    _leave(status)


def _end_with_the_others(stop: threading.Event) -> None:
    """Ends this process when another process has put its message into the store.

    If a process dies without doing so, JAX ends this one after HEARTBEAT_SECONDS, with its own
    message.
    """
    while not stop.wait(POLL_SECONDS):
        try:
            message = global_state.client.key_value_try_get(_FAILED)
        except Exception:  # The key is not set yet.
            continue
        if not message.startswith(f'process {global_state.process_id}:'):
            print(f'error: ended with {message}', file=sys.stderr, flush=True)
            _leave()


def _leave(status: int = 1) -> NoReturn:
    """Exits at once.

    An orderly exit would wait for the other processes, which may be waiting for an array from this
    one.
    """
    if is_leader():
        time.sleep(4 * POLL_SECONDS)  # The others read the message from a store in this process.
    os._exit(status)

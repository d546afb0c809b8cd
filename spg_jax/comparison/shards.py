"""Shards of a comparison beside each other on one machine, which a small model leaves half idle."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

TELL_SECONDS = 30.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Shards:
    """Processes of shards, some of them at a time, each with its share of the cores."""

    def __init__(self, command: Sequence[str], number: int, folder: Path):
        """Starts nothing yet.

        Args:
          command: a program and its arguments; a shard gets --shard=INDEX/NUMBER behind them.
          number: of shards.
          folder: where each shard's output becomes a file.
        """
        self._command, self._number, self._folder = command, number, folder
        self._stopped = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, jobs: int, tell: Callable[[], None]) -> list[int]:
        """Runs the shards, `jobs` at a time.

        Ctrl-C and SIGTERM are passed on to the shards, which save, and no other shard starts.

        Args:
          jobs: how many run at a time.
          tell: is called every TELL_SECONDS.

        Returns:
          The indices of the shards that failed.

        Raises:
          KeyboardInterrupt: after an interruption, once all shards have ended.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._ended_by_signals(), threads_with_cores(jobs) as threads:
            statuses = [threads.submit(self._run, index) for index in range(self._number)]
            self._wait(statuses, tell)
        return [index for index, status in enumerate(statuses) if status.result()]

    def output(self, index: int) -> Path:
        """The file of what a shard prints."""
        return self._folder / f'{index}.txt'

    def _wait(self, statuses: Sequence[Future[int]], tell: Callable[[], None]) -> None:
        """Returns when all shards have ended."""
        waiting, told = set(statuses), time.monotonic()
        while waiting:
            _, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            if waiting and time.monotonic() - told >= TELL_SECONDS:
                tell()
                told = time.monotonic()

    def _run(self, index: int) -> int:
        """The exit status of a shard; 0 without starting it if the others were interrupted."""
        if self._stopped.is_set():
            return 0
        # On a GPU each process would otherwise take most of the memory for itself.
        environment = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} | os.environ
        command = [*self._command, f'--shard={index}/{self._number}']
        with self.output(index).open('wb') as out:
            # In a group of its own it gets Ctrl-C of a terminal once, from here.
            process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, process_group=0
            )
            self._running.add(process)
            if self._stopped.is_set():  # The signal came while the process was being started.
                process.terminate()
            try:
                return process.wait()
            finally:
                self._running.discard(process)

    @contextmanager
    def _ended_by_signals(self) -> Iterator[None]:
        """Passes signals that end a program on to the shards; the first is KeyboardInterrupt."""

        def end(number: int, frame: object) -> None:
            for process in tuple(self._running):
                process.send_signal(number)
            if not self._stopped.is_set():
                self._stopped.set()
                raise KeyboardInterrupt

        before = {number: signal.signal(number, end) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def threads_with_cores(jobs: int) -> ThreadPoolExecutor:
    """Threads that run so many jobs at a time, each with its share of the cores.

    The processes that a thread starts inherit its cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)

    def take_cores() -> None:
        if share := shares.get():
            os.sched_setaffinity(0, share)

    return ThreadPoolExecutor(jobs, initializer=take_cores)


def command_of(arguments: Sequence[str]) -> list[str]:
    """The command that runs one shard of a comparison with these arguments, without --shard."""
    # Of a flag that is given twice, the last value counts.
    return [sys.executable, '-m', 'spg_jax.compare', *arguments, '--jobs=1']

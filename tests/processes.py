"""Two processes on this machine that find each other as those of a job do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TIMEOUT = 240


def start_pair(*command: str) -> list[subprocess.Popen]:
    """Two processes of 4 devices each that run a module, which calls `distributed.start`."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = dict(
        os.environ,
        PYTHONPATH=str(REPOSITORY),
        XLA_FLAGS=os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=4'),
        JAX_DISABLE_MOST_OPTIMIZATIONS='1',
        JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}',
        JAX_NUM_PROCESSES='2',
    )
    return [
        subprocess.Popen(
            [sys.executable, '-m', *command],
            cwd=REPOSITORY,
            env=environment | {'JAX_PROCESS_ID': str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def finish(pair: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each."""
    ended = [process.communicate(timeout=TIMEOUT) for process in pair]
    return [(process.returncode, *said) for process, said in zip(pair, ended, strict=True)]

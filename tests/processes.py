"""Processes that tests start, in groups of their own, so that a test ends all of what it began.

Time limits are here and nowhere else in the tests. They are against processes that hang, not
against slow machines: an idle machine with two cores needs a tenth of them.
"""

import contextlib
import functools
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ['SPG_JAX_SHARED_BY_TESTS'])  # see tests/conftest.py
# The slowest process of the tests needs about a minute, compilation included.
HANG_SECONDS = 600
# Of a processor, for work whose time grows no faster than its input; it needs a tenth at most, and
# quadratic time on the 50,000 characters and more of the tests would need far more.
LINEAR_SECONDS = 5

TRAINING_PROBLEMS = 2048  # of each task, in place of up to 100,000

_running: list[subprocess.Popen] = []


def draw_few_problems(patch: pytest.MonkeyPatch) -> None:
    """Lets Countdown and Sudoku have fewer problems to train on, and the same ones to evaluate."""
    for task in ('countdown', 'sudoku'):
        sizes = importlib.import_module(f'spg_jax.tasks.{task}.problems').SIZES
        patch.setitem(sizes, 'train', TRAINING_PROBLEMS)


@functools.cache
def shared_problems() -> Path:
    """The folder of problems that whole runs share.

    There are few to train on, because making all and measuring their prompts takes longer than a
    run needs otherwise. tests/tasks/test_source.py makes problems as a run does.
    """
    from spg_jax import tasks  # Most tests need no problems, and TFDS takes a second to import.

    with pytest.MonkeyPatch.context() as patch:
        draw_few_problems(patch)
        for name in ('countdown', 'sudoku'):
            tasks.get(name).source('train', SHARED / 'data')
    return SHARED / 'data'


def start(
    command: list[str | Path], stderr: int = subprocess.PIPE, **options
) -> subprocess.Popen[str]:
    """A process whose output is kept; it leads a group of its own, which `finish` or else the end
    of the test ends."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        **options,
    )
    _running.append(process)
    return process


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    """The environment of a program that finds the repository, with more variables.

    It has one device, as a laptop has, because programs for several take longer to compile.
    """
    flags = os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')
    return os.environ | {'PYTHONPATH': str(REPOSITORY), 'XLA_FLAGS': flags} | variables


def start_module(*command: str, devices: int = 1, **variables: str) -> subprocess.Popen[str]:
    """A module of the repository as a program, with more environment variables."""
    return start(
        [sys.executable, '-m', *command], cwd=REPOSITORY, env=environment(devices, **variables)
    )


def tiny_run(workdir: Path, *arguments: str) -> list[str]:
    """The module and arguments of a whole run of Countdown, which shares its problems and its base
    policy with all others."""
    return [
        'spg_jax.train',
        '--config=countdown:tiny',
        f'--workdir={workdir}',
        f'--config.task.data_dir={shared_problems()}',
        f'--config.base.cache={SHARED}/runs/base',
        *arguments,
    ]


def share_with_runs_in(directory: Path) -> None:
    """Lets runs that name no folders, in a directory, share problems and base policies as well."""
    shared_problems()
    for name in ('data', 'runs/base'):
        (SHARED / name).mkdir(parents=True, exist_ok=True)
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).symlink_to(SHARED / name)


def start_pair(*command: str, devices: int = 4, **variables: str) -> list[subprocess.Popen[str]]:
    """Two processes of some devices each that find each other as those of a job do, and run a
    module that calls `distributed.start`, with more environment variables."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return [
        start_module(
            *command,
            devices=devices,
            JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}',
            JAX_NUM_PROCESSES='2',
            JAX_PROCESS_ID=str(number),
            **variables,
        )
        for number in range(2)
    ]


def finish(
    process: subprocess.Popen[str], input: str | None = None, seconds: float = HANG_SECONDS
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a process that is given its input.

    Raises:
      subprocess.TimeoutExpired: the process hangs; it is killed with its whole group.
    """
    try:
        out, error = process.communicate(input, timeout=seconds)
    except BaseException:
        end(process)
        raise
    _running.remove(process)
    return process.returncode, out, error


def finish_all(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """`finish` of every process; if one hangs, all are ended."""
    try:
        return [finish(process) for process in processes]
    except BaseException:
        end_all()
        raise


def run(
    command: list[str | Path], input: str | None = None, **options
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its output kept, but a command that hangs is ended with its whole
    group."""
    if input is not None:
        options['stdin'] = subprocess.PIPE
    code, out, error = finish(start(command, **options), input)
    return subprocess.CompletedProcess(command, code, out, error)


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Returns when the condition holds; processes that are to bring that about must not end
    before."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        for process in processes:
            ended = process.poll() is not None
            assert not ended or condition(), finish(process)
        assert time.monotonic() < deadline, 'waited for a condition that never held'
        time.sleep(0.005)


def end(process: subprocess.Popen[str]) -> None:
    """Kills a process and every other one of its group."""
    if process in _running:
        _running.remove(process)
    with contextlib.suppress(ProcessLookupError):  # all of the group have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


def end_all() -> None:
    """Kills whatever a test started and did not finish."""
    while _running:
        end(_running[-1])

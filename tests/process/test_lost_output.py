"""Whatever ends first, the reader, the terminal or the time, a run is saved and goes on from there.

Faults G00, G01, G08, G10 and G19 of `tests/reference/faults.jsonl`.
"""

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.processes import (
    HANG_SECONDS,
    REPOSITORY,
    environment,
    finish,
    start,
    tiny_run,
    wait_until,
)

pytestmark = pytest.mark.compiled_as_users_do

# A shell of a user who wants other numbers, forbids transfers, and was started by a notebook.
HOSTILE = {
    'JAX_DEFAULT_PRNG_IMPL': 'rbg',
    'JAX_THREEFRY_PARTITIONABLE': '0',
    'JAX_ENABLE_X64': '1',
    'JAX_DEFAULT_MATMUL_PRECISION': 'bfloat16',
    'JAX_TRANSFER_GUARD': 'disallow',
    'MPLBACKEND': 'module://not_installed.backend',
}


def command(workdir: Path) -> list[str]:
    """A run that is cut long before its end and its first checkpoint."""
    settings = ('train.steps', 'checkpoint.every', 'evaluation.every')
    words = tiny_run(workdir, *(f'--config.{name}=100000' for name in settings))
    # Without a warm-up its programs are those of a short run.
    return [sys.executable, '-m', *words, '--config.optimizer.warmup_fraction=0.0']


ENVIRONMENT = environment()


def begin(words: list[str], variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return start(words, cwd=REPOSITORY, env=ENVIRONMENT | (variables or {}))


def updates(workdir: Path) -> dict[int, dict]:
    """The rows of whole lines that are of updates, by step."""
    path = workdir / 'metrics.jsonl'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith('\n')]
    return {row['step']: row for row in rows if 'loss' in row}


def wait_for_updates(workdir: Path, more: int, *processes: subprocess.Popen) -> None:
    first = len(updates(workdir))
    wait_until(lambda: len(updates(workdir)) >= first + more, *processes)


def is_saved(workdir: Path) -> None:
    assert not (workdir / 'result.json').exists(), 'the signal came too late to test anything'
    steps = [int(path.name) for path in (workdir / 'checkpoints').glob('[0-9]*')]
    assert steps and max(steps) >= max(updates(workdir))


@pytest.fixture(scope='module')
def cut_with_its_reader(tmp_path_factory):
    """Updates of a run in a hostile environment, and what its reader got before Ctrl-C."""
    root = tmp_path_factory.mktemp('pipeline')
    words = shlex.join(command(root / 'run'))
    pipeline = begin(['bash', '-c', f'{words} 2>&1 | tee {root}/log'], HOSTILE)
    wait_for_updates(root / 'run', 4, pipeline)
    os.killpg(pipeline.pid, signal.SIGINT)
    finish(pipeline)
    is_saved(root / 'run')
    return updates(root / 'run'), (root / 'log').read_text()


def test_ctrl_c_on_a_pipeline_saves_though_the_reader_goes_first(cut_with_its_reader):
    _, log = cut_with_its_reader
    assert 'saved' not in log, 'the reader was still there'


def show_until(closed: threading.Event, terminal: int) -> None:
    """Reads what is printed, since a full terminal would hold the run up, and closes it at last."""
    while not closed.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 4096)
    os.close(terminal)


@pytest.fixture(scope='module')
def outlived_its_terminal(tmp_path_factory):
    """Updates of a run in a plain environment that is saved by a SIGTERM.

    The terminal is closed under a run that ignores SIGHUP, as `nohup` and `disown` arrange it.
    `nohup` itself would write to a file.
    """
    workdir = tmp_path_factory.mktemp('terminal')
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        ['bash', '-c', 'trap "" HUP; exec "$@"', '-', *command(workdir)],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    closed = threading.Event()
    screen = threading.Thread(target=show_until, args=(closed, terminal))
    screen.start()
    try:
        wait_for_updates(workdir, 2, process)
        closed.set()
        screen.join()
        process.send_signal(signal.SIGHUP)
        wait_for_updates(workdir, 4, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_SECONDS) == 0
    finally:
        closed.set()
        process.kill()
        process.wait()
    is_saved(workdir)
    return updates(workdir)


def test_a_run_outlives_its_terminal_and_saves_at_a_later_sigterm(outlived_its_terminal):
    assert len(outlived_its_terminal) >= 6


def test_the_environment_changes_no_number(cut_with_its_reader, outlived_its_terminal):
    (hostile, log), plain = cut_with_its_reader, outlived_its_terminal
    for name in list(HOSTILE)[:4]:
        assert f'{name}={HOSTILE[name]} is ignored' in log
    common = sorted(plain.keys() & hostile.keys())
    assert len(common) >= 3
    for step in common:
        for row in (plain[step], hostile[step]):
            row.pop('seconds')
        assert plain[step] == hostile[step]

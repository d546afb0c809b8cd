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

from tests.processes import REPOSITORY, finish, start, wait_until

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


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """Problems and base policy, made once for all runs of this file."""
    return tmp_path_factory.mktemp('shared')


def command(shared: Path, workdir: Path) -> list[str]:
    """A run that is cut long before its end and its first checkpoint."""
    return [
        *(sys.executable, '-m', 'spg_jax.train', '--config=countdown:tiny'),
        f'--workdir={workdir}',
        f'--config.task.data_dir={shared}/data',
        f'--config.base.cache={shared}/base',
        '--config.model.scan_unroll=1',
        *('--config.evaluation.samples=2', '--config.evaluation.batch=32'),
        *('--config.train.steps=100000', '--config.checkpoint.every=100000'),
        '--config.evaluation.every=100000',
    ]


# One device compiles faster than eight, and signals do not know devices.
ENVIRONMENT = os.environ | {'PYTHONPATH': str(REPOSITORY), 'XLA_FLAGS': ''}


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


def cut(shared: Path, workdir: Path, number: int, **variables: str) -> str:
    """Runs until some updates are done, sends a signal and returns standard error."""
    process = begin(command(shared, workdir), variables)
    wait_for_updates(workdir, 4, process)
    process.send_signal(number)
    code, out, error = finish(process)
    assert code == 0, error
    assert f'{signal.Signals(number).name}: saving' in out and 'saved; run the same' in out
    is_saved(workdir)
    return error


def test_hangup_and_usr1_save_and_the_environment_changes_no_number(shared, tmp_path):
    """One run begins in a plain environment, another in one that asks for other numbers."""
    cut(shared, tmp_path / 'plain', signal.SIGHUP)
    error = cut(shared, tmp_path / 'hostile', signal.SIGUSR1, **HOSTILE)
    for name in list(HOSTILE)[:4]:
        assert f'{name}={HOSTILE[name]} is ignored' in error
    plain, hostile = updates(tmp_path / 'plain'), updates(tmp_path / 'hostile')
    common = sorted(plain.keys() & hostile.keys())
    assert len(common) >= 3
    for step in common:
        for row in (plain[step], hostile[step]):
            row.pop('seconds')
        assert plain[step] == hostile[step]


def test_ctrl_c_on_a_pipeline_saves_though_the_reader_goes_first(shared, tmp_path):
    words = shlex.join(command(shared, tmp_path / 'run'))
    pipeline = begin(['bash', '-c', f'{words} 2>&1 | tee {tmp_path}/log'])
    wait_for_updates(tmp_path / 'run', 4, pipeline)
    os.killpg(pipeline.pid, signal.SIGINT)
    finish(pipeline)
    is_saved(tmp_path / 'run')
    assert 'saved' not in (tmp_path / 'log').read_text(), 'the reader was still there'


def show_until(closed: threading.Event, terminal: int) -> None:
    """Reads what is printed, since a full terminal would hold the run up, and closes it at last."""
    while not closed.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 4096)
    os.close(terminal)


def test_a_run_outlives_its_terminal_and_saves_at_a_later_sigterm(shared, tmp_path):
    """The terminal is closed under a run that ignores SIGHUP, as `nohup` and `disown` arrange it.
    `nohup` itself would write to a file."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        ['bash', '-c', 'trap "" HUP; exec "$@"', '-', *command(shared, tmp_path)],
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
        wait_for_updates(tmp_path, 2, process)
        closed.set()
        screen.join()
        process.send_signal(signal.SIGHUP)
        wait_for_updates(tmp_path, 4, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0
    finally:
        closed.set()
        process.kill()
        process.wait()
    is_saved(tmp_path)

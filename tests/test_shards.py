"""Shards beside each other: how many at a time, what fails, and what an interruption does."""

import os
import signal
import sys
import threading
import time

import pytest

from spg_jax.comparison.shards import Shards
from tests import processes

pytestmark = pytest.mark.fast

# Notes when it ran; the last of three fails.
NOTING = """
import sys, time
from pathlib import Path
folder, shard = Path(sys.argv[1]), sys.argv[2].removeprefix('--shard=')
began = time.monotonic()
time.sleep(0.1)
(folder / shard.replace('/', '-')).write_text(f'{began} {time.monotonic()}')
print('shard', shard)
sys.exit(shard == '2/3')
"""
# Says that it runs, and saves when it is told to end.
SAVING = """
import signal, sys, time
def save(number, frame):
    print('saved after', signal.Signals(number).name, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print('runs', flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize('jobs', [1, 3])
def test_all_shards_run_and_those_that_fail_are_named(tmp_path, jobs):
    shards = Shards([sys.executable, '-c', NOTING, str(tmp_path)], 3, tmp_path / 'shards')
    assert shards.run(jobs, tell=lambda: None) == [2]
    assert [shards.output(index).read_text() for index in range(3)] == [
        f'shard {index}/3\n' for index in range(3)
    ]
    times = [map(float, (tmp_path / f'{index}-3').read_text().split()) for index in range(3)]
    (_, ended), (began, _), _ = sorted(tuple(pair) for pair in times)
    if jobs == 1:
        assert began >= ended


def test_an_interruption_reaches_what_runs_and_starts_nothing_more(tmp_path):
    shards = Shards([sys.executable, '-c', SAVING], 5, tmp_path)

    def interrupt():
        deadline = time.monotonic() + processes.HANG_SECONDS
        while not all(_text(shards.output(index)) for index in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        shards.run(2, tell=lambda: None)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert sorted(path.name for path in tmp_path.iterdir()) == ['0.txt', '1.txt']
    for index in (0, 1):
        assert _text(shards.output(index)) == 'runs\nsaved after SIGTERM\n'


def _text(path):
    return path.read_text() if path.is_file() else ''

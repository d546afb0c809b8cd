"""How long a start of the main job takes to its first update, when all it can keep is kept."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed.programs import Row

# The base policy is trained for a moment only: the time of a start does not depend on it.
SETTINGS = ('--config=configs/countdown.py', '--config.base.stages=((4,1.0),)')
POLL_SECONDS = 0.02


def measure_start(root: Path, folder: Path) -> list[Row]:
    """A first start, with base policy and programs to make, and a second one.

    Args:
      root: the checkout, whose problems are used if they are there.
      folder: an empty folder for everything that the starts leave.
    """
    data = root / 'data' if (root / 'data' / 'countdown').is_dir() else folder / 'data'
    rows = []
    for number, name in enumerate(('first', 'second')):
        seconds, cpu = _first_update(root, folder, data, number)
        what = f'{name} start to the first update'
        rows.append({'preset': 'start', 'what': what, 'seconds': seconds, 'cpu_seconds': cpu})
    return rows


def _first_update(root: Path, folder: Path, data: Path, number: int) -> tuple[float, float]:
    """Wall and processor seconds from the command to the row of the first update in its metrics.

    Raises:
      RuntimeError: the run ended before; the message has the last line of what it said.
    """
    workdir = folder / f'run{number}'
    log = folder / f'run{number}.log'
    command = [sys.executable, '-m', 'spg_jax.train', *SETTINGS, f'--workdir={workdir}']
    command += [f'--config.task.data_dir={data}', f'--config.base.cache={folder}/base']
    environment = os.environ | {
        'PYTHONPATH': str(root),
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    }
    started = time.perf_counter()
    with log.open('w') as out:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while not _has_updated(workdir / 'metrics.jsonl'):
                if process.poll() is not None:
                    last = (log.read_text().splitlines() or [''])[-1]
                    raise RuntimeError(f'the start ended with {process.returncode}: {last}')
                time.sleep(POLL_SECONDS)
            seconds = time.perf_counter() - started
            cpu = _cpu_seconds(process.pid)
        finally:
            process.kill()
            process.wait()
    return seconds, cpu


def _has_updated(metrics: Path) -> bool:
    if not metrics.is_file():
        return False
    lines = metrics.read_text().splitlines()
    return any('loss' in json.loads(line) for line in lines if line.endswith('}'))


def _cpu_seconds(process: int) -> float:
    """Processor seconds of a process that runs; NaN where the system does not tell."""
    try:
        fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return float('nan')
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

"""What happens to a run that is killed, cut off or damaged, tried on real processes; as a table.

    python -m benchmarks.faults

The run is the tiny Countdown. Every trial damages a copy of it or a run of its own, goes on by the
same command, and compares metrics and parameters with a run that was left alone. A trial is good if
the run ends equal, bit for bit, or says in one line what is wrong and loses nothing.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.table import Table

from spg_jax.process import cli

FLAGS = flags.FLAGS
CLOCK = ('seconds', 'base_seconds')
LIMIT = 600  # seconds after which a process hangs
Outcome = str  # 'equal', 'one line', or what went wrong


class Bench:
    """Runs of one configuration in one folder, with a shared base policy and shared problems."""

    def __init__(self, root: Path, seed: int):
        self.root, self.rng = root, np.random.default_rng(seed)
        self.whole = root / 'whole'
        if not (self.whole / 'result.json').is_file():
            self.finish(self.start(self.whole))
        self.rows, self.parameters = rows_of(self.whole), newest_parameters(self.whole)

    def command(self, workdir: Path) -> list[str]:
        return [
            *(sys.executable, '-m', 'spg_jax.train', '--config=configs/countdown.py:tiny'),
            *(f'--workdir={workdir}', f'--config.task.data_dir={self.root}/data'),
            *(f'--config.base.cache={self.root}/base', '--config.checkpoint.every=2'),
            *('--config.evaluation.samples=1', '--config.checkpoint.keep=3'),
        ]

    def start(self, workdir: Path, shell: str = '') -> subprocess.Popen[str]:
        """Starts a run, alone or inside a shell command in which RUN stands for it."""
        words = self.command(workdir)
        if shell:
            words = ['bash', '-c', shell.replace('RUN', shlex.join(words))]
        return subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit status and standard error."""
        try:
            _, error = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return -1, 'it hangs'
        return process.returncode, error

    def goes_on(self, workdir: Path) -> Outcome:
        """The outcome of the same command after a trial."""
        code, error = self.finish(self.start(workdir))
        if code:
            lines = [line for line in error.splitlines() if line.startswith('error:')]
            return 'one line' if len(lines) == 1 and 'Traceback' not in error else error[-300:]
        if rows_of(workdir) != self.rows:
            return 'other metrics'
        parameters = newest_parameters(workdir)
        same = all(np.array_equal(parameters[name], x) for name, x in self.parameters.items())
        return 'equal' if same else 'other parameters'

    def killed(self, how: signal.Signals, shell: str = '') -> Outcome:
        """Sends a signal to a run at a random moment; one that asks to save has to be obeyed."""
        workdir = self.root / f'run{self.rng.integers(10**9)}'
        process = self.start(workdir, shell)
        metrics = workdir / 'metrics.jsonl'
        wanted = int(self.rng.integers(1, len(self.rows)))
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.is_file() and metrics.read_text().count('\n') >= wanted:
                break
            time.sleep(0.01)
        time.sleep(float(self.rng.random()) * 0.2)
        os.killpg(process.pid, how)
        self.finish(process)
        if how != signal.SIGKILL and not any((workdir / 'checkpoints').iterdir()):
            return 'nothing saved'
        return self.goes_on(workdir)

    def damaged(self, damage: Callable[[Path], None]) -> Outcome:
        """Cuts a finished run back to its checkpoints, damages the newest, and goes on."""
        workdir = self.root / f'run{self.rng.integers(10**9)}'
        shutil.copytree(self.whole, workdir)
        (workdir / 'result.json').unlink()
        checkpoints = sorted((workdir / 'checkpoints').iterdir(), key=lambda path: int(path.name))
        damage(checkpoints[-1])
        return self.goes_on(workdir)

    def flip(self, checkpoint: Path) -> None:
        """Flips one bit of a file that holds arrays."""
        files = [path for path in checkpoint.rglob('d/*') if path.is_file()]
        file = files[self.rng.integers(len(files))]
        content = bytearray(file.read_bytes())
        content[self.rng.integers(len(content))] ^= 1 << self.rng.integers(8)
        file.write_bytes(content)


def rows_of(workdir: Path) -> list[dict]:
    rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def newest_parameters(workdir: Path) -> dict[str, np.ndarray]:
    steps = [int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()]
    saved = ocp.load((workdir / 'checkpoints' / str(max(steps))).absolute())
    leaves = jax.tree_util.tree_leaves_with_path(saved)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def emptied(checkpoint: Path) -> None:
    for file in checkpoint.rglob('*'):
        if file.is_file():
            file.write_bytes(b'')


def main(_: list[str]) -> None:
    root = Path(FLAGS.workdir)
    root.mkdir(parents=True, exist_ok=True)
    bench = Bench(root, FLAGS.seed)
    trials: list[tuple[str, int, Callable[[], Outcome]]] = [
        ('SIGKILL at a random moment', 4, lambda: bench.killed(signal.SIGKILL)),
        ('SIGTERM', 1, lambda: bench.killed(signal.SIGTERM)),
        ('SIGHUP, as of a closed terminal', 1, lambda: bench.killed(signal.SIGHUP)),
        ('SIGUSR1, as of Slurm', 1, lambda: bench.killed(signal.SIGUSR1)),
        (
            'Ctrl-C in a pipeline whose reader goes first',
            1,
            lambda: bench.killed(signal.SIGINT, 'RUN 2>&1 | cat > /dev/null'),
        ),
        (
            'a reader that ends early',
            1,
            lambda: bench.killed(signal.SIGTERM, 'RUN 2>&1 | head -n 1 > /dev/null'),
        ),
        ('one bit of the newest checkpoint flipped', 4, lambda: bench.damaged(bench.flip)),
        ('the newest checkpoint emptied', 1, lambda: bench.damaged(emptied)),
        ('the newest checkpoint gone', 1, lambda: bench.damaged(shutil.rmtree)),
    ]
    table, bad = Table('trial', 'times', 'outcome'), 0
    for name, times, trial in trials:
        outcomes = [trial() for _ in range(times)]
        bad += sum(outcome not in ('equal', 'one line') for outcome in outcomes)
        counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
        table.add_row(name, str(times), ', '.join(f'{n} {what}' for what, n in counts.items()))
        print(f'{name}: {counts}', file=sys.stderr, flush=True)
    Console(width=100).print(table)
    if bad:
        raise ValueError(f'{bad} trials lost something or ended with another error than one line')


if __name__ == '__main__':
    cli.define_path_flag('workdir', 'runs/faults', 'Where the runs live.', saves=True)
    flags.DEFINE_integer('seed', 0, 'Of the random moments and bits.')
    cli.run(main)

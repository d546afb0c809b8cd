"""Kills and damages runs, and prints a table of what became of them.

    python -m benchmarks.faults

A run of the tiny Countdown is left alone. Others are killed at a random moment and go on by the
same command. They must end as the first one did, with equal metrics, completions, result and
arrays, bit for bit, and a signal that asks to save must cost no update. Copies of the checkpoints
and of the best policy of the first run are damaged. A flipped bit must be refused in one line, or
change nothing. A run whose newest checkpoint is damaged must fall back to the one before, and set
the damaged one aside. Flips and most damages are read in this process. The exit status is 1 if a
trial did not hold.
"""

import contextlib
import functools
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import runs
from benchmarks.damage import DAMAGE, OLDER_ARRAYS, flip_bit
from benchmarks.kills import KILLS, Outcome, Processes, bits_of, newest_checkpoint
from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.pretrain import base_directory
from spg_jax.process import cli
from spg_jax.rl.rollout import empty_rollout
from spg_jax.runs import policies
from spg_jax.runs.arrays import abstract
from spg_jax.runs.checkpoints import DAMAGED, Record, RunCheckpoints
from spg_jax.runs.directory import run_config
from spg_jax.runs.preparation import prepare

FLAGS = flags.FLAGS
FLIPS = 20  # of the checkpoint, and as many of the policy
# These damages are tried on whole processes as well.
ON_PROCESSES = ('the largest file is noise', 'the metadata is gone', OLDER_ARRAYS)
Trial = Callable[[], Outcome]


class Copies:
    """Copies of what a finished run left on disk, which are damaged and read in this process."""

    def __init__(self, workdir: Path, root: Path):
        """Prepares what a run that goes on has in memory.

        Args:
          workdir: the finished run, with two checkpoints at least.
          root: where the copies are made.
        """
        config = run_config(workdir)
        parts, self._mesh = assemble(config), sharding.make_mesh(config.mesh)
        self._root, self.newest = root, newest_checkpoint(workdir)
        self.best = workdir / 'best'
        with jax.set_mesh(self._mesh):
            base, steps = base_directory(config), config.train.steps
            state, _, _ = prepare(config, parts, base, self._mesh, steps)

        def target(record: Record) -> Any:
            sizes = parts.batching.rows, record['prompt_length'], parts.sampling.length
            return abstract((state.replace(frozen={}), empty_rollout(*sizes, self._mesh)))

        self._target = target

    def checkpoint(self, path: Path) -> Any:
        """The arrays of a checkpoint."""
        return RunCheckpoints(path.parent, keep=3).load(int(path.name), self._target)[0]

    def policy(self, path: Path) -> Any:
        """The parameters of a policy."""
        return policies.load_policy(path, self._mesh)[2]

    def flipped(
        self, read: Callable[[Path], Any], source: Path, rng: np.random.Generator
    ) -> Outcome:
        """Flips a bit in a file of arrays of a copy of `source`, and reads the copy."""
        copy = Path(tempfile.mkdtemp(dir=self._root)) / source.name
        shutil.copytree(source, copy)
        files = sorted(file for file in copy.rglob('d/*') if file.is_file())
        flip_bit(files[rng.integers(len(files))], rng)
        with _standard_error() as printed:
            try:
                arrays, refusal = read(copy), ''
            except ValueError as error:
                arrays, refusal = None, str(error)
        if 'Traceback' in printed.getvalue():
            return Outcome(False, 'tracebacks on the screen')
        if refusal:
            in_one_line = '\n' not in refusal and str(copy) in refusal
            return Outcome(in_one_line, 'refused' if in_one_line else f'refused by {refusal}')
        equal = bits_of(arrays) == bits_of(read(source))
        return Outcome(equal, 'changed nothing' if equal else 'other numbers were believed')

    def fell_back(self, damage: Callable[[Path], Any]) -> Outcome:
        """Damages the newest checkpoint of a copy of all, and looks for the newest whole one."""
        copy = Path(tempfile.mkdtemp(dir=self._root)) / 'checkpoints'
        shutil.copytree(self.newest.parent, copy)
        newest = copy / self.newest.name
        before = sorted(int(path.name) for path in copy.iterdir())[-2]
        damage(newest)
        files = _files_of(newest)
        with contextlib.redirect_stdout(io.StringIO()) as output, _standard_error() as printed:
            step, arrays, _ = RunCheckpoints(copy, keep=3).load_newest(self._target)
        lines = output.getvalue().splitlines()
        if len(lines) != 1 or str(newest) not in lines[0] or 'Traceback' in printed.getvalue():
            return Outcome(False, 'not said in one line')
        if _files_of(newest.with_name(newest.name + DAMAGED)) != files:
            return Outcome(False, 'the damaged checkpoint was not kept as it was')
        expected = self.checkpoint(self.newest.with_name(str(before)))
        equal = step == before and bits_of(arrays) == bits_of(expected)
        return Outcome(equal, 'fell back' if equal else f'other numbers of step {step}')


@contextlib.contextmanager
def _standard_error() -> Iterator[io.StringIO]:
    """Gets, at its end, what this process wrote to standard error, libraries in C++ included."""
    text, kept = io.StringIO(), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text.write(file.read().decode(errors='replace'))


def _files_of(directory: Path) -> dict[str, bytes]:
    files = [file for file in sorted(directory.rglob('*')) if file.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def trials_of_processes(processes: Processes, seed: int) -> list[tuple[str, Trial]]:
    """Name and function of every trial that runs processes."""
    trials: list[tuple[str, Trial]] = []
    for name, kill in KILLS.items():
        for _ in range(kill.times):
            folder, rng = f'kill{len(trials)}', np.random.default_rng((seed, len(trials)))
            trials.append((name, functools.partial(processes.killed, kill, folder, rng)))
    for name in ON_PROCESSES:
        damaged = functools.partial(processes.damaged, DAMAGE[name], f'damage{len(trials)}')
        trials.append((f'newest checkpoint, a process: {name}', damaged))
    return trials


def trials_of_copies(copies: Copies, seed: int) -> list[tuple[str, Trial]]:
    """Name and function of every trial in this process."""
    rng = np.random.default_rng(seed)
    trials: list[tuple[str, Trial]] = []
    for name, read, source in (
        ('one bit of the newest checkpoint', copies.checkpoint, copies.newest),
        ('one bit of the best policy', copies.policy, copies.best),
    ):
        trials += [(name, functools.partial(copies.flipped, read, source, rng))] * FLIPS
    for name, damage in DAMAGE.items():
        trial = functools.partial(copies.fell_back, damage)
        trials.append((f'newest checkpoint: {name}', trial))
    return trials


def timed(name: str, trial: Trial) -> tuple[str, Outcome, float]:
    """Name, outcome and seconds of a trial; a trial that raises did not hold."""
    started = time.monotonic()
    try:
        outcome = trial()
    except Exception as error:  # The table says of the other trials what became of them.
        outcome = Outcome(False, f'{type(error).__name__}: {error}')
    print(f'{name}: {outcome.what}', file=sys.stderr, flush=True)
    return name, outcome, time.monotonic() - started


def table(results: list[tuple[str, Outcome, float]]) -> str:
    """The Markdown table of all trials, those of one name in a row."""
    rows: dict[str, list[tuple[Outcome, float]]] = defaultdict(list)
    for name, outcome, seconds in results:
        rows[name].append((outcome, seconds))
    rows['all'] = [pair for pairs in rows.values() for pair in pairs]
    lines = ['| trial | times | held | outcome | minutes |', '|---|---|---|---|---|']
    for name, pairs in rows.items():
        outcomes = [outcome.what for outcome, _ in pairs]
        counts = ', '.join(f'{outcomes.count(what)} {what}' for what in dict.fromkeys(outcomes))
        held = sum(outcome.held for outcome, _ in pairs)
        minutes = sum(seconds for _, seconds in pairs) / 60
        cells = [name, len(pairs), held, ' '.join(counts.replace('|', '/').split()), minutes]
        lines.append('| {} | {} | {} | {} | {:.1f} |'.format(*cells))
    return '\n'.join(lines)


def main(_: list[str]) -> None:
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        # Under nohup the runs would inherit that SIGHUP is ignored, but not a handler.
        signal.signal(signal.SIGHUP, lambda *_: None)
    jax.config.update('jax_platforms', 'cpu')
    # Orbax says this of arrays that are read as they are, which is what a comparison wants.
    warnings.filterwarnings('ignore', 'Sharding info not provided')
    started = time.monotonic()
    workdir = Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(dir=workdir))
    processes = Processes(root, FLAGS.jobs)
    trials = trials_of_processes(processes, FLAGS.seed)
    results = runs.at_once(FLAGS.jobs, [functools.partial(timed, *trial) for trial in trials])
    trials = trials_of_copies(Copies(processes.whole, root), FLAGS.seed)
    results += [timed(*trial) for trial in trials]
    print(table(results))
    minutes = (time.monotonic() - started) / 60
    print(f'\n{minutes:.1f} minutes by the clock, {FLAGS.jobs} processes at a time')
    failures = sum(not outcome.held for _, outcome, _ in results)
    if failures:
        raise ValueError(f'{failures} of {len(results)} trials did not hold; see {root}')
    shutil.rmtree(root)


if __name__ == '__main__':
    cli.define_path_flag('workdir', 'runs/faults', 'The folder of the runs.', saves=True)
    flags.DEFINE_integer('seed', 0, 'Of the random moments and bits.')
    flags.DEFINE_integer('jobs', 2, 'Processes that run at the same time.', lower_bound=1)
    cli.run(main)

"""Runs of the entry points as processes, and means with intervals over seeds."""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy import stats

Result = TypeVar('Result')
Accuracies = dict[float, float]  # on validation, of each learning rate


def train(config: str, workdir: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The result of a training run; goes on with one that was cut, reads one that is finished.

    Raises:
      RuntimeError: the run failed or was interrupted; its own last words are on stderr.
    """
    run('spg_jax.train', f'--config={config}', f'--workdir={workdir}', *_flags(overrides))
    path = workdir / 'result.json'
    if not path.is_file():
        raise RuntimeError(f'{workdir} was interrupted; run the same command to go on')
    return json.loads(path.read_text())


def pretrain(config: str, workdir: Path, overrides: dict[str, Any], *more: str) -> None:
    """A pre-training or fine-tuning run into `workdir`, unless it is finished."""
    run('spg_jax.pretrain', f'--config={config}', f'--workdir={workdir}', *more, *_flags(overrides))


def evaluate(workdir: Path, *more: str) -> dict[str, Any]:
    """What `spg_jax.evaluate` reports about a run or a policy."""
    out = run('spg_jax.evaluate', f'--workdir={workdir}', *more)
    return json.loads(out.splitlines()[-1])


def at_once(jobs: int, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Results of `calls`, `jobs` of them running at a time, each with its own share of the cores.

    Small models leave half of two cores idle; a core each gets more done, at the same pace for all.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)
    # The affinity of a thread is that of the processes it starts.
    with ThreadPoolExecutor(
        jobs, initializer=lambda: os.sched_setaffinity(0, shares.get())
    ) as threads:
        return list(threads.map(lambda call: call(), calls))


def run(module: str, *arguments: str) -> str:
    """Standard output of `python -m module`; its progress goes to our stderr."""
    command = [sys.executable, '-m', module, *arguments]
    print('+', ' '.join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f'{module} ended with status {done.returncode}: {" ".join(command)}')
    return done.stdout


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of the 95 % interval of the mean (Student's t), as percentages."""
    values = 100 * np.asarray(values)
    if len(values) < 2:
        return f'{values.mean():.1f}'
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f'{values.mean():.1f} ± {half:.1f}'


def best(accuracies: Accuracies) -> float:
    """The learning rate most accurate on validation."""
    return max(accuracies, key=accuracies.get)


def tuning_table(found: dict[str, Accuracies], seed: int) -> str:
    """What each method reached on validation with each learning rate, in per cent."""
    rates = list(next(iter(found.values())))
    lines = [
        f'| on validation, seed {seed} | {" | ".join(f"{rate:g}" for rate in rates)} |',
        '|---' * (len(rates) + 1) + '|',
    ]
    for name, accuracies in found.items():
        cells = ' | '.join(f'{100 * accuracies[rate]:.1f}' for rate in rates)
        lines.append(f'| {name.replace("_", " ")} | {cells} |')
    return '\n'.join(lines)


def _flags(overrides: dict[str, Any]) -> list[str]:
    return [f'--config.{name}={value}' for name, value in overrides.items()]

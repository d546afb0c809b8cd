"""Runs entry points as processes, and computes means with intervals over seeds."""

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

from spg_jax.tasks.card import check_alike as check_cards
from spg_jax.tasks.card import from_json

Result = TypeVar('Result')
Accuracies = dict[float, float]  # learning rate -> accuracy on validation


def train(config: str, workdir: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The result of a training run; an interrupted run goes on, a finished one is only read.

    Raises:
      RuntimeError: if the run failed or was interrupted; its message is on standard error.
    """
    run('spg_jax.train', f'--config={config}', f'--workdir={workdir}', *_flags(overrides))
    path = workdir / 'result.json'
    if not path.is_file():
        raise RuntimeError(f'{workdir} was interrupted; run the same command to go on')
    return json.loads(path.read_text())


def pretrain(config: str, workdir: Path, overrides: dict[str, Any], *arguments: str) -> None:
    """Pre-trains or fine-tunes a policy into `workdir`, unless it exists."""
    run(
        'spg_jax.pretrain',
        f'--config={config}',
        f'--workdir={workdir}',
        *arguments,
        *_flags(overrides),
    )


def evaluate(workdir: Path, *arguments: str) -> dict[str, Any]:
    """The report of `spg_jax.evaluate` about a run or a policy."""
    out = run('spg_jax.evaluate', f'--workdir={workdir}', *arguments)
    return json.loads(out.splitlines()[-1])


def check_alike(figures: dict[str, dict[str, Any]]) -> None:
    """Refuses figures of unlike protocols, which a table would show in one column.

    Args:
      figures: results of `train` or `evaluate` by name.

    Raises:
      ValueError: their cards are unlike; the message is one line that names the fields.
    """
    cards = {
        # Results that were written before there were cards have none.
        name: from_json(result['card'], name) if 'card' in result else None
        for name, result in figures.items()
    }
    check_cards(cards, 'run all of them again in a new --workdir')


def at_once(jobs: int, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of `calls`, of which `jobs` run at a time, each on its share of the cores.

    A small model leaves half of two cores idle, so two runs with a core each get more done. Each
    run then has the same pace.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)
    # A process inherits the affinity of the thread that starts it.
    with ThreadPoolExecutor(
        jobs, initializer=lambda: os.sched_setaffinity(0, shares.get())
    ) as threads:
        return list(threads.map(lambda call: call(), calls))


def run(module: str, *arguments: str) -> str:
    """The standard output of `python -m module`; its progress goes to standard error."""
    command = [sys.executable, '-m', module, *arguments]
    print('+', ' '.join(command[1:]), file=sys.stderr, flush=True)
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise RuntimeError(f'{module} ended with status {process.returncode}: {" ".join(command)}')
    return process.stdout


def interval(values: Sequence[float]) -> str:
    """The mean and the half-width of its 95 % interval (Student's t), in per cent."""
    values = 100 * np.asarray(values)
    if len(values) < 2:
        return f'{values.mean():.1f}'
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f'{values.mean():.1f} ± {half:.1f}'


def best(accuracies: Accuracies) -> float:
    """The learning rate with the highest accuracy on validation."""
    return max(accuracies, key=accuracies.get)


def tuning_table(accuracies_of: dict[str, Accuracies], seed: int) -> str:
    """A table of the accuracy on validation for each method and learning rate, in per cent."""
    rates = list(next(iter(accuracies_of.values())))
    lines = [
        f'| on validation, seed {seed} | {" | ".join(f"{rate:g}" for rate in rates)} |',
        '|---' * (len(rates) + 1) + '|',
    ]
    for name, accuracies in accuracies_of.items():
        cells = ' | '.join(f'{100 * accuracies[rate]:.1f}' for rate in rates)
        lines.append(f'| {name.replace("_", " ")} | {cells} |')
    return '\n'.join(lines)


def _flags(overrides: dict[str, Any]) -> list[str]:
    return [f'--config.{name}={value}' for name, value in overrides.items()]

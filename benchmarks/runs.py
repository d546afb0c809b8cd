"""Runs entry points as processes, some of them at a time."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spg_jax.comparison.shards import threads_with_cores
from spg_jax.runs import policies

Result = TypeVar('Result')


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


def make_policy(module: str, config: str, directory: Path, overrides: dict[str, Any]) -> None:
    """Makes a policy by an entry point; an interrupted one goes on, and one that is there stays.

    Raises:
      RuntimeError: it failed or was interrupted; its message is on standard error.
    """
    run(f'spg_jax.{module}', f'--config={config}', f'--workdir={directory}', *_flags(overrides))
    if not policies.is_policy(directory):
        raise RuntimeError(f'{directory} was interrupted; run the same command to go on')


def at_once(jobs: int, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of `calls`, of which `jobs` run at a time, each on its share of the cores.

    A small model leaves half of two cores idle, so two runs with a core each get more done. Each
    run then has the same pace.
    """
    with threads_with_cores(jobs) as threads:
        return list(threads.map(lambda call: call(), calls))


def run(module: str, *arguments: str) -> str:
    """The standard output of `python -m module`; its progress goes to standard error."""
    command = [sys.executable, '-m', module, *arguments]
    print('+', ' '.join(command[1:]), file=sys.stderr, flush=True)
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise RuntimeError(f'{module} ended with status {process.returncode}: {" ".join(command)}')
    return process.stdout


def _flags(overrides: dict[str, Any]) -> list[str]:
    return [f'--config.{name}={value}' for name, value in overrides.items()]

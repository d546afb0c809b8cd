"""Trains every objective, kills it and goes on: with all parameters, and with adapters.

    python -m benchmarks.every_method [--methods=d1,dtm] [--jobs=2]

Each objective trains on the tiny Countdown model, and on adapters of the tiny LLaDA, as a process.
A second run is killed by SIGKILL at a random moment and started again; it must end as the first
one did, bit for bit. The command prints one table.
"""

import functools
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks import runs
from benchmarks.kills import CLOCKS, KILLS, Processes, rows_of
from spg_jax.rl.objectives import REGISTRY
from tests import adapted

FLAGS = flags.FLAGS
UPDATES = 12
# Small sizes of what a method has beside updates on the last rollout, and samplers that it needs.
SETTINGS = {
    'autoedit': ('sampling.sampler=autoedit',),
    'd2': ('d2.segments=4',),
    'dtm': ('dtm.phase=4', 'dtm.every=2'),
    'just_grpo': ('sampling.commit=left_to_right',),
    'tracerl': ('tracerl.lowest=0.0',),  # The tiny policy gets nothing right.
}
COUNTDOWN = ('--config=countdown:tiny', '--config.base.stages=((40,1.0),)')
COMMON = (f'--config.train.steps={UPDATES}', '--config.checkpoint.every=2')


def trial(root: Path, method: str, way: str, seed: int) -> tuple[str, str, str]:
    """Trains a method twice, once with a kill; returns cells of the table."""
    folder = root / f'{method}-{way.replace(" ", "-")}'
    folder.mkdir()
    settings = [f'--config.rl.objective={method}', *COMMON]
    settings += [f'--config.{each}' for each in SETTINGS.get(method, ())]
    module, clocks = 'spg_jax.train', CLOCKS
    if way == 'adapters':
        # Its validation says what time it is, so that the newest policy counts as the best.
        module, clocks = 'tests.adapted', (*CLOCKS, 'validation_accuracy')
        settings = ['--config=tests/adapted.py', *settings] + [
            f'--config.{name}={value}' for name, value in adapted.prepare(folder).items()
        ]
    else:
        settings = [*COUNTDOWN, *settings]
    started = time.monotonic()
    try:
        processes = Processes(folder, 1, module, settings, root, clocks)
        outcome = processes.killed(KILLS['SIGKILL'], 'killed', np.random.default_rng(seed))
    except ValueError as error:
        print(f'{method}, {way}: {error}', flush=True)
        return 'FAILED', str(error), ''
    rows = [row for row in rows_of(processes.whole) if row.get('gradient_norm')]
    norm = f'{np.mean([row["gradient_norm"] for row in rows]):.3g}'
    seconds = f'{time.monotonic() - started:.0f}'
    verdict = 'equal' if outcome.held else f'FAILED: {outcome.what}'
    print(f'{method}, {way}: {verdict}, mean gradient norm {norm}, {seconds} s', flush=True)
    return verdict, norm, seconds


def main(_: list[str]) -> None:
    methods = FLAGS.methods or list(REGISTRY)
    cells = [(method, way) for method in methods for way in ('all parameters', 'adapters')]
    with tempfile.TemporaryDirectory() as root:
        results = runs.at_once(
            FLAGS.jobs,
            [
                functools.partial(trial, Path(root), method, way, seed)
                for seed, (method, way) in enumerate(cells)
            ],
        )
    table = Table('objective', 'trains', 'killed and resumed', 'mean gradient norm', 'seconds')
    for (method, way), result in zip(cells, results, strict=True):
        table.add_row(method, way, *result)
    Console().print(table)
    if any('FAILED' in result[0] for result in results):
        raise SystemExit(1)


if __name__ == '__main__':
    flags.DEFINE_list('methods', [], 'Objectives to try; by default all.')
    flags.DEFINE_integer('jobs', 2, 'Processes that run at the same time.', lower_bound=1)
    app.run(main)

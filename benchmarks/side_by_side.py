"""Compares the negative estimates and corruptions of SPG on Sudoku.

    python -m benchmarks.side_by_side

The base policy, the number of updates and the tuning are the same for all variants. The learning
rate of a variant is the best of three on validation, with a seed that is used for nothing else.
Then three seeds are run; their policies are chosen on validation and reported on the test split.
Run the same command again to go on after an interruption. At its end it prints the table that
docs/results.md shows.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import runs
from spg_jax.process import cli
from spg_jax.process.files import write_whole

Figures = dict[str, Any]

CONFIG = 'configs/sudoku.py'
RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
# Half the batch of the preset, so that all runs fit into an hour and a half.
BATCH = {'rl.prompts': 8, 'rl.microbatch': 64}
VARIANTS = {
    'none (better completions only)': {'spg.negative': 'none'},
    'ELBO': {'spg.negative': 'elbo'},
    'EUBO': {'spg.negative': 'eubo'},
    'mixture': {'spg.negative': 'mixture'},
    'mixture, uniform corruption': {'spg.negative': 'mixture', 'corruption.kind': 'uniform'},
    "mixture, estimator='block'": {'spg.negative': 'mixture', 'spg.estimator': 'block'},
}
FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    root = Path(FLAGS.workdir)
    runs.run('spg_jax.pretrain', f'--config={CONFIG}')  # the base policy of all runs
    common = BATCH | {'train.steps': FLAGS.updates, 'evaluation.samples': 1}

    def runs_of(cases: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], Figures]:
        def train(name: str, rate: float, seed: int) -> Figures:
            folder = root / ''.join(letter if letter.isalnum() else '_' for letter in name)
            settings = {'optimizer.learning_rate': rate, 'train.seed': seed}
            overrides = common | VARIANTS[name] | settings
            return runs.train(CONFIG, folder / f'{rate}-{seed}', overrides)

        results = runs.at_once(FLAGS.jobs, [partial(train, *case) for case in cases])
        return dict(zip(cases, results, strict=True))

    tuning = runs_of([(name, rate, TUNING_SEED) for name in VARIANTS for rate in RATES])
    accuracies = {
        name: {rate: tuning[name, rate, TUNING_SEED]['validation_accuracy'] for rate in RATES}
        for name in VARIANTS
    }
    rates = {name: runs.best(accuracies[name]) for name in VARIANTS}
    results_of = runs_of([(name, rates[name], seed) for name in VARIANTS for seed in SEEDS])
    runs.check_alike({str(case): result for case, result in results_of.items()})
    base = next(iter(results_of.values()))
    lines = [
        '| negative estimate | learning rate | cells % | grids % | reward | seconds |',
        '|---|---|---|---|---|---|',
        f'| base policy | – | {100 * base["base_accuracy"]:.1f} '
        f'| {100 * base["base_grid_accuracy"]:.1f} | {base["base_reward"]:.3f} | – |',
    ]
    for name, rate in rates.items():
        results = [results_of[name, rate, seed] for seed in SEEDS]
        cells, grids, reward, seconds = (
            [result[key] for result in results]
            for key in ('accuracy', 'grid_accuracy', 'reward', 'seconds')
        )
        lines.append(
            f'| {name} | {rate:g} | {runs.interval(cells)} | {runs.interval(grids)} '
            f'| {np.mean(reward):.3f} | {np.mean(seconds):.0f} |'
        )
    table = '\n'.join([*lines, '', runs.tuning_table(accuracies, TUNING_SEED)])
    write_whole(root / 'table.md', table + '\n')
    print(table)


if __name__ == '__main__':
    cli.define_path_flag('workdir', 'runs/side_by_side', 'The folder of the runs.', saves=True)
    flags.DEFINE_integer('updates', 100, 'Updates of each run.', lower_bound=1)
    flags.DEFINE_integer('jobs', 2, 'Runs that go on at the same time.', lower_bound=1)
    cli.run(main)

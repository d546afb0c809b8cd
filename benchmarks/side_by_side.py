"""SPG's negative estimates and corruptions side by side on Sudoku.

    python -m benchmarks.side_by_side

The base policy, the number of updates and the tuning are the same for all.

Every variant gets its learning rate from the same three, on validation and with a seed of its own;
then three seeds, each policy chosen on validation and reported on the test split. Run again to go
on after an interruption. Ends with the table, which goes into docs/results.md.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import runs
from spg_jax.process import cli

Figures = dict[str, Any]

CONFIG = 'configs/sudoku.py'
RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
# Half the main job's batch: thirty runs are to fit into an hour and a half.
BATCH = {'rl.prompts': 8, 'rl.microbatch': 64}
VARIANTS = {
    'none (better completions only)': {'rl.negative': 'none'},
    'ELBO': {'rl.negative': 'elbo'},
    'EUBO': {'rl.negative': 'eubo'},
    'mixture': {'rl.negative': 'mixture'},
    'mixture, uniform corruption': {'rl.negative': 'mixture', 'corruption.kind': 'uniform'},
    "mixture, estimator='block'": {'rl.negative': 'mixture', 'rl.estimator': 'block'},
}
FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    root = Path(FLAGS.workdir)
    runs.run('spg_jax.pretrain', f'--config={CONFIG}')  # the base policy of them all, once
    common = BATCH | {'train.steps': FLAGS.updates, 'evaluation.samples': 1}

    def runs_of(cases: list[tuple[str, float, int]]) -> dict[tuple[str, float, int], Figures]:
        def one(name: str, rate: float, seed: int) -> Figures:
            folder = root / ''.join(letter if letter.isalnum() else '_' for letter in name)
            settings = {'optimizer.learning_rate': rate, 'train.seed': seed}
            overrides = common | VARIANTS[name] | settings
            return runs.train(CONFIG, folder / f'{rate}-{seed}', overrides)

        found = runs.at_once(FLAGS.jobs, [partial(one, *case) for case in cases])
        return dict(zip(cases, found, strict=True))

    tuning = runs_of([(name, rate, TUNING_SEED) for name in VARIANTS for rate in RATES])

    tried = {
        name: {rate: tuning[name, rate, TUNING_SEED]['validation_accuracy'] for rate in RATES}
        for name in VARIANTS
    }
    rates = {name: runs.best(tried[name]) for name in VARIANTS}
    found = runs_of([(name, rates[name], seed) for name in VARIANTS for seed in SEEDS])
    base = next(iter(found.values()))
    lines = [
        '| negative estimate | learning rate | cells % | grids % | reward | seconds |',
        '|---|---|---|---|---|---|',
        f'| base policy | – | {100 * base["base_accuracy"]:.1f} '
        f'| {100 * base["base_grid_accuracy"]:.1f} | {base["base_reward"]:.3f} | – |',
    ]
    for name, rate in rates.items():
        results = [found[name, rate, seed] for seed in SEEDS]
        cells, grids, reward, seconds = (
            [result[key] for result in results]
            for key in ('accuracy', 'grid_accuracy', 'reward', 'seconds')
        )
        lines.append(
            f'| {name} | {rate:g} | {runs.interval(cells)} | {runs.interval(grids)} '
            f'| {np.mean(reward):.3f} | {np.mean(seconds):.0f} |'
        )
    table = '\n'.join([*lines, '', runs.tuning_table(tried, TUNING_SEED)])
    (root / 'table.md').write_text(table + '\n')
    print(table)


if __name__ == '__main__':
    flags.DEFINE_string('workdir', 'runs/side_by_side', 'Where the runs live.')
    flags.DEFINE_integer('updates', 100, 'Updates a run.', lower_bound=1)
    flags.DEFINE_integer('jobs', 2, 'Runs at a time.', lower_bound=1)
    cli.run(main)

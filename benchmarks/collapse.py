"""Shows how SPG with the pure EUBO collapses on Countdown, which sign comes first, and what helps.

    python -m benchmarks.collapse [--seeds=0,1,2] [--workdir=runs/collapse]

Three runs for each seed, of 200 updates of the small preset with `spg.negative=eubo`: one that only
warns, one that may go back to its last sound checkpoint (`guard.rollbacks=3`), and one whose bounds
are centred each by itself (`spg.baseline=each`). The first two are the same run until the first
rollback. Each run is a line of --out, with the step at which each sign of spg_jax/runs/guard.py
first appeared, by the same rules for all three. Run the same command again to go on after an
interruption; finished runs are only read.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import runs
from spg_jax.comparison.measure import first_seen
from spg_jax.process import cli
from spg_jax.process.files import write_whole
from spg_jax.runs.metrics import read_rows

STEPS = 200
CASES = {
    'warned': {},
    'guarded': {'guard.rollbacks': 3},
    'each': {'spg.baseline': 'each'},
}
COMMON = {'spg.negative': 'eubo', 'train.steps': STEPS, 'train.diagnose_every': 10}
COMMON |= {'base.muon_rate': 0.0, 'base.batch_size': 128}  # the base policy of the records
FLAGS = flags.FLAGS


def main(_: Sequence[str]) -> None:
    cases = [(int(seed), name) for seed in FLAGS.seeds for name in CASES]
    records = runs.at_once(FLAGS.jobs, [partial(measure, *case) for case in cases])
    out = Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, ''.join(json.dumps(record) + '\n' for record in records))
    print(table(records))


def measure(seed: int, case: str) -> dict[str, Any]:
    """Makes a run, unless it is finished, and returns what came of it."""
    directory = Path(FLAGS.workdir) / f'seed{seed}-{case}'
    settings = COMMON | CASES[case] | {'train.seed': seed}
    result = runs.train('configs/countdown.py', directory, settings)
    rows = read_rows(directory / 'metrics.jsonl')
    validations = [row for row in rows if 'validation_accuracy' in row]
    rollbacks: dict[int, int] = {}
    for row in rows:
        if 'rollbacks' in row:
            rollbacks.setdefault(row['rollbacks'], row['step'] - 1)
    return {
        'task': 'countdown',
        'case': case,
        'seed': seed,
        'steps': STEPS,
        'base_accuracy': result['base_accuracy'],
        'accuracy': result['accuracy'],
        'best_step': result['best_step'],
        'validation_accuracy': {row['step']: row['validation_accuracy'] for row in validations},
        'first_seen': first_seen(rows, result['config']),
        'rollbacks': list(rollbacks.values()),  # updates done
        'updates': result['updates'],
        'learning_rate_scale': result['learning_rate_scale'],
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """The runs as a table, in per cent."""
    lines = [
        '| run | seed | base | test | last validation | first sign | collapse | rollbacks |',
        '|---' * 8 + '|',
    ]
    for record in records:
        seen = {name: step for name, step in record['first_seen'].items() if name != 'no_signal'}
        collapse = seen.pop('collapse', None)
        first = min(seen, key=seen.get) if seen else ''
        last = list(record['validation_accuracy'].values())[-1]
        cells = (
            record['case'],
            record['seed'],
            f'{100 * record["base_accuracy"]:.1f}',
            f'{100 * record["accuracy"]:.1f}',
            f'{100 * last:.1f}',
            f'{first} at {seen[first]}' if first else 'none',
            collapse or 'none',
            len(record['rollbacks']),
        )
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    flags.DEFINE_list('seeds', ['0'], 'Seeds of the runs.')
    flags.DEFINE_integer('jobs', 2, 'Runs that go on at the same time.', lower_bound=1)
    cli.define_path_flag('workdir', 'runs/collapse', 'The folder of the runs.', saves=True)
    cli.define_path_flag('out', 'docs/results/collapse.jsonl', 'The records.', saves=True)
    cli.run(main)

"""Does it learn? The main job of both tasks over three seeds, and what else the same time buys.

    python -m benchmarks.learning --countdown=countdown_test.jsonl --sudoku=sudoku_test.csv

The two files are the published test sets. For the wall-clock time RL took, beside it: the base
policy trained on with its own data; rejection-sampling fine-tuning on the base policy's own
completions of reward 1 (a third of the time to sample, the rest to train); and the ceiling, right
answers only for the time of base and RL together. Accuracy on the held-out test split and on the
published test; curves in TASK.png. Run again to go on. Two runs share the machine, a core each, so
that times compare; nothing else should run meanwhile until 'timed part done' appears.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from absl import app, flags

from benchmarks import runs
from spg_jax.metrics import read_rows
from spg_jax.pretrain import base_directory
from spg_jax.runs import run_config

TASKS = ('sudoku', 'countdown')  # the longer first, so that no core is idle at the end
SEEDS = (0, 1, 2)
SAMPLING_SHARE = 1 / 3
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Case:
    """The main job of a task with one seed, and the folder of all that belongs to it."""

    task: str
    seed: int

    @property
    def folder(self) -> Path:
        return Path(FLAGS.workdir) / self.task / f'seed{self.seed}'

    @property
    def config(self) -> str:
        return f'configs/{self.task}.py'

    @property
    def settings(self) -> dict[str, Any]:
        return {'train.seed': self.seed, 'base.seed': self.seed}

    @property
    def rewarded(self) -> Path:
        """The base policy's own right completions."""
        return self.folder / 'rewarded.jsonl'

    @property
    def base(self) -> Path:
        """The base policy's directory."""
        return base_directory(run_config(self.folder / 'spg'))


def main(_: Sequence[str]) -> None:
    cases = [Case(task, seed) for task in TASKS for seed in SEEDS]
    found = runs.at_once(FLAGS.jobs, [partial(timed, case) for case in cases])
    results = dict(zip(cases, found, strict=True))
    print('timed part done: the steps of the rest are fixed', flush=True)
    for task in TASKS:
        draw([case for case in cases if case.task == task])
    rest = [call for case in cases for call in alternatives(case, results[case])]
    runs.at_once(FLAGS.jobs, rest)
    for task in TASKS:
        table = report({case: result for case, result in results.items() if case.task == task})
        (Path(FLAGS.workdir) / f'{task}.md').write_text(table + '\n')
        print(f'{task}\n{table}')


def timed(case: Case) -> dict[str, Any]:
    """The main job and the base policy's own right completions; the job's result."""
    result = runs.train(case.config, case.folder / 'spg', case.settings)
    if not case.rewarded.is_file():
        runs.run(
            'benchmarks.rejection_sampling',
            f'--workdir={case.folder / "spg"}',
            f'--seconds={SAMPLING_SHARE * result["seconds"]}',
            f'--out={case.rewarded}',
        )
    return result


def alternatives(case: Case, result: dict[str, Any]) -> list[Callable[[], None]]:
    """The three other ways to spend RL's time, each making a policy directory in the folder."""
    stages = result['config']['base']['stages']
    steps = round(result['seconds'] * pretraining_pace(case.base))
    # Continues at the rate the base policy ended with, as it would have without RL.
    on_base = case.settings | {
        'base.checkpoint': case.base,
        'base.learning_rate': result['config']['base']['learning_rate'] / 10,
    }

    def fit(
        name: str, overrides: dict[str, Any], steps: int, share: float, *more: str
    ) -> Callable[[], None]:
        overrides = overrides | {'base.stages': f'(({steps}, {share}),)'}
        return partial(runs.pretrain, case.config, case.folder / name, overrides, *more)

    rewarded = f'--demonstrations={case.rewarded}'
    calls = [
        fit('trained_on', on_base, steps, stages[-1][1]),
        fit('rejection_sampling', on_base, round((1 - SAMPLING_SHARE) * steps), 1.0, rewarded),
    ]
    if case.seed in SEEDS[: FLAGS.ceilings]:
        total = sum(steps for steps, _ in stages) + steps
        calls.insert(0, fit('ceiling', case.settings, total, 1.0))
    return calls


def draw(cases: Sequence[Case]) -> None:
    """TASK.png: reward of the rollouts and accuracy on validation, a line a seed."""
    task = cases[0].task
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout='constrained')
    for case in cases:
        rows = read_rows(case.folder / 'spg' / 'metrics.jsonl')
        for axis, name in zip(axes, ('reward', 'validation_accuracy'), strict=True):
            points = [(row['step'], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), label=f'seed {case.seed}', lw=1)
            axis.set(title=f'{task}: {name.replace("_", " ")}', xlabel='updates', ylim=(0, 1))
            axis.grid(alpha=0.3)
    axes[1].legend(loc='lower right')
    figure.savefig(Path(FLAGS.workdir) / f'{task}.png', dpi=110)


def report(results: dict[Case, dict[str, Any]]) -> str:
    """The table of a task: means and intervals over seeds, in per cent."""
    cases = list(results)
    places: dict[str, Callable[[Case], Path]] = {
        'base policy': lambda case: case.base,
        '**SPG (mixture)**': lambda case: case.folder / 'spg',
        'base trained on': lambda case: case.folder / 'trained_on',
        'rejection sampling': lambda case: case.folder / 'rejection_sampling',
        'ceiling: right answers only': lambda case: case.folder / 'ceiling',
    }
    own = ('--samples=1',)
    published = (*own, f'--data={FLAGS[cases[0].task].value}')
    calls = {
        (name, files, case): partial(runs.evaluate, place(case), *files)
        for name, place in places.items()
        for files in (own, published)
        for case in cases
        if place(case).is_dir()
    }
    found = dict(zip(calls, runs.at_once(FLAGS.jobs, list(calls.values())), strict=True))
    lines = ['| policy | seeds | test split | published test |', '|---|---|---|---|']
    for name in places:
        seeds = [case for case in cases if (name, own, case) in found]
        cells = [shown([found[name, files, case] for case in seeds]) for files in (own, published)]
        lines.append(f'| {name} | {len(seeds)} | {" | ".join(cells)} |')
    passed, after, base, rl = (
        [result[key] for result in results.values()]
        for key in ('base_pass_at_8', 'pass_at_8', 'base_seconds', 'seconds')
    )
    return '\n'.join(lines) + (
        f'\n\npass@8 on the test split: base {runs.interval(passed)}, after SPG '
        f'{runs.interval(after)}. Seconds on one core, at most: base policy {max(base):.0f}, '
        f'RL {max(rl):.0f}.'
    )


def shown(found: Sequence[dict[str, Any]]) -> str:
    """Accuracy, for Sudoku cells and grids."""
    accuracy = runs.interval([f['accuracy'] for f in found])
    if 'grid_accuracy' not in found[0]:
        return accuracy
    return f'{accuracy} / {runs.interval([f["grid_accuracy"] for f in found])}'


def pretraining_pace(base: Path) -> float:
    """Steps a second at which the base policy was trained, without the compiler's time."""
    rows = read_rows(base.with_name(base.name + '.training') / 'metrics.jsonl')
    first, last = rows[0], rows[-1]
    return (last['step'] - first['step']) / (last['seconds'] - first['seconds'])


if __name__ == '__main__':
    for task in TASKS:
        flags.DEFINE_string(task, None, 'Its published test file.')
    flags.DEFINE_integer('jobs', 2, 'Runs at a time.', lower_bound=1)
    flags.DEFINE_integer('ceilings', len(SEEDS), 'Seeds with a ceiling, the longest training.')
    flags.DEFINE_string('workdir', 'runs/learning', 'Where the runs live.')
    flags.mark_flags_as_required(TASKS)
    app.run(main)

"""Does it learn? The main job of both tasks over three seeds, and what else the same time buys.

    python -m benchmarks.learning --countdown=countdown_test.jsonl --sudoku=sudoku_test.csv

The two files are the published test sets. For the wall-clock time RL took, beside it: the base
policy trained on with its own data; rejection-sampling fine-tuning on the base policy's own
completions of reward 1 (a third of the time to sample, the rest to train); and the ceiling, right
answers only for the time of base and RL together. All but the ceiling, which trains as the base
policy does, get their learning rate from the same two, on validation with a seed of its own.
Accuracy on the held-out test split and on the published test; curves in TASK.png. Run again to go
on. Two runs share the machine, a core each, so that times compare; nothing else should run
meanwhile until 'timed part done' appears.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from absl import flags

from benchmarks import runs
from spg_jax.pretrain import base_directory
from spg_jax.process import cli
from spg_jax.runs.directory import run_config
from spg_jax.runs.metrics import read_rows

TASKS = ('sudoku', 'countdown')  # the longer first, so that no core is idle at the end
RATES = (3e-4, 1e-3)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
SAMPLING_SHARE = 1 / 3
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Case:
    """A task with one seed, and the folder of all that belongs to it."""

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


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished main job: the measure of what the alternatives may spend."""

    case: Case
    directory: Path

    @cached_property
    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / 'result.json').read_text())

    @property
    def base(self) -> Path:
        """The base policy's directory."""
        return base_directory(run_config(self.directory))

    @property
    def rewarded(self) -> Path:
        """The base policy's own right completions."""
        return self.case.folder / 'rewarded.jsonl'

    @property
    def steps(self) -> int:
        """Steps of pre-training that fit into the seconds of RL."""
        return round(self.result['seconds'] * pretraining_pace(self.base))


def main(_: Sequence[str]) -> None:
    cases = {task: [Case(task, seed) for seed in SEEDS] for task in TASKS}
    tuning = {task: Case(task, TUNING_SEED) for task in TASKS}
    at_once = partial(runs.at_once, FLAGS.jobs)

    at_once([partial(make_base, case) for case in tuning.values()])
    found = {'spg': tuned({task: partial(spg, case) for task, case in tuning.items()})}
    rates = {task: runs.best(found['spg'][task]) for task in TASKS}
    tuning = {task: Trained(case, spg(case, rates[task])) for task, case in tuning.items()}
    every = [case for task in TASKS for case in cases[task]]
    places = at_once([partial(spg, case, rates[case.task]) for case in every])
    trained = [Trained(case, place) for case, place in zip(every, places, strict=True)]
    at_once([partial(sample, job) for job in (*tuning.values(), *trained)])
    print('timed part done: the steps of the rest are fixed', flush=True)

    for task in TASKS:
        draw(task, [job for job in trained if job.case.task == task])
    for fit in (train_on, rejection_sampling):
        found[fit.__name__] = tuned({task: partial(fit, job) for task, job in tuning.items()})
    rows: list[tuple[str, Callable[[Trained], Path]]] = [
        ('base policy', lambda job: job.base),
        ('**SPG (mixture)**', lambda job: job.directory),
        ('base trained on', lambda job: train_on(job, runs.best(found['train_on'][job.case.task]))),
        (
            'rejection sampling',
            lambda job: rejection_sampling(
                job, runs.best(found['rejection_sampling'][job.case.task])
            ),
        ),
        ('ceiling: right answers only', ceiling),
    ]
    # The ceiling, the longest training, first.
    calls = [(name, job, partial(make, job)) for name, make in reversed(rows) for job in trained]
    places = at_once([call for *_, call in calls])
    made = {(name, job): place for (name, job, _), place in zip(calls, places, strict=True)}
    for task in TASKS:
        jobs = [job for job in trained if job.case.task == task]
        table = report({name: [made[name, job] for job in jobs] for name, _ in rows}, jobs)
        table += '\n\n' + runs.tuning_table(
            {name: found[name][task] for name in found}, TUNING_SEED
        )
        (Path(FLAGS.workdir) / f'{task}.md').write_text(table + '\n')
        print(f'{task}\n{table}')


def make_base(case: Case) -> None:
    """Trains the case's base policy, unless it exists."""
    flags = (f'--config.{name}={value}' for name, value in case.settings.items())
    runs.run('spg_jax.pretrain', f'--config={case.config}', *flags)


def spg(case: Case, rate: float) -> Path:
    """The directory of the main job at a learning rate."""
    place = case.folder / f'spg-{rate:g}'
    runs.train(case.config, place, case.settings | {'optimizer.learning_rate': rate})
    return place


def sample(job: Trained) -> None:
    """Draws completions of the base policy and keeps the right ones."""
    if not job.rewarded.is_file():
        runs.run(
            'benchmarks.rejection_sampling',
            f'--workdir={job.directory}',
            f'--seconds={SAMPLING_SHARE * job.result["seconds"]}',
            f'--out={job.rewarded}',
        )


def train_on(job: Trained, rate: float) -> Path:
    """The directory of the base policy trained on with the data it had last, for RL's time."""
    share = job.result['config']['base']['stages'][-1][1]
    return _fine_tuned(job, f'trained_on-{rate:g}', rate, job.steps, share)


def rejection_sampling(job: Trained, rate: float) -> Path:
    """The directory of the base policy fine-tuned on its own right completions."""
    steps = round((1 - SAMPLING_SHARE) * job.steps)
    demonstrations = f'--demonstrations={job.rewarded}'
    return _fine_tuned(job, f'rejection_sampling-{rate:g}', rate, steps, 1.0, demonstrations)


def ceiling(job: Trained) -> Path:
    """The directory of a policy trained on right answers only, for base policy's and RL's time."""
    steps = job.steps + sum(steps for steps, _ in job.result['config']['base']['stages'])
    overrides = job.case.settings | {'base.stages': f'(({steps}, 1.0),)'}
    runs.pretrain(job.case.config, job.case.folder / 'ceiling', overrides)
    return job.case.folder / 'ceiling'


def _fine_tuned(job: Trained, name: str, rate: float, steps: int, share: float, *more: str) -> Path:
    overrides = job.case.settings | {
        'base.checkpoint': job.base,
        'base.learning_rate': rate,
        'base.stages': f'(({steps}, {share}),)',
    }
    runs.pretrain(job.case.config, job.case.folder / name, overrides, *more)
    return job.case.folder / name


def tuned(makers: dict[str, Callable[[float], Path]]) -> dict[str, runs.Accuracies]:
    """For each task, the accuracy on validation of what its maker makes of each rate."""
    tried = [(task, rate) for task in makers for rate in RATES]

    def accuracy(task: str, rate: float) -> float:
        place = makers[task](rate)
        return runs.evaluate(place, '--samples=1', '--split=validation')['accuracy']

    found = runs.at_once(FLAGS.jobs, [partial(accuracy, *case) for case in tried])
    by_case = dict(zip(tried, found, strict=True))
    return {task: {rate: by_case[task, rate] for rate in RATES} for task in makers}


def draw(task: str, jobs: Sequence[Trained]) -> None:
    """TASK.png: reward of the rollouts and accuracy on validation, a line a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout='constrained')
    for job in jobs:
        rows = read_rows(job.directory / 'metrics.jsonl')
        for axis, name in zip(axes, ('reward', 'validation_accuracy'), strict=True):
            points = [(row['step'], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), label=f'seed {job.case.seed}', lw=1)
            axis.set(title=f'{task}: {name.replace("_", " ")}', xlabel='updates', ylim=(0, 1))
            axis.grid(alpha=0.3)
    axes[1].legend(loc='lower right')
    figure.savefig(Path(FLAGS.workdir) / f'{task}.png', dpi=110)


def report(places: dict[str, list[Path]], jobs: Sequence[Trained]) -> str:
    """The table of a task: means and intervals over seeds, in per cent."""
    own = ('--samples=1',)
    published = (*own, f'--data={FLAGS[jobs[0].case.task].value}')
    wanted = [
        (name, files, place)
        for name in places
        for files in (own, published)
        for place in places[name]
    ]
    calls = [partial(runs.evaluate, place, *files) for _, files, place in wanted]
    found = dict(zip(wanted, runs.at_once(FLAGS.jobs, calls), strict=True))
    lines = ['| policy | test split | published test |', '|---|---|---|']
    for name in places:
        cells = [
            shown([found[name, files, place] for place in places[name]])
            for files in (own, published)
        ]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    passed, after, base, rl = (
        [job.result[key] for job in jobs]
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
    flags.DEFINE_string('workdir', 'runs/learning', 'Where the runs live.')
    flags.mark_flags_as_required(TASKS)
    cli.run(main)

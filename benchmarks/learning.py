"""Measures what SPG learns on two tasks, against other trainings of the same duration.

    python -m benchmarks.learning --countdown=countdown_test.jsonl --sudoku=sudoku_test.csv

The two files are the published test sets. SPG trains the small preset with three seeds. Three other
trainings get as much wall-clock time in all: the base policy trains on with its data; it is
fine-tuned on its completions of reward 1 (a third of the time samples them, the rest trains on
them); and, as the ceiling, a policy trains on right answers only, for the time of base policy and
RL together. The ceiling trains with the settings of the base policy. The learning rate of the
others is the better of two on validation, with a seed that is used for nothing else.

The tables have the accuracy on the held-out test split and on the published test set; TASK.png has
the curves. Run the same command again to go on after an interruption. Two runs share the machine
with a core each, so that their times can be compared. Nothing else should run on the machine until
'timed part done' appears.
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
from spg_jax.process.files import write_whole
from spg_jax.runs.directory import run_config
from spg_jax.runs.metrics import read_rows

TASKS = ('sudoku', 'countdown')  # the longer one first, so that no core is idle at the end
RATES = (3e-4, 1e-3)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
SAMPLING_SHARE = 1 / 3  # of the time of rejection sampling that goes into sampling
FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Case:
    """A task with one seed, and the folder of all runs that belong to it."""

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
    """A finished run of SPG, which sets the time that the other trainings may take."""

    case: Case
    directory: Path

    @cached_property
    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / 'result.json').read_text())

    @property
    def base(self) -> Path:
        """The directory of the base policy."""
        return base_directory(run_config(self.directory))

    @property
    def rewarded(self) -> Path:
        """The file of completions of the base policy that have reward 1."""
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
    accuracies = {'spg': tuned({task: partial(spg, case) for task, case in tuning.items()})}
    rates = {task: runs.best(accuracies['spg'][task]) for task in TASKS}
    tuning = {task: Trained(case, spg(case, rates[task])) for task, case in tuning.items()}
    all_cases = [case for task in TASKS for case in cases[task]]
    directories = at_once([partial(spg, case, rates[case.task]) for case in all_cases])
    trained = [Trained(*pair) for pair in zip(all_cases, directories, strict=True)]
    at_once([partial(sample, job) for job in (*tuning.values(), *trained)])
    print('timed part done: the steps of the other trainings are fixed', flush=True)

    for task in TASKS:
        draw(task, [job for job in trained if job.case.task == task])
    for fit in (train_on, rejection_sampling):
        accuracies[fit.__name__] = tuned({task: partial(fit, job) for task, job in tuning.items()})
    rows: list[tuple[str, Callable[[Trained], Path]]] = [
        ('base policy', lambda job: job.base),
        ('**SPG (mixture)**', lambda job: job.directory),
        (
            'base trained on',
            lambda job: train_on(job, runs.best(accuracies['train_on'][job.case.task])),
        ),
        (
            'rejection sampling',
            lambda job: rejection_sampling(
                job, runs.best(accuracies['rejection_sampling'][job.case.task])
            ),
        ),
        ('ceiling: right answers only', ceiling),
    ]
    # The ceiling comes first, because it is the longest training.
    calls = [(name, job, partial(make, job)) for name, make in reversed(rows) for job in trained]
    directories = at_once([call for *_, call in calls])
    directory_of = {
        (name, job): directory for (name, job, _), directory in zip(calls, directories, strict=True)
    }
    for task in TASKS:
        jobs = [job for job in trained if job.case.task == task]
        table = report({name: [directory_of[name, job] for job in jobs] for name, _ in rows}, jobs)
        table += '\n\n' + runs.tuning_table(
            {name: accuracies[name][task] for name in accuracies}, TUNING_SEED
        )
        write_whole(Path(FLAGS.workdir) / f'{task}.md', table + '\n')
        print(f'{task}\n{table}')


def make_base(case: Case) -> None:
    """Trains the base policy of a case, unless it exists."""
    flags = (f'--config.{name}={value}' for name, value in case.settings.items())
    runs.run('spg_jax.pretrain', f'--config={case.config}', *flags)


def spg(case: Case, rate: float) -> Path:
    """Trains SPG at a learning rate; returns the directory of the run."""
    directory = case.folder / f'spg-{rate:g}'
    runs.train(case.config, directory, case.settings | {'optimizer.learning_rate': rate})
    return directory


def sample(job: Trained) -> None:
    """Samples completions of the base policy and writes those of reward 1 to a file."""
    if not job.rewarded.is_file():
        runs.run(
            'benchmarks.rejection_sampling',
            f'--workdir={job.directory}',
            f'--seconds={SAMPLING_SHARE * job.result["seconds"]}',
            f'--out={job.rewarded}',
        )


def train_on(job: Trained, rate: float) -> Path:
    """Trains the base policy on with the data of its last stage, for the time of RL."""
    share = job.result['config']['base']['stages'][-1][1]
    return _fine_tuned(job, f'trained_on-{rate:g}', rate, job.steps, share)


def rejection_sampling(job: Trained, rate: float) -> Path:
    """Fine-tunes the base policy on its completions of reward 1, for the time of RL."""
    steps = round((1 - SAMPLING_SHARE) * job.steps)
    demonstrations = f'--demonstrations={job.rewarded}'
    return _fine_tuned(job, f'rejection_sampling-{rate:g}', rate, steps, 1.0, demonstrations)


def ceiling(job: Trained) -> Path:
    """Trains a policy on right answers only, for the time of base policy and RL together."""
    steps = job.steps + sum(steps for steps, _ in job.result['config']['base']['stages'])
    overrides = job.case.settings | {'base.stages': f'(({steps}, 1.0),)'}
    runs.pretrain(job.case.config, job.case.folder / 'ceiling', overrides)
    return job.case.folder / 'ceiling'


def _fine_tuned(
    job: Trained, name: str, rate: float, steps: int, share: float, *arguments: str
) -> Path:
    overrides = job.case.settings | {
        'base.checkpoint': job.base,
        'base.learning_rate': rate,
        'base.stages': f'(({steps}, {share}),)',
    }
    runs.pretrain(job.case.config, job.case.folder / name, overrides, *arguments)
    return job.case.folder / name


def tuned(makers: dict[str, Callable[[float], Path]]) -> dict[str, runs.Accuracies]:
    """For each task, the accuracy on validation of the policy that its maker makes at each rate."""
    cases = [(task, rate) for task in makers for rate in RATES]

    def accuracy(task: str, rate: float) -> float:
        directory = makers[task](rate)
        return runs.evaluate(directory, '--samples=1', '--split=validation')['accuracy']

    accuracies = runs.at_once(FLAGS.jobs, [partial(accuracy, *case) for case in cases])
    by_case = dict(zip(cases, accuracies, strict=True))
    return {task: {rate: by_case[task, rate] for rate in RATES} for task in makers}


def draw(task: str, jobs: Sequence[Trained]) -> None:
    """Draws TASK.png: reward of rollouts and accuracy on validation, with a line for each seed."""
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


def report(directories: dict[str, list[Path]], jobs: Sequence[Trained]) -> str:
    """The table of a task, with means and intervals over seeds in per cent.

    Args:
      directories: name of a training -> the policies of its seeds.
      jobs: the runs of SPG, one for each seed.
    """
    test_split = ('--samples=1',)
    published = (*test_split, f'--data={FLAGS[jobs[0].case.task].value}')
    evaluations = [
        (name, arguments, directory)
        for name in directories
        for arguments in (test_split, published)
        for directory in directories[name]
    ]
    calls = [
        partial(runs.evaluate, directory, *arguments) for _, arguments, directory in evaluations
    ]
    figures = dict(zip(evaluations, runs.at_once(FLAGS.jobs, calls), strict=True))
    for column in (test_split, published):
        runs.check_alike(
            {
                str(directory): figure
                for (_, arguments, directory), figure in figures.items()
                if arguments == column
            }
        )
    lines = ['| policy | test split | published test |', '|---|---|---|']
    for name in directories:
        cells = [
            cell([figures[name, arguments, directory] for directory in directories[name]])
            for arguments in (test_split, published)
        ]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    base_pass, spg_pass, base_seconds, spg_seconds = (
        [job.result[key] for job in jobs]
        for key in ('base_pass_at_8', 'pass_at_8', 'base_seconds', 'seconds')
    )
    return '\n'.join(lines) + (
        f'\n\npass@8 on the test split: base {runs.interval(base_pass)}, after SPG '
        f'{runs.interval(spg_pass)}. Seconds on one core, at most: base policy '
        f'{max(base_seconds):.0f}, RL {max(spg_seconds):.0f}.'
    )


def cell(figures: Sequence[dict[str, Any]]) -> str:
    """The accuracy over seeds with its interval; for Sudoku that of cells and that of grids."""
    accuracy = runs.interval([seed['accuracy'] for seed in figures])
    if 'grid_accuracy' not in figures[0]:
        return accuracy
    return f'{accuracy} / {runs.interval([seed["grid_accuracy"] for seed in figures])}'


def pretraining_pace(base: Path) -> float:
    """The steps per second at which a base policy was trained, without the time of compiling."""
    rows = read_rows(base.with_name(base.name + '.training') / 'metrics.jsonl')
    first, last = rows[0], rows[-1]
    return (last['step'] - first['step']) / (last['seconds'] - first['seconds'])


if __name__ == '__main__':
    for task in TASKS:
        cli.define_path_flag(task, None, 'The published test file of the task.')
    flags.DEFINE_integer('jobs', 2, 'Runs that go on at the same time.', lower_bound=1)
    cli.define_path_flag('workdir', 'runs/learning', 'The folder of the runs.', saves=True)
    flags.mark_flags_as_required(TASKS)
    cli.run(main)

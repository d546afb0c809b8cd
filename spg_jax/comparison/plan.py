"""What a comparison runs: the configuration of configs/compare.py, read and checked.

An *arm* is a method with its settings, written as on a command line: 'spg.negative=elbo'. A task is
the name of a configuration and settings. The arms of a task share its base policy, its prompts and
its budget. A *job* is one run: of an arm on a task, with a seed and a learning rate.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from spg_jax.assembly import Parts, assemble
from spg_jax.comparison.settings import assign, groups, settings_of
from spg_jax.method import SPG
from spg_jax.planning import sequences
from spg_jax.process.config_flag import UnusableConfig, read_config
from spg_jax.rl.objectives import group_of

TUNING, MEASURED = 'tuning', 'seed'  # roles of a job


class Job(NamedTuple):
    """One run of a comparison."""

    task: str
    method: str  # the name of its arm
    role: str  # TUNING or MEASURED
    seed: int
    rate: float  # optimizer.learning_rate

    @property
    def name(self) -> str:
        """Its name in messages, and its folder."""
        return f'{self.task}/{self.method}/{self.role}-{self.seed}-{self.rate:g}'


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What is compared, and the protocol that all methods share."""

    tasks: Mapping[str, str]  # name -> configuration and settings, of those that are compared
    arms: Mapping[str, str]  # name -> settings, of those that are compared
    reference: str  # the arm that others are compared with
    seeds: Mapping[str, int]  # arm -> number of seeds
    rates: tuple[float, ...]  # ascending
    tuning_seed: int
    tuning_share: float  # of the updates of a run
    budget: str  # a unit of `planning.sequences.UNITS`
    validations: int  # of each run
    own_bases: bool  # whether each seed has a base policy of its own
    common: str  # settings of all runs
    overrides: str  # settings of the command line, which count last

    def jobs(self, task: str, method: str, rate: float) -> list[Job]:
        """The jobs of an arm that its figures come from."""
        return [Job(task, method, MEASURED, seed, rate) for seed in range(self.seeds[method])]

    def tuning_job(self, task: str, method: str, rate: float) -> Job:
        """The job that tries a learning rate, on validation only."""
        return Job(task, method, TUNING, self.tuning_seed, rate)

    def cells(self) -> list[tuple[str, str]]:
        """Each pair (task, arm), in the order in which they run; the reference comes first."""
        methods = sorted(self.arms, key=lambda name: name != self.reference)
        return [(task, method) for task in self.tasks for method in methods]

    def share(self, index: int, number: int) -> list[tuple[str, str]]:
        """The pairs (task, arm) of one shard of a number of shards, all jobs of which it runs."""
        return self.cells()[index::number]

    def config_of(self, job: Job) -> ml_collections.ConfigDict:
        """The settings of a job."""
        config = self._config(job.task, job.method)
        updates = self.updates_of(job)
        config.train.steps, config.train.seed = updates, job.seed
        config.optimizer.learning_rate = job.rate
        config.evaluation.every = config.checkpoint.every = -(-updates // self.validations)
        if self.own_bases:
            config.base.seed = job.seed
        return config

    def updates_of(self, job: Job) -> int:
        """The updates of a job."""
        updates = self.updates(job.task, job.method)
        return max(1, round(self.tuning_share * updates)) if job.role == TUNING else updates

    # A comparison lives as long as its process, so that nothing kept here outlives its use.
    @functools.cache  # noqa: B019
    def updates(self, task: str, method: str) -> int:
        """The updates that an arm makes with the budget of a task."""
        steps = self._config(task, self.reference).train.steps
        amount = sequences.amounts(self.parts(task, self.reference), steps, self.budget)[-1]
        return sequences.updates_within(self.parts(task, method), int(amount), self.budget)

    def counts(self, task: str, method: str, updates: int) -> tuple[int, int]:
        """The sequences that an arm sends through the network, forwards and backwards."""
        forward, backward = sequences.counts(self.parts(task, method), updates)[-1]
        return int(forward), int(backward)

    @functools.cache  # noqa: B019
    def parts(self, task: str, method: str) -> Parts:
        """What the settings of an arm describe.

        Raises:
          ValueError: they cannot work; one line names task and arm.
        """
        try:
            return assemble(self._config(task, method))
        except ValueError as error:
            raise ValueError(f'{task}, {method}: {error}') from None

    def words(self, method: str) -> dict[str, str]:
        """The settings of an arm as text, with those of the command line that concern it."""
        arm = {'rl.objective': SPG} | settings_of(self.arms[method], f'arm {method}')
        known = {*groups(), group_of(arm['rl.objective'])}
        overrides = settings_of(self.overrides, 'overrides')
        return arm | {key: x for key, x in overrides.items() if key.partition('.')[0] in known}

    def check(self) -> None:
        """Refuses settings that cannot work before anything runs, of every arm on every task.

        Raises:
          ValueError: one line that says what cannot work.
        """
        for task, method in self.cells():
            self.updates(task, method)
        for key in settings_of(self.overrides, 'overrides'):
            if not any(key in self.words(method) for method in self.arms):
                raise ValueError(
                    f'overrides: no arm of {", ".join(self.arms)} has the setting {key}; leave it '
                    'out, or compare a method that has it'
                )

    def shared_settings(self, task: str) -> dict[str, Any]:
        """The settings of a task that its arms share, by GROUP.KEY, before an arm changes any."""
        overrides = settings_of(self.overrides, 'overrides')
        general = {key: x for key, x in overrides.items() if key.partition('.')[0] in groups()}
        settings = self._configured(task, general, task).to_dict()
        return {
            f'{group}.{key}': value
            for group in groups() & settings.keys()
            for key, value in settings[group].items()
        }

    def own_settings(self, method: str) -> dict[str, str]:
        """The settings of an arm, and those of the command line that only methods like it have."""
        arm = settings_of(self.arms[method], f'arm {method}')
        return {
            key: text
            for key, text in self.words(method).items()
            if key in arm or key == 'rl.objective' or key.partition('.')[0] not in groups()
        }

    def _config(self, task: str, method: str) -> ml_collections.ConfigDict:
        """The settings of an arm on a task, with the number of updates of its configuration."""
        return self._configured(task, self.words(method), f'{task}, {method}')

    def _configured(
        self, task: str, values: Mapping[str, str], where: str
    ) -> ml_collections.ConfigDict:
        """The configuration of a task with settings on top; `where` begins messages."""
        name, _, words = self.tasks[task].strip().partition(' ')
        try:
            config = read_config(name)
        except UnusableConfig as error:
            raise ValueError(f'task {task}: {error}') from None
        if 'rl' not in config:
            raise ValueError(f'task {task}: {name} does not describe a run; use one like countdown')
        of_task = settings_of(words, f'task {task}')
        assign(config, of_task | settings_of(self.common, 'common') | values, where)
        return config

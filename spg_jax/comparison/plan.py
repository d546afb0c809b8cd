"""What a comparison runs: the configuration of configs/compare.py, read and checked.

An *arm* is a method with its settings, written as on a command line: 'spg.negative=elbo'. A task is
the name of a configuration and settings. The arms of a task share its base policy, its prompts and
its budget. A *job* is one run: of an arm on a task, with a seed and a learning rate.
"""

import ast
import dataclasses
import functools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from spg_jax.assembly import Parts, assemble
from spg_jax.config import default_config
from spg_jax.errors import check_one_of, nearest
from spg_jax.limits import setting
from spg_jax.method import SPG, complete, names
from spg_jax.planning import sequences
from spg_jax.process.config_flag import UnusableConfig, read_config
from spg_jax.random import SEEDS
from spg_jax.rl.objectives import group_of

TUNING, MEASURED = 'tuning', 'seed'  # roles of a job
# What all arms of a task share, and what the comparison sets by itself. An arm cannot change it.
SHARED_GROUPS = ('task', 'data', 'base', 'model', 'mesh', 'evaluation', 'checkpoint')
SHARED_SETTINGS = (
    *('rl.prompts', 'rl.group_size', 'sampling.prompt_length', 'sampling.length'),
    *('train.steps', 'train.seed', 'train.wandb', 'optimizer.learning_rate'),
)
# The settings of a comparison that say in its place what a setting of a run would say.
SET_HERE = {
    'optimizer.learning_rate': 'rates',
    'train.seed': 'seeds',
    'evaluation.every': 'validations',
    'checkpoint.every': 'validations',
    'rl.objective': 'arms',
}
# Groups of a configuration whose keys are names that a user may add.
NAMED = ('arms', 'configs', 'seeds_of')
PARTS = (*NAMED, 'methods', 'tasks', 'reference', 'seeds', 'rates', 'tuning_seed', 'tuning_share')
PARTS += ('budget', 'validations', 'own_bases', 'common', 'overrides')


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
        amount = sequences.amounts(self.parts(task, self.reference), *self._budget(task))[-1]
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
        groups = {*_groups(), group_of(arm['rl.objective'])}
        overrides = settings_of(self.overrides, 'overrides')
        return arm | {key: x for key, x in overrides.items() if key.partition('.')[0] in groups}

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

    def _budget(self, task: str) -> tuple[int, str]:
        return setting(self._config(task, self.reference), 'train.steps'), self.budget

    def shared_settings(self, task: str) -> dict[str, Any]:
        """The settings of a task that its arms share, by GROUP.KEY, before an arm changes any."""
        overrides = settings_of(self.overrides, 'overrides')
        general = {key: x for key, x in overrides.items() if key.partition('.')[0] in _groups()}
        settings = self._configured(task, general, task).to_dict()
        return {
            f'{group}.{key}': value
            for group in _groups() & settings.keys()
            for key, value in settings[group].items()
        }

    def own_settings(self, method: str) -> dict[str, str]:
        """The settings of an arm, and those of the command line that only methods like it have."""
        arm = settings_of(self.arms[method], f'arm {method}')
        return {
            key: text
            for key, text in self.words(method).items()
            if key in arm or key == 'rl.objective' or key.partition('.')[0] not in _groups()
        }

    def _config(self, task: str, method: str) -> ml_collections.ConfigDict:
        """The settings of an arm on a task, with the number of updates of its configuration."""
        return self._configured(task, self.words(method), f'{task}, {method}')

    def _configured(
        self, task: str, values: Mapping[str, str], where: str
    ) -> ml_collections.ConfigDict:
        """The configuration of a task with settings on top; `where` begins messages."""
        name, *words = shlex.split(self.tasks[task])
        try:
            config = read_config(name)
        except UnusableConfig as error:
            raise ValueError(f'task {task}: {error}') from None
        if 'rl' not in config:
            raise ValueError(f'task {task}: {name} does not describe a run; use one like countdown')
        of_task = settings_of(shlex.join(words), f'task {task}')
        assign(config, of_task | settings_of(self.common, 'common') | values, where)
        return config


def read(config: ml_collections.ConfigDict) -> Comparison:
    """Reads the configuration of a comparison.

    Raises:
      ValueError: one line that says which part of it cannot be used.
    """
    check_parts(config)
    methods, tasks = _listed(config.methods), _listed(config.tasks)
    for name in methods:
        check_one_of('method', name, config.arms)
    for name in tasks:
        check_one_of('task', name, config.configs)
    check_one_of('reference', config.reference, config.arms)
    for name in config.seeds_of:
        check_one_of('seeds_of', name, config.arms)
    check_one_of('budget', config.budget, sequences.UNITS)
    if config.reference not in methods:
        methods = [config.reference, *methods]
    rates = tuple(config.rates)
    if (
        not rates
        or any(not isinstance(x, float) or x <= 0 for x in rates)
        or rates != tuple(sorted(set(rates)))
    ):
        raise ValueError(f'rates are {rates}; use ascending positive numbers such as (3e-4, 1e-3)')
    seeds = {name: config.seeds_of.get(name, config.seeds) for name in methods}
    for key, value, fits, words in (
        *((f'seeds of {name}', n, 1 <= n < SEEDS, '1 or more') for name, n in seeds.items()),
        ('tuning_seed', config.tuning_seed, 0 <= config.tuning_seed < SEEDS, '0 or more'),
        (
            'tuning_share',
            config.tuning_share,
            0 < config.tuning_share <= 1,
            'a share above 0, at most 1',
        ),
        ('validations', config.validations, config.validations >= 1, '1 or more'),
    ):
        if not fits:
            raise ValueError(f'{key} is {value}; use {words}')
    if len(rates) > 1 and config.tuning_seed < max(seeds.values()):
        raise ValueError(
            f'tuning_seed is {config.tuning_seed}, one of the seeds 0 to {max(seeds.values()) - 1} '
            'that figures come from; use a larger one'
        )
    comparison = Comparison(
        tasks={name: config.configs[name] for name in tasks},
        arms={name: config.arms[name] for name in methods},
        seeds=seeds,
        rates=rates,
        **{
            name: config[name]
            for name in ('reference', 'tuning_seed', 'tuning_share', 'budget', 'validations')
        },
        **{name: config[name] for name in ('own_bases', 'common', 'overrides')},
    )
    for name, text in comparison.arms.items():
        for key in settings_of(text, f'arm {name}'):
            if key.partition('.')[0] in SHARED_GROUPS or key in SHARED_SETTINGS:
                raise ValueError(
                    f'arm {name} sets {key}, which all arms of a task share; set it in the line of '
                    'the task, or with --config.overrides for all'
                )
    for where in ('common', 'overrides', *comparison.tasks):
        text = getattr(comparison, where, None) or comparison.tasks.get(where, '')
        words = text if where in ('common', 'overrides') else text.partition(' ')[2]
        for key in settings_of(words, where).keys() & SET_HERE.keys():
            raise ValueError(
                f'{where} sets {key}, which a comparison sets itself; use --config.{SET_HERE[key]}'
            )
    return comparison


def check_parts(config: ml_collections.ConfigDict) -> None:
    """Refuses a configuration that is none of a comparison, which names the missing part."""
    missing = [part for part in PARTS if part not in config]
    if missing:
        raise ValueError(
            f'--config has no {missing[0]}, so it is not that of a comparison; use '
            'configs/compare.py, or start from it'
        )


def complete_comparison(
    config: ml_collections.ConfigDict, assigned: Mapping[str, str]
) -> frozenset[str]:
    """Makes room for the arms, tasks and seeds that the command line adds, as `method.complete`.

    Raises:
      ValueError: the command line sets something that a comparison does not have.
    """
    check_parts(config)
    kinds = {'arms': '', 'configs': '', 'seeds_of': 0}
    for key, value in assigned.items():
        group, _, name = key.partition('.')
        if group in NAMED and name:
            if not re.fullmatch(r'\w+', name):
                raise ValueError(f'{key}: a name has letters, digits and underscores only')
            if name not in config[group]:
                with config.unlocked():
                    config[group][name] = kinds[group]
        elif key not in PARTS:
            if '.' in key:
                raise ValueError(
                    f'no setting {key} of a comparison; for a setting of all runs use '
                    f"--config.overrides='{key}={value}'"
                )
            near = nearest(key, PARTS)
            raise ValueError(f'no setting {key} of a comparison; use {near or ", ".join(PARTS)}')
    return frozenset()


def settings_of(text: str, where: str) -> dict[str, str]:
    """The settings in a text such as 'spg.negative=elbo spg.beta=2', by GROUP.KEY.

    Raises:
      ValueError: a word of it is no setting.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f'{where}: {text!r} cannot be split into words ({error})') from None
    values = {}
    for word in words:
        match = re.fullmatch(r'(\w+\.\w+)=(.*)', word, re.DOTALL)
        if not match:
            raise ValueError(f'{where}: {word!r} is no setting; use GROUP.KEY=VALUE')
        values[match[1]] = match[2]
    return values


def assign(config: ml_collections.ConfigDict, values: Mapping[str, str], where: str) -> None:
    """Sets settings that are given as text, as the command line of a run would.

    A published recipe does not change what all arms of a task share.

    Args:
      config: of a run, which is changed.
      values: text by GROUP.KEY.
      where: begins messages.

    Raises:
      ValueError: no such setting, or a text that does not say a value of its kind.
    """
    shared = {
        key: ''
        for key in names(config)
        if key in SHARED_SETTINGS or key.partition('.')[0] in SHARED_GROUPS and '.' in key
    }
    try:
        complete(config, shared | values)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    for key, text in values.items():
        if key != 'rl.objective':
            group, leaf = key.split('.')
            try:
                config[group][leaf] = _value(text, config[group][leaf])
            except (ValueError, SyntaxError, TypeError, KeyError):
                raise ValueError(
                    f'{where}: {key} is {text!r}; use a value like {config[group][leaf]!r}'
                ) from None


def _value(text: str, default: Any) -> Any:
    """The value that a text says, of the kind of another value."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {'true': True, 'false': False, '1': True, '0': False}[text.lower()]
    if isinstance(default, int | float):
        return type(default)(text)
    value = ast.literal_eval(text)
    if not isinstance(value, tuple | list):
        raise ValueError(text)
    return tuple(value)


@functools.cache
def _groups() -> frozenset[str]:
    """The groups of settings that every method has."""
    return frozenset(default_config()) - {SPG}


def _listed(text: str | Sequence[str] | Iterable[str]) -> list[str]:
    """The names in a text, with commas or spaces between them, each once."""
    words = re.split(r'[,\s]+', text) if isinstance(text, str) else text
    return list(dict.fromkeys(word for word in words if word))

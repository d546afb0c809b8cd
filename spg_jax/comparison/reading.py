"""The configuration of a comparison, configs/compare.py, as a `Comparison`."""

import re
from collections.abc import Mapping

import ml_collections

from spg_jax.comparison.plan import Comparison
from spg_jax.comparison.settings import SHARED_GROUPS, SHARED_SETTINGS, settings_of
from spg_jax.errors import check_one_of, nearest
from spg_jax.planning.sequences import UNITS
from spg_jax.random import SEEDS

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


def read(config: ml_collections.ConfigDict) -> Comparison:
    """Reads the configuration of a comparison.

    Raises:
      ValueError: one line that says which part of it cannot be used.
    """
    check_parts(config)
    methods, tasks = listed(config.methods), listed(config.tasks)
    for name in methods:
        check_one_of('method', name, config.arms)
    for name in tasks:
        check_one_of('task', name, config.configs)
    if not tasks:
        raise ValueError(f'tasks is {config.tasks!r}; use names of configs such as countdown')
    check_one_of('reference', config.reference, config.arms)
    for name in config.seeds_of:
        check_one_of('seeds_of', name, config.arms)
    if config.reference not in methods:
        methods = [config.reference, *methods]
    comparison = Comparison(
        tasks={name: config.configs[name] for name in tasks},
        arms={name: config.arms[name] for name in methods},
        reference=config.reference,
        seeds={name: config.seeds_of.get(name, config.seeds) for name in methods},
        rates=tuple(config.rates),
        tuning_seed=config.tuning_seed,
        tuning_share=config.tuning_share,
        budget=config.budget,
        validations=config.validations,
        own_bases=config.own_bases,
        common=config.common,
        overrides=config.overrides,
    )
    _check_numbers(comparison)
    _check_texts(comparison)
    return comparison


def _check_numbers(comparison: Comparison) -> None:
    """Raises ValueError for a number that has no meaning."""
    rates, seeds, share = comparison.rates, comparison.seeds, comparison.tuning_share
    check_one_of('budget', comparison.budget, UNITS)
    are_positive = all(isinstance(rate, float) and rate > 0 for rate in rates)
    if not rates or not are_positive or list(rates) != sorted(set(rates)):
        raise ValueError(f'rates are {rates}; use ascending positive numbers such as (3e-4, 1e-3)')
    for name, number in seeds.items():
        if not 1 <= number < SEEDS:
            raise ValueError(f'seeds of {name} is {number}; use 1 or more')
    if not 0 < share <= 1:
        raise ValueError(f'tuning_share is {share}; use a share above 0, at most 1')
    if comparison.validations < 1:
        raise ValueError(f'validations is {comparison.validations}; use 1 or more')
    most = max(seeds.values())
    if len(rates) > 1 and not most <= comparison.tuning_seed < SEEDS:
        raise ValueError(
            f'tuning_seed is {comparison.tuning_seed}, and figures come from the seeds 0 to '
            f'{most - 1}; use another one, at least {most}'
        )


def _check_texts(comparison: Comparison) -> None:
    """Raises ValueError for a setting that stands where it has no effect or too much."""
    for name, text in comparison.arms.items():
        for key in settings_of(text, f'arm {name}'):
            if key.partition('.')[0] in SHARED_GROUPS or key in SHARED_SETTINGS:
                raise ValueError(
                    f'arm {name} sets {key}, which all arms of a task share; set it in the line of '
                    'the task, or with --config.overrides for all'
                )
    texts = {'common': comparison.common, 'overrides': comparison.overrides}
    for name, text in comparison.tasks.items():
        texts[f'task {name}'] = text.strip().partition(' ')[2]
    for where, text in texts.items():
        for key in settings_of(text, where).keys() & SET_HERE.keys():
            raise ValueError(
                f'{where} sets {key}, which a comparison sets itself; use --config.{SET_HERE[key]}'
            )


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


def listed(text: str) -> list[str]:
    """The names in a text, with commas or spaces between them, each once."""
    return list(dict.fromkeys(re.findall(r'[^,\s]+', text)))

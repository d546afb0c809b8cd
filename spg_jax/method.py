"""Settings that depend on the objective: the group of its own, and its published recipe.

The groups of `spg_jax.config` are the same for all objectives. An objective adds one, which has its
name and holds the fields of its `Settings`. Those of SPG also answer as `rl.KEY`, under which they
were known first; both names are references to one value.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import ml_collections

from spg_jax.errors import check_one_of, nearest
from spg_jax.rl.objectives import REGISTRY, find, group_of, source_file

RECIPES = ('ours', 'published')
SPG = 'spg'
PRESETS = ('', 'fast')
# What `sampling.preset` 'fast' sets; docs/sampling.md holds the figures that decided it.
FAST = {
    'sampling.sampler': 'llada2',
    'sampling.threshold': 0.7,
    'sampling.cache': 'dual',
}
# Sizes of pieces, which a recipe with another group size scales, so that they still hold groups.
PIECES = ('microbatch', 'generation_batch')


def set_objective(config: ml_collections.ConfigDict, name: str) -> None:
    """Names the objective, and gives the configuration the group of its settings.

    The group of the objective before leaves the configuration.

    Raises:
      ValueError: there is no such objective, or its group would have the name of another group.
    """
    fields = {field.name: field.default for field in dataclasses.fields(find(name).settings)}
    group, before = group_of(name), group_of(config.rl.objective)
    if name == SPG and SPG not in config:  # settings from before SPG had a group
        fields |= {key: config.rl[key] for key in fields if key in config.rl}
    with config.unlocked():
        for key in {*alias_names()} & {*config.rl}:
            del config.rl[key]
        for stale in {before, *REGISTRY} & {*config}:
            del config[stale]
        if group in config:
            raise ValueError(
                f'rl.objective is {name!r}, whose settings would be the group {group}, which is '
                'there already; give the file another name'
            )
        config.rl.objective = name
        config[group] = fields
        for key in fields if name == SPG else ():
            config.rl[key] = config[SPG].get_ref(key)


def alias_names() -> tuple[str, ...]:
    """Settings of SPG, which are also `rl.KEY`."""
    return tuple(field.name for field in dataclasses.fields(REGISTRY[SPG].settings))


def use_recipe(config: ml_collections.ConfigDict, fixed: Collection[str] = ()) -> frozenset[str]:
    """Sets the published values of `rl.recipe`.

    Args:
      config: the configuration, which is changed if `rl.recipe` is 'published'.
      fixed: settings GROUP.KEY that stay as they are.

    Returns:
      The settings that the recipe decides.

    Raises:
      ValueError: no such recipe, or it names a setting that does not exist or is of another kind.
    """
    check_one_of('rl.recipe', config.rl.recipe, RECIPES)
    if config.rl.recipe == 'ours':
        return frozenset()
    recipe, group_size = find(config.rl.objective).recipe, config.rl.group_size
    chosen = {key: value for key, value in recipe.items() if key not in fixed}
    for key, value in chosen.items():
        group, _, leaf = key.partition('.')
        if key not in names(config) or not leaf:
            raise ValueError(f'RECIPE of {config.rl.objective}: {unknown(key, config)}')
        try:
            config[group][leaf] = value
        except TypeError:
            raise ValueError(
                f'RECIPE of {config.rl.objective}: {key} is {value!r}; use a value like '
                f'{config[group][leaf]!r}'
            ) from None
    for piece in PIECES:
        rows = config.rl[piece] * config.rl.group_size
        key = f'rl.{piece}'
        if rows and key not in fixed and config.rl.group_size != group_size:
            if not rows % group_size:
                config.rl[piece] = rows // group_size
                chosen[key] = config.rl[piece]
    return frozenset(chosen)


def use_preset(config: ml_collections.ConfigDict, fixed: Collection[str] = ()) -> frozenset[str]:
    """Sets the values of `sampling.preset`.

    Args:
      config: the configuration, which is changed if the preset is 'fast'.
      fixed: settings GROUP.KEY that stay as they are.

    Returns:
      The settings that the preset decides.

    Raises:
      ValueError: no such preset.
    """
    check_one_of('sampling.preset', config.sampling.preset, PRESETS)
    if not config.sampling.preset:
        return frozenset()
    chosen = {key: value for key, value in FAST.items() if key not in fixed}
    config.update_from_flattened_dict(chosen)
    return frozenset(chosen)


def complete(config: ml_collections.ConfigDict, assigned: Mapping[str, str]) -> frozenset[str]:
    """Completes what a configuration file returned, before the command line changes settings.

    The objective is that of the command line, or else that of the file. Its settings and its recipe
    must be there before the rest of the command line can change them.

    Args:
      config: the configuration, which is changed.
      assigned: values on the command line by GROUP.KEY.

    Returns:
      The settings that the recipe and the preset decide.

    Raises:
      ValueError: no such objective, recipe, preset or setting; one line.
    """
    rl = config.get('rl', {})
    if not {'objective', 'recipe'} <= {*rl}:  # `assemble` says what a configuration lacks.
        return frozenset()
    name = assigned.get('rl.objective', rl.objective)
    if name != rl.objective or group_of(name) not in config:
        set_objective(config, name)
    rl.recipe = assigned.get('rl.recipe', rl.recipe)
    completed = use_recipe(config, assigned)
    if 'preset' in config.get('sampling', {}):
        config.sampling.preset = assigned.get('sampling.preset', config.sampling.preset)
        completed |= use_preset(config, assigned)
    for key in assigned:
        if key not in names(config):
            raise ValueError(unknown(key, config))
    return completed


def names(config: ml_collections.ConfigDict) -> list[str]:
    """The names GROUP and GROUP.KEY of a configuration."""
    keys = list(config)
    for group, settings in config.items():
        if isinstance(settings, ml_collections.ConfigDict):
            keys += [f'{group}.{key}' for key in settings]
    return keys


def unknown(key: str, config: ml_collections.ConfigDict, known: Iterable[str] = ()) -> str:
    """One line about a setting that a configuration does not have.

    Args:
      key: GROUP.KEY or GROUP.
      config: the configuration.
      known: the settings that it can have; by default those that it has.
    """
    objective = config.rl.objective
    group, _, leaf = key.partition('.')
    if group == 'rl' and leaf in alias_names() and objective != SPG:
        return f'no setting {key}: it belongs to spg, and rl.objective is {objective!r}'
    if group in REGISTRY and group != group_of(objective):
        return f'no setting {key}: rl.objective is {objective!r}; set rl.objective to {group!r}'
    near, file = nearest(key, known or names(config)), 'spg_jax/config.py'
    if group == group_of(objective):
        file = source_file(objective) or f'spg_jax/rl/objectives/{group}.py'
    advice = f'use {near}, or see' if near else 'see'
    return f'no setting {key}; {advice} {file}'

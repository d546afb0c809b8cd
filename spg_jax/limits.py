"""Which values settings may have, before parts are made of them."""

import math
from collections.abc import Callable
from typing import Any

import ml_collections

from spg_jax.config import default_config
from spg_jax.errors import check_one_of
from spg_jax.method import PRESETS, RECIPES, SPG, alias_names, set_objective, unknown
from spg_jax.process.files import local_path
from spg_jax.random import SEEDS
from spg_jax.rl.batching import Batching
from spg_jax.rl.objectives import group_of

# Numbers that no part checks: keys, the condition on their values, and the condition in words.
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        (
            'sampling.prompt_length',
            'corruption.window',
            'train.steps',
            'train.max_skipped',
            'base.batch_size',
            'evaluation.every',
            'evaluation.problems',
            'evaluation.batch',
            'evaluation.samples',
            'checkpoint.every',
            'checkpoint.keep',
            'guard.window',
            'guard.skipped',
            'convert.documents',
            'convert.batch_size',
            'convert.validate_every',
            'convert.keep_best',
        ),
        lambda x: x >= 1,
        'a positive integer',
    ),
    (
        (
            *('base.learning_rate', 'base.grad_clip'),
            *('convert.learning_rate', 'convert.grad_clip'),
            *('optimizer.learning_rate', 'optimizer.grad_clip'),
        ),
        lambda x: x > 0,
        'a positive number',
    ),
    (
        (
            *('base.muon_rate', 'base.weight_decay'),
            'base.keep_weight',
            'base.edit_weight',
            'optimizer.weight_decay',
            'train.diagnose_every',
            'train.profile',
            'guard.rollbacks',
            *('convert.length', 'convert.weight_decay', 'convert.noise', 'convert.noise_updates'),
            'convert.cap',
        ),
        lambda x: x >= 0,
        'a number of at least 0',
    ),
    (
        ('base.ema', 'optimizer.b1', 'optimizer.b2'),
        lambda x: 0 <= x < 1,
        'a decay of at least 0 and below 1',
    ),
    (
        ('guard.reward_fall', 'guard.accuracy_fall'),
        lambda x: 0 < x < 1,
        'a share above 0 and below 1',
    ),
    (
        (
            'optimizer.warmup_fraction',
            'convert.right_share',
            'base.wrong_share',
            'base.random_rate',
        ),
        lambda x: 0 <= x <= 1,
        'a share within [0, 1]',
    ),
    (('base.seed', 'train.seed'), lambda x: 0 <= x < SEEDS, 'a seed of at least 0'),
)

# Settings that are paths, and whether checkpoints are saved under them.
PATHS = {
    'task.prompt_template': False,
    'task.data_dir': False,
    'base.checkpoint': False,
    'base.cache': False,
    'lora.adapter': False,
}

# The largest integer of a setting, and sizes that no machine can hold: tokens of one batch, and
# parameters of a model made here.
MOST, MOST_TOKENS, MOST_PARAMETERS = 2**32 - 1, 2**31, 2**40
# The rank of adapters on a checkpoint. A rank above the width adds nothing but memory, and no model
# that is published is wider.
MOST_RANK = 2**14


def setting(config: ml_collections.ConfigDict, key: str) -> Any:
    """The value of a setting, which is named GROUP.KEY."""
    group, leaf = key.split('.')
    return config[group][leaf]


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Refuses settings that do not exist, are missing, or have a value of another kind or range.

    Args:
      config: the settings. Those that are PATHS are changed to the paths that they mean, and an
        objective that was named without its settings gets them.

    Raises:
      ValueError: one line that names the setting.
    """
    objective = config.get('rl', {}).get('objective', SPG)
    if not isinstance(objective, str):
        raise ValueError(f'rl.objective is {objective!r}; use a name like {SPG!r}')
    defaults = default_config(objective)
    if group_of(objective) not in config and 'objective' in config.get('rl', {}):
        set_objective(config, objective)
    _check_kinds(config, defaults)
    check_one_of('rl.recipe', config.rl.recipe, RECIPES)
    check_one_of('sampling.preset', config.sampling.preset, PRESETS)
    for key in alias_names() if objective == SPG else ():
        if config.rl[key] != config.spg[key]:  # in a copy, where they are two values
            raise ValueError(
                f'rl.{key} is {config.rl[key]!r} and spg.{key} is {config.spg[key]!r}, which are '
                f'two names of one setting; set spg.{key}, and rl.{key} to the same'
            )
    for key, saves in PATHS.items():
        group, leaf = key.split('.')
        if path := config[group][leaf]:
            try:
                config[group][leaf] = str(local_path(path, saves))
            except ValueError as error:
                raise ValueError(f'{key}: {error}') from None
    for keys, condition, words in RANGES:
        for key in keys:
            if not condition(setting(config, key)):
                raise ValueError(f'{key} is {setting(config, key)}; use {words}')
    if config.train.profile > config.train.steps:
        raise ValueError(
            f'train.profile is {config.train.profile}, after the last of train.steps '
            f'{config.train.steps} updates; use at most {config.train.steps}, or 0 for no trace'
        )


def _check_kinds(config: ml_collections.ConfigDict, expected: ml_collections.ConfigDict) -> None:
    """Refuses settings that do not exist, are missing, or have a value of another kind.

    `default_config` is locked, so these come from files that do not start with it or unlock it.

    Args:
      config: the settings.
      expected: the default configuration with the same objective.

    Raises:
      ValueError: one line that names the setting.
    """
    defaults, settings = (
        {
            f'{group}.{key}': value
            for group, keys in groups.items()
            for key, value in (keys.items() if isinstance(keys, dict) else [('', keys)])
        }
        for groups in (expected.to_dict(), config.to_dict())
    )
    if 'arms' in config:
        raise ValueError(
            '--config configures a comparison; use python -m spg_jax.compare, or a configuration '
            'of a task such as countdown'
        )
    for key in settings.keys() - defaults.keys():
        raise ValueError(unknown(key.strip('.'), expected, defaults))
    aliases = {f'rl.{name}' for name in alias_names()}  # An error prefers the other name.
    for key, default in sorted(defaults.items(), key=lambda item: item[0] in aliases):
        if key not in settings:
            raise ValueError(f'setting {key} is missing; start from default_config()')
        if not _alike(settings[key], default):
            raise ValueError(f'{key} is {settings[key]!r}; use a value like {default!r}')
        if not _countable(settings[key]):
            raise ValueError(f'{key} is {settings[key]!r}; use integers below 2^32')
        if not _finite(settings[key]):
            raise ValueError(f'{key} is {settings[key]!r}; use finite numbers')


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of the default: text, bool, number, or several of a kind."""
    if isinstance(default, tuple | list):
        kind = type(default[0]) if default else int
        return isinstance(value, tuple | list) and (
            kind in (tuple, list) or all(type(item) is kind for item in value)
        )
    return type(value) in ((float, int) if isinstance(default, float) else (type(default),))


def _countable(value: Any) -> bool:
    """Whether all integers in a value are at most MOST."""
    if isinstance(value, tuple | list):
        return all(map(_countable, value))
    return not isinstance(value, int) or abs(value) <= MOST


def _finite(value: Any) -> bool:
    """Whether no number in a value is NaN or infinite, which JSON and so config.json cannot say."""
    if isinstance(value, tuple | list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_sizes(config: ml_collections.ConfigDict, batching: Batching) -> None:
    """Refuses batches and models that no machine can hold, before anything asks for the memory.

    Raises:
      ValueError: one line that names the settings.
    """
    trained = config.sampling.length, 'sampling.length'
    evaluated = max(config.evaluation.lengths, default=0), 'evaluation.lengths'
    rollout, evaluation = 'rl.prompts x rl.group_size', config.evaluation
    for rows, row_names, (length, length_name) in (
        (batching.rows, rollout, trained),
        (batching.rows * config.corruption.draws, f'{rollout} x corruption.draws', trained),
        (config.base.batch_size, 'base.batch_size', trained),
        (evaluation.batch, 'evaluation.batch', evaluated),
        (
            evaluation.batch * evaluation.samples,
            'evaluation.batch x evaluation.samples',
            evaluated,
        ),
    ):
        tokens = rows * (config.sampling.prompt_length + length)
        if tokens > MOST_TOKENS:
            raise ValueError(
                f'{row_names} is {rows} rows, {tokens} tokens with sampling.prompt_length and '
                f'{length_name}; use at most {MOST_TOKENS} tokens'
            )
    model = config.model
    parameters = model.layers * model.width * (4 * model.width + 3 * model.mlp_width)
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f'model.layers, model.width and model.mlp_width make {parameters} parameters; use at '
            f'most {MOST_PARAMETERS}'
        )
    most_rank = MOST_RANK if config.base.checkpoint else max(model.width, model.mlp_width)
    if config.lora.rank > most_rank:
        raise ValueError(
            f'lora.rank is {config.lora.rank}, wider than the model that it adapts; use at most '
            f'{most_rank}'
        )

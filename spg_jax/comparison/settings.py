"""Settings of runs as text, such as 'spg.negative=elbo spg.beta=2', as on a command line."""

import ast
import functools
import re
import shlex
from collections.abc import Mapping
from typing import Any

import ml_collections

from spg_jax.config import default_config
from spg_jax.method import SPG, complete, names

# What all arms of a task share, and what the comparison sets by itself. An arm cannot change it.
SHARED_GROUPS = ('task', 'data', 'base', 'model', 'mesh', 'evaluation', 'checkpoint')
SHARED_SETTINGS = (
    *('rl.prompts', 'rl.group_size', 'sampling.prompt_length', 'sampling.length'),
    *('train.steps', 'train.seed', 'train.wandb', 'optimizer.learning_rate'),
)


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
def groups() -> frozenset[str]:
    """The groups of settings that every method has."""
    return frozenset(default_config()) - {SPG}

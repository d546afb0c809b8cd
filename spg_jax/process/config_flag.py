"""The flag --config: the name or the path of a configuration, a preset, and single settings."""

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from spg_jax.errors import line_in
from spg_jax.process.files import local_path

# `configs/` of a checkout; a wheel has the same files as `spg_jax/configs/` (setup.py).
_PACKAGE = Path(__file__).parents[1]
CONFIGS = next(
    (folder for folder in (_PACKAGE / 'configs', _PACKAGE.parent / 'configs') if folder.is_dir()),
    _PACKAGE / 'configs',
)


# (configuration of the file, values on the command line by GROUP.KEY) -> settings that it changed.
# It is `spg_jax.method.complete`, which this room may not import.
Complete = Callable[[ml_collections.ConfigDict, Mapping[str, str]], frozenset[str]]


class UnusableConfig(Exception):
    """A configuration file that cannot be used; the message is one line that names the file.

    It is no ValueError, because absl would put its own words around the message.
    """


class _ConfigParser(flags.ArgumentParser):
    """Reads the value of --config: the name or the path of a configuration, and a preset of it."""

    def __init__(self, complete: Complete | None = None):
        super().__init__()
        self._complete = complete
        self.completed: frozenset[str] = frozenset()  # settings that `complete` changed last

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        """Runs the file, locks what its `get_config` returns, and completes it."""
        config = read_config(argument)
        if self._complete:
            arguments = flags.FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=False)
            try:
                self.completed = self._complete(config, assigned(arguments))
            except ValueError as error:
                raise UnusableConfig(str(error)) from error
        return config


def read_config(argument: str) -> ml_collections.ConfigDict:
    """What the file of a configuration returns, locked.

    Args:
      argument: the name or the path of a configuration, and perhaps a colon and a preset.

    Raises:
      UnusableConfig: there is no such file, or it fails or returns something else.
    """
    # The colon in an address such as gs://bucket/own.py does not part a preset from a name.
    name, *preset = re.split(':(?!//)', argument, maxsplit=1)
    path = config_file(name)
    loader = SourceFileLoader('config', str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
        config = module.get_config(*preset)
    except Exception as error:
        if os.environ.get('SPG_JAX_TRACEBACK'):
            traceback.print_exc()
        raise UnusableConfig(_place_and_cause(path, error)) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UnusableConfig(
            f'{path}: get_config returned {type(config).__name__}, expected a ConfigDict; '
            'start from default_config() and return it'
        )
    config.lock()
    return config


def assigned(arguments: Iterable[str]) -> dict[str, str]:
    """The values that a command line gives to single settings, by GROUP.KEY; the last one counts.

    The value of a switch, --config.GROUP.KEY or --noconfig.GROUP.KEY, is the word after it.
    """
    words, values = [*arguments, ''], {}
    for word, following in zip(words, words[1:], strict=False):
        if word == '--':
            break
        if match := re.fullmatch(r'--?(?:no)?config\.([^=]+)(?:=(.*))?', word, re.DOTALL):
            values[match[1]] = following if match[2] is None else match[2]
    return values


def config_file(name: str) -> Path:
    """The file of a configuration, which is named by its path or by the name of a task.

    Raises:
      UnusableConfig: if there is no such file.
    """
    shipped = {path.stem: path for path in sorted(CONFIGS.glob('*.py'))}
    if name in shipped:
        return shipped[name]
    try:
        path = local_path(name)
    except ValueError as error:
        raise UnusableConfig(str(error)) from None
    if not path.is_file():
        raise UnusableConfig(
            f'no configuration {name!r}; use one of {", ".join(shipped)}, or the path of a file'
        )
    return path


def _place_and_cause(path: Path, error: Exception) -> str:
    """Where and why a configuration file failed, in one line."""
    if isinstance(error, SyntaxError):
        return f'{path}:{error.lineno or 1}: {error.msg}'
    message = ' '.join(str(error).split())
    if isinstance(error, ValueError) and path.name in message:
        return message  # The file itself says what is wrong with the preset.
    # ml_collections lists all fields between the key and the one that was probably meant.
    unknown = re.search(r'Key "(\w+)" does not exist', message)
    meant = re.search(r'Did you mean "(\w+)"', message)
    if unknown:
        message = f'no setting {unknown[1]!r}' + (f'; use {meant[1]}' if meant else '')
    elif not isinstance(error, ValueError):
        message = f'{type(error).__name__}: {message}'
    return f'{path}:{line_in(path, error)}: {message}'


def define_config_flag(complete: Complete, required: bool = True) -> None:
    """Defines --config, which configures a training, or says how to use a --checkpoint.

    Args:
      complete: completes the configuration of a file before single settings are overridden, and
        refuses overrides of settings that do not exist.
      required: whether the flag has to be given.
    """
    config_flags.DEFINE_config_file(
        'config',
        None,
        'TASK[:PRESET] or FILE.py[:PRESET]; --config.GROUP.KEY=VALUE overrides.',
        flag_values=flags.FLAGS,
    )
    flags.FLAGS['config'].parser = _ConfigParser(complete)
    if required:
        flags.mark_flag_as_required('config', flags.FLAGS)
    # So that --help lists the flag.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS['config'])


class Sources(NamedTuple):
    """Where the values of the configuration of --config come from."""

    file: str  # the value of --config
    completed: frozenset[str]  # settings that `complete` changed
    overridden: frozenset[str]  # settings that the command line names


def sources() -> Sources:
    """Where the values of the configuration of --config come from, once flags are parsed."""
    flag = flags.FLAGS['config']
    return Sources(flag.config_filename, flag.parser.completed, frozenset(flag.override_values))


def explained(error: Exception, arguments: Sequence[str]) -> str:
    """Why flags cannot be used, in one line.

    Args:
      error: what absl raised.
      arguments: the command line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[-1] if lines else str(error)
    if missing := re.search(r'Flag --([\w.]+) must have a value', message):
        before = ['', *arguments[1:]]
        for word, last in zip(arguments[1:], before, strict=False):
            if not word.startswith('-') and not re.match('-[^=]*$', last):
                return left_over(word)
        what = flags.FLAGS[missing[1]].help.rstrip('.')
        return f'--{missing[1]} is not given: {what}; see --help'
    name = getattr(error, 'flagname', None) or ''
    if name.startswith('config.') and 'config' in flags.FLAGS:
        remedy = 'use --config=TASK[:PRESET] as well'
        if 'checkpoint' in flags.FLAGS:
            remedy = 'use --checkpoint=DIR/best --config=TASK[:PRESET] in place of --workdir=DIR'
        return f'--{name} changes a setting of --config, which is not given; {remedy}'
    setting = re.match(r'flag --config\.([\w.]+)=(.*?): ', str(error), re.DOTALL)
    if not setting:
        return f'{message}; see --help'
    usual = flags.FLAGS['config'].value
    for part in setting[1].split('.'):
        usual = usual[part]
    if isinstance(usual, ml_collections.ConfigDict):
        return f'{setting[1]} is a group of settings; use --config.{setting[1]}.KEY=VALUE'
    return f'{setting[1]} is {setting[2]!r}; use a value like {usual!r}'


def left_over(word: str) -> str:
    """Why a word that is no flag is refused, and the flag that was probably meant."""
    name = word.partition(':')[0]
    if 'config' in flags.FLAGS and (name.endswith('.py') or (CONFIGS / f'{name}.py').is_file()):
        return f'{word!r} is no flag; use --config={word}, or see --help'
    bare = word.lstrip('-\u2010\u2011\u2012\u2013\u2014\u2212')  # what editors make of dashes
    name = bare.partition('=')[0]
    meant = f'--{bare}'
    if name.partition('.')[0] not in flags.FLAGS:
        is_setting = '.' in name and '=' in bare
        meant = f'--config.{bare}' if is_setting else '--NAME=VALUE'
    return f'{word!r} is no flag; use {meant}, or see --help'

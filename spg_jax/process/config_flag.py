"""The flag --config: the name or the path of a configuration, a preset, and single settings."""

import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from spg_jax.process.files import local_path

# `configs/` of a checkout; a wheel has the same files as `spg_jax/configs/` (setup.py).
_PACKAGE = Path(__file__).parents[1]
CONFIGS = next(
    (folder for folder in (_PACKAGE / 'configs', _PACKAGE.parent / 'configs') if folder.is_dir()),
    _PACKAGE / 'configs',
)


class UnusableConfig(Exception):
    """A configuration file that cannot be used; the message is one line that names the file.

    It is no ValueError, because absl would put its own words around the message.
    """


class _ConfigParser(flags.ArgumentParser):
    """Reads the value of --config: the name or the path of a configuration, and a preset of it."""

    config: ml_collections.ConfigDict | None = None  # the one that was read last

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        """Runs the file and locks what its `get_config` returns."""
        # The colon in an address such as gs://bucket/own.py does not part a preset from a name.
        name, *preset = re.split(':(?!//)', argument, maxsplit=1)
        path = config_file(name)
        loader = SourceFileLoader('config', str(path))
        module = importlib.util.module_from_spec(
            importlib.util.spec_from_loader(loader.name, loader)
        )
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
        self.config = config.lock()
        return self.config


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
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    # ml_collections lists all fields between the key and the one that was probably meant.
    unknown = re.search(r'Key "(\w+)" does not exist', message)
    meant = re.search(r'Did you mean "(\w+)"', message)
    if unknown:
        message = f'no setting {unknown[1]!r}' + (f'; use {meant[1]}' if meant else '')
    elif not isinstance(error, ValueError):
        message = f'{type(error).__name__}: {message}'
    return f'{path}:{lines[-1] if lines else 1}: {message}'


def define_config_flag(required: bool = True) -> None:
    """Defines --config, which configures a training, or says how to use a --checkpoint."""
    config_flags.DEFINE_config_file(
        'config', None, 'TASK[:PRESET] or FILE.py[:PRESET]; --config.GROUP.KEY=VALUE overrides.'
    )
    flags.FLAGS['config'].parser = _ConfigParser()
    if required:
        flags.mark_flag_as_required('config')
    # So that --help lists the flag.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS['config'])


def unknown_setting(arguments: list[str]) -> str | None:
    """Which flag names a setting that the configuration does not have, and the nearest that is."""
    parser = flags.FLAGS['config'].parser
    settings = list(_settings(parser.config or {}))
    for argument in arguments:
        key = re.match(r'--?(?:no)?config\.([^=]+)', argument)
        if key and key[1] not in settings:
            nearest = difflib.get_close_matches(key[1], settings, 1)
            advice = f'use {nearest[0]}, or see' if nearest else 'see'
            return f'no setting {key[1]} in the configuration; {advice} spg_jax/config.py'
    return None


def _settings(config: Mapping, prefix: str = '') -> Iterator[str]:
    """The names GROUP and GROUP.KEY of a configuration."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ml_collections.ConfigDict):
            yield from _settings(value, f'{prefix}{name}.')


def left_over(word: str) -> str:
    """Why a word that is no flag is refused, and the flag that was probably meant."""
    bare = word.lstrip('-\u2010\u2011\u2012\u2013\u2014\u2212')  # what editors make of dashes
    name = bare.partition('=')[0]
    meant = f'--{bare}'
    if name.partition('.')[0] not in flags.FLAGS:
        is_setting = '.' in name and '=' in bare
        meant = f'--config.{bare}' if is_setting else '--NAME=VALUE'
    return f'{word!r} is no flag; use {meant}, or see --help'

"""The directory of a training: its name, its configuration and its policy."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_collections

from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.process.json_files import check_json, read_json
from spg_jax.rl.objectives import group_of
from spg_jax.runs import policies
from spg_jax.runs.identity import FILES, Settings, digest_files

CONFIG = 'config.json'
RESTORE = 'restore the file, or use another --workdir'


def digest(settings: ml_collections.ConfigDict | Settings) -> str:
    """A hash of settings in ten hexadecimal digits; equal settings have equal digits."""
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def default_workdir(config: ml_collections.ConfigDict) -> Path:
    """runs/TASK-OBJECTIVE-HASH, where the hash is that of all settings."""
    objective = group_of(config.rl.objective)
    return Path('runs') / f'{config.task.name}-{objective}-{digest(config)}'


def identity(config: ml_collections.ConfigDict) -> Settings:
    """Every setting of a training, and the digests of the files that they name."""
    settings = config.to_dict()
    del settings['convert']  # A conversion is another training, which names its own settings.
    return settings | {FILES: digest_files(config, policy_of_run)}


def run_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of a run, or of the run that trained a policy.

    Raises:
      FileNotFoundError: if the directory holds no configuration.
      ValueError: if the configuration is damaged or is that of a published checkpoint.
    """
    if policies.is_policy(workdir):
        notes = policies.policy_notes(workdir)
        if 'config' in notes:
            return _saved_config(notes['config'], workdir / policies.DESCRIPTION)
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist; give the --workdir of a spg_jax.train run, or a base policy'
        )
    return _saved_config(read_json(path, dict[str, Any], RESTORE), path)


def _saved_config(saved: Any, path: Path) -> ml_collections.ConfigDict:
    """A saved configuration; settings that did not exist when it was saved have their defaults.

    Settings of SPG that were saved before it had a group of its own are read from the group rl.

    Raises:
      ValueError: if it is none, a setting is of another type than its default, or the file of its
        objective cannot be imported.
    """
    if isinstance(saved, dict) and 'task' not in saved:
        raise ValueError(
            f'{path} is not the configuration of a run; for a published checkpoint give '
            f'--checkpoint={path.parent} and --config=configs/TASK.py:PRESET instead of --workdir'
        )
    saved = check_json(saved, Settings, path, RESTORE)
    objective = saved.get('rl', {}).get('objective', default_config().rl.objective)
    if not isinstance(objective, str):
        raise ValueError(f'{path}: rl.objective is {objective!r}, expected str; {RESTORE}')
    try:
        config = default_config(objective)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    for group, settings in config.items():
        for key in settings.keys() & saved.get(group, {}).keys():
            _set(config, group, key, saved[group][key], path)
    return config


def _set(config: ml_collections.ConfigDict, group: str, key: str, value: Any, path: Path) -> None:
    """Sets a setting to a value of the same type; raises ValueError for another one."""
    default = config[group][key]
    try:
        # ml_collections refuses all other values of another type, but takes these for numbers.
        if isinstance(value, bool | None) and type(value) is not type(default):
            raise TypeError
        config[group][key] = value
    except TypeError:
        raise ValueError(
            f'{path}: {group}.{key} is {value!r}, expected {type(default).__name__}; {RESTORE}'
        ) from None


def chosen_policy(
    workdir: str, checkpoint: str, adapter: str, config: ml_collections.ConfigDict | None
) -> tuple[ml_collections.ConfigDict, Path, Path | None]:
    """The policy that the flags of an entry point name, and the configuration to use it with.

    Args:
      workdir: a run, or a policy trained here, which brings its configuration; or ''.
      checkpoint: any policy or published checkpoint, to be used with `config`; or ''.
      adapter: an adapter that PEFT saved, to add to the checkpoint; or ''.
      config: the configuration of --config; None without that flag.

    Returns:
      (configuration, directory of the policy, adapter to add to it or None).

    Raises:
      ValueError, FileNotFoundError: if not exactly one of `workdir` and `checkpoint` is given, or
        the directory cannot be used.
    """
    if bool(workdir) == bool(checkpoint):
        raise ValueError(
            f'{"both" if workdir else "neither"} of --workdir and --checkpoint given; use '
            '--workdir=DIR of a run, or --checkpoint=DIR with --config=configs/TASK.py:PRESET'
        )
    for flag, value in (('--config', config), ('--adapter', adapter)):
        if workdir and value:
            raise ValueError(f'{flag} given with --workdir, which has its own; leave {flag} out')
    if workdir:
        config = run_config(Path(workdir))
        try:
            assemble(config)
        except ValueError as error:
            raise ValueError(f'the settings of {workdir}: {error}') from error
        return config, policy_of_run(Path(workdir)), None
    if config is None:
        raise ValueError(
            '--checkpoint given without --config; add --config=configs/TASK.py:PRESET, which says '
            'how to ask, decode and score'
        )
    assemble(config)
    return config, policy_of_run(Path(checkpoint)), Path(adapter) if adapter else None


def policy_of_run(workdir: Path) -> Path:
    """The best policy that a run has saved so far; `workdir` itself if it is not a run.

    Raises:
      FileNotFoundError: if the run has not saved a policy yet.
    """
    best = workdir / 'best'
    if policies.is_policy(best):
        return best
    if (workdir / 'checkpoints').is_dir():
        if (workdir / 'result.json').exists():
            raise FileNotFoundError(f'{best} is gone, the policy of a finished run; restore it')
        raise FileNotFoundError(f'{best} does not exist yet; wait for the first validation')
    return workdir

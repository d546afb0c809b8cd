"""A training's directory: whose it is, its configuration, its policy."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from spg_jax.config import default_config, digest
from spg_jax.process import distributed
from spg_jax.runs import policies
from spg_jax.validation import validate

CONFIG = 'config.json'


def run_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration that made a run, or a policy that was trained here.

    Raises:
      FileNotFoundError, ValueError: no run there, or a damaged one.
    """
    if policies.is_policy(workdir):
        notes = policies.policy_notes(workdir)
        if 'config' in notes:
            return _complete(notes['config'], workdir / policies.DESCRIPTION)
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist; give the --workdir of a spg_jax.train run, or a base policy'
        )
    return _complete(_read(path), path)


def _complete(found: dict[str, Any], path: Path) -> ml_collections.ConfigDict:
    """A configuration as it was saved, with the defaults of settings that are newer than it."""
    if 'task' not in found:
        raise ValueError(
            f'{path} is not the configuration of a run; for a published checkpoint give '
            f'--checkpoint={path.parent} and --config=configs/TASK.py:PRESET instead of --workdir'
        )
    defaults = default_config().to_dict()
    return ml_collections.ConfigDict(
        {group: leaves | found.get(group, {}) for group, leaves in defaults.items()}
    )


def chosen_policy(
    workdir: str, checkpoint: str, adapter: str, config: ml_collections.ConfigDict | None
) -> tuple[ml_collections.ConfigDict, Path, Path | None]:
    """What the flags of an entry point name: a configuration, and a policy and an adapter to use
    with it.

    Args:
      workdir: a run or a policy trained here, used with its own configuration; or ''.
      checkpoint: any policy or published checkpoint, used with `config`; or ''.
      adapter: what PEFT saved, to add to the checkpoint; or ''.
      config: of --config, or None.

    Raises:
      ValueError, FileNotFoundError: both or neither are given, or what is named cannot be used.
    """
    if bool(workdir) == bool(checkpoint):
        raise ValueError(
            f'{"both" if workdir else "neither"} of --workdir and --checkpoint given; use '
            '--workdir=DIR of a run, or --checkpoint=DIR with --config=configs/TASK.py:PRESET'
        )
    for flag, given in (('--config', config), ('--adapter', adapter)):
        if workdir and given:
            raise ValueError(f'{flag} given with --workdir, which has its own; leave {flag} out')
    if workdir:
        return run_config(Path(workdir)), policy_of_run(Path(workdir)), None
    if config is None:
        raise ValueError(
            '--checkpoint given without --config; add --config=configs/TASK.py:PRESET, which says '
            'how to ask, decode and score'
        )
    validate(config)
    return config, policy_of_run(Path(checkpoint)), Path(adapter) if adapter else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{path} is not JSON ({error}); use another --workdir, or delete {path.parent}'
        ) from error


def policy_of_run(workdir: Path) -> Path:
    """The best policy of a run so far, or else `workdir` itself, for `load_policy` to look at.

    Raises:
      FileNotFoundError: the run has not saved a policy yet.
    """
    best = workdir / 'best'
    if policies.is_policy(best):
        return best
    if (workdir / 'checkpoints').is_dir():
        raise FileNotFoundError(f'{best} does not exist yet; wait for the first validation')
    return workdir


@contextlib.contextmanager
def claimed(
    workdir: Path, settings: dict[str, dict[str, Any]], finished: bool = False
) -> Iterator[None]:
    """Makes `workdir` the place of a training with these settings, alone in it while entered.

    Settings that never got as far as a checkpoint are forgotten, so that a mistake in them can be
    mended in the same place.

    Args:
      workdir: made if need be.
      settings: group -> name -> JSON value.
      finished: whether what was trained here is there already, so that no checkpoint is needed for
        its settings to hold.

    Raises:
      ValueError: it holds a training with other settings; names the first that differs.
      BlockingIOError: another process is at work in it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG
    mine = json.loads(json.dumps(settings))
    if not distributed.is_leader():  # one lock for all processes of the training
        distributed.barrier(f'claimed {workdir}')
        yield
        return
    with (workdir / 'lock').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f'another process is training in {workdir}; wait for it, or use another directory'
            ) from None
        if path.is_file() and (finished or _has_checkpoint(workdir)):
            _check_same(workdir, _read(path), mine)
        else:
            new = path.with_suffix('.new')
            new.write_text(json.dumps(mine, indent=1))
            new.rename(path)
        distributed.barrier(f'claimed {workdir}')
        yield


def _has_checkpoint(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / 'checkpoints').glob('*'))


def _check_same(
    workdir: Path, theirs: dict[str, dict[str, Any]], mine: dict[str, dict[str, Any]]
) -> None:
    for group in mine:
        for key, value in mine[group].items():
            other = theirs.get(group, {}).get(key)
            if other != value:
                raise ValueError(
                    f'{workdir} holds a training with {group}.{key} {other!r}, asked for '
                    f'{value!r}; use another --workdir, or the settings in its {CONFIG}'
                )


def default_workdir(config: ml_collections.ConfigDict) -> Path:
    """runs/TASK-OBJECTIVE-HASH, the hash naming every setting."""
    return Path('runs') / f'{config.task.name}-{config.rl.objective}-{digest(config)}'

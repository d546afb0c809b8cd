"""A run's directory: whose it is, its configuration, its policy."""

import json
from pathlib import Path

import ml_collections

from spg_jax import checkpoints
from spg_jax.config import digest


def run_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration a run was made with.

    Raises:
      FileNotFoundError, ValueError: no run there, or a damaged one.
    """
    path = workdir / 'config.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; give the --workdir of a spg_jax.train run')
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is not JSON ({error}); run spg_jax.train again in a new directory') from error


def policy_of_run(workdir: Path) -> Path:
    """The best policy of a run; before its first validation, the base it starts from."""
    best = workdir / 'best'
    if checkpoints.is_policy(best):
        return best
    raise FileNotFoundError(f'{workdir} has no best/ policy yet; wait for its first validation')


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Makes `workdir` this run's, or checks that it is.

    Raises:
      ValueError: it holds a run of another configuration; names the first setting that differs.
    """
    path = workdir / 'config.json'
    mine = json.loads(config.to_json())
    if not path.is_file():
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=1))
        return
    theirs = json.loads(path.read_text())
    for group in mine:
        for key, value in mine[group].items():
            other = theirs.get(group, {}).get(key)
            if other != value:
                raise ValueError(
                    f'{workdir} holds a run with {group}.{key} {other!r}, asked for {value!r}; '
                    'use another --workdir, or the settings in its config.json'
                )


def default_workdir(config: ml_collections.ConfigDict) -> Path:
    """runs/TASK-OBJECTIVE-HASH, the hash naming every setting."""
    return Path('runs') / f'{config.task.name}-{config.rl.objective}-{digest(config)}'

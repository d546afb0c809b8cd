"""Logging to Weights & Biases (extra 'wandb'), which is asked before any work is done."""

import os
from pathlib import Path
from typing import Any

from spg_jax.errors import one_line
from spg_jax.process import distributed

OFFLINE = ('offline', 'disabled', 'dryrun')  # modes of wandb that need no key


def check_wandb(project: str) -> None:
    """Refuses a project that nobody is logged in for, in the process that would log to it.

    Raises:
      ValueError: there is no key; the message says how to log in or go offline.
    """
    if not distributed.is_leader():
        return
    import wandb

    # The settings hold the variables of the environment and what `wandb offline` has written.
    settings = wandb.setup().settings
    if settings.mode not in OFFLINE and not _has_key(settings):
        raise ValueError(
            f'train.wandb is {project!r}, but there is no key of Weights & Biases; run '
            '`wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline'
        )


def _has_key(settings: Any) -> bool:
    """Whether `wandb` would find a key, in its settings, the environment or the file .netrc.

    Raises:
      ValueError: the key in .netrc is of another form.
    """
    import wandb

    variables = ('WANDB_API_KEY', 'WANDB_IDENTITY_TOKEN_FILE')
    if settings.api_key or any(map(os.environ.get, variables)):
        return True
    try:
        from wandb.sdk.lib.wbauth import read_netrc_auth
    except ImportError:  # in versions that do not warn of `wandb.api` yet
        return bool(wandb.api.api_key)
    try:
        return bool(read_netrc_auth(host=settings.base_url))
    except wandb.errors.CommError as error:
        raise ValueError(
            f'the key of Weights & Biases in .netrc cannot be used ({one_line(error)}); run '
            '`wandb login` again'
        ) from error


def open_wandb(project: str, directory: Path, run_id: str, settings: dict[str, Any]) -> Any:
    """The wandb run of a training, which goes on under the same id when the training does.

    Without a network the run is kept offline, and a line says so.

    Args:
      project: of Weights & Biases.
      directory: of the training; its name is that of the run.
      run_id: from the record of the training, so that a new training never continues an old one.
      settings: every setting of the training.
    """
    import wandb

    options = dict(
        project=project, dir=str(directory), id=run_id, name=directory.name, config=settings
    )
    try:
        return wandb.init(**options, resume='allow')
    except (wandb.errors.CommError, wandb.errors.UsageError, OSError) as error:
        reason = ' '.join(str(error).split())[:200]
        print(f'wandb: offline, since it cannot be reached ({reason})', flush=True)
        return wandb.init(**options, mode='offline')

"""Logging to Weights & Biases (extra 'wandb'), which is asked before any work is done."""

import os
from pathlib import Path
from typing import Any

OFFLINE = ('offline', 'disabled', 'dryrun')  # values of WANDB_MODE that need no key


def check_wandb(project: str) -> None:
    """Refuses a project that nobody is logged in for.

    Raises:
      ValueError: there is no key; the message says how to log in or go offline.
    """
    import wandb

    if os.environ.get('WANDB_MODE') not in OFFLINE and not wandb.api.api_key:
        raise ValueError(
            f'train.wandb is {project!r}, but there is no key of Weights & Biases; run '
            '`wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline'
        )


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

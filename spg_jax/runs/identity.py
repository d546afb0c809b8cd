"""What makes two trainings the same: settings that change what is learned, and files they name."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from spg_jax.assembly import assemble
from spg_jax.config import default_config
from spg_jax.diffusion import samplers
from spg_jax.method import SPG
from spg_jax.rl.objectives import group_of, source_file
from spg_jax.runs import policies
from spg_jax.tasks.task import Task

Settings = dict[str, dict[str, Any]]  # group -> name -> JSON value

# Settings that change how a training computes and what it keeps, and not what it learns. A training
# may go on with other values of them, for example on another machine. Of a recipe the values count.
FREE = frozenset(
    {
        *('mesh.data', 'mesh.fsdp', 'mesh.tensor'),
        *('rl.microbatch', 'rl.generation_batch', 'rl.draws_per_pass', 'evaluation.batch'),
        *('rl.compact', 'evaluation.compact'),
        *('model.remat', 'model.scan_unroll', 'model.attention'),
        *('sampling.prompt_buckets', 'task.data_dir', 'base.cache'),
        *('checkpoint.every', 'checkpoint.keep', 'train.wandb', 'train.max_skipped'),
        *('rl.recipe', 'sampling.preset'),
        'train.diagnose_every',
        'train.profile',
    }
)
# A training may be made longer, and not shorter; one that collapsed may be allowed to go back.
GROWING = frozenset({'train.steps', 'guard.rollbacks'})
FILES = 'files'  # the group in which the digests of files are compared
# Groups that some trainings did not save at first; what these had in place of them is not known.
LATER = (FILES, 'evaluation')

WHOLE = 64 * 2**20  # bytes up to which a file is digested as a whole
SAMPLE, SAMPLES = 2**20, 64  # bytes of a part of a larger file, and how many of them are digested


def changed_settings(
    workdir: Path, saved: Settings, wanted: Settings, config_name: str
) -> list[str]:
    """The settings in which a training differs from its saved ones, in words.

    A setting that is missing from the saved or the wanted ones has its default. The path of a file
    or directory may differ, if the contents are the same.

    Raises:
      ValueError: a setting differs that changes what is learned; the message names the first.
    """
    changes = []
    objective = _objective(wanted)
    defaults = json.loads(default_config(objective).to_json())
    saved = _with_group(saved, group_of(objective))
    saved_files, wanted_files = saved.get(FILES, {}), wanted.get(FILES, {})
    keys = [(group, name) for group in wanted for name in wanted[group]]
    # A training leaves out settings that it does not read, which the saved one may have read.
    keys += [
        (group, name)
        for group in wanted
        for name in saved.get(group, {})
        if name not in wanted[group]
        and name in defaults.get(group, {})
        and f'{group}.{name}' not in FREE
    ]
    # These are the causes of other differences.
    keys.sort(key=lambda key: key not in (('rl', 'objective'), ('task', 'name')))
    for group, name in keys:
        if group in LATER and group not in saved:
            continue
        if group == 'rl' and objective == SPG and name in wanted.get(SPG, {}):
            continue  # another name of the same setting
        key, default = f'{group}.{name}', defaults.get(group, {}).get(name)
        value, old = (settings.get(group, {}).get(name, default) for settings in (wanted, saved))
        if old == value or (group == FILES and old is None):  # fetched since the start
            continue
        has_moved = bool(saved_files.get(key)) and saved_files[key] == wanted_files.get(key)
        grows = key in GROWING and old is not None and value > old
        if key not in FREE and not has_moved and not grows:
            what = f'another {name}' if group == FILES else f'{key} {old!r}'
            asked = '' if group == FILES else f', asked for {value!r}'
            raise ValueError(
                f'{workdir} holds a training with {what}{asked}; use another --workdir, or '
                f'the settings in its {config_name}'
            )
        changes.append(f'{key} {value} instead of {old}')
    return changes


def _objective(settings: Settings) -> str:
    return settings.get('rl', {}).get('objective', SPG)


def _with_group(saved: Settings, group: str) -> Settings:
    """Saved settings, in which those of the objective have the group that they have now.

    Settings of SPG were in the group rl first, and a user's own file may have another name now.
    """
    before = group_of(_objective(saved))
    return saved | {group: saved.get(before, saved.get('rl', {}) if before == SPG else {})}


def digest_files(
    config: ml_collections.ConfigDict, policy_at: Callable[[Path], Path]
) -> dict[str, str]:
    """A digest of each file or directory that the settings name, by the name of the setting.

    Args:
      config: of a training.
      policy_at: finds the directory of a policy in that of a run.
    """
    digests = {}
    if file := source_file(config.rl.objective):
        digests['rl.objective'] = digest_path(file)
    rules = {
        'sampling.sampler': config.sampling.sampler or config.sampling.commit,
        'evaluation.sampler': config.evaluation.sampler,
    }
    for key, rule in rules.items():
        if rule and (file := samplers.source_file(rule, key)):
            digests[key] = digest_path(file)
    if config.task.prompt_template:
        digests['task.prompt_template'] = digest_path(Path(config.task.prompt_template))
    if config.base.checkpoint:
        digests |= digest_start(policy_at(Path(config.base.checkpoint)))
    task = assemble(config).task
    digests |= digest_task(task)
    for file in task.given_files(Path(config.task.data_dir)):
        digests[f'{file.name} in task.data_dir'] = digest_path(file)
    if config.lora.adapter:
        digests['lora.adapter'] = digest_path(Path(config.lora.adapter))
    return digests


def digest_start(directory: Path) -> dict[str, str]:
    """A digest of the policy that a training starts from, and one of the policy that it adapts."""
    digests = {'base.checkpoint': digest_path(directory)}
    if policies.is_policy(directory) and policies.base_of(directory) != directory:
        digests['base of base.checkpoint'] = digest_path(policies.base_of(directory))
    return digests


def digest_task(task: Task) -> dict[str, str]:
    """A digest of each file of the user that defines a task; {} if the task is the package's."""
    return {
        f'{name} of task.name': digest_path(path) for name, path in task.defining_files().items()
    }


def digest_path(path: Path) -> str:
    """A digest of a file, or of all files in a directory, that changes with their contents.

    Of files above WHOLE bytes it reads SAMPLES parts, the first and the last among them, because
    reading the weights of a large model takes minutes. '' if there is nothing.
    """
    digest = hashlib.sha256()
    files = sorted(path.rglob('*')) if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    for file in files:
        size = file.stat().st_size
        digest.update(f'{file.relative_to(path) if file != path else ""} {size}\n'.encode())
        with file.open('rb') as opened:
            if size <= WHOLE:
                digest.update(opened.read())
                continue
            for number in range(SAMPLES):
                opened.seek((size - SAMPLE) * number // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest() if files else ''

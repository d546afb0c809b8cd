"""Figures of the base policy: measured once, and kept beside it for later runs that start from it.

A file of figures says what they depend on: the parameters, bit for bit, the problems, the task, how
completions are decoded and scored, this package's files, the libraries and the machine. Figures are
believed only if all of that is the same and the file is whole; otherwise they are measured again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import jaxlib
from jax.sharding import Mesh

from spg_jax.data.tokenizers import Tokenizer
from spg_jax.diffusion.samplers import source_file
from spg_jax.models.policy import Policy, Variables
from spg_jax.process import distributed
from spg_jax.process.files import write_whole
from spg_jax.process.json_files import read_json
from spg_jax.rl.evaluator import Evaluation, Figures
from spg_jax.tasks.task import Example, Task
from spg_jax.training.digests import digest_arrays

SUFFIX = '.figures'  # ends the name of the folder beside the directory of a base policy
Identity = dict[str, Any]  # JSON values


class BaseFigures(TypedDict):
    """The figures with which a run starts."""

    report: Figures  # of `Evaluator.report` on the test problems
    validation: Figures  # of `Evaluator.validate` on the validation problems


class _File(TypedDict):
    identity: Identity
    figures: BaseFigures
    digest: str  # of the two above


def base_figures(
    base: Path, identity: Identity | None, measure: Callable[[], BaseFigures]
) -> BaseFigures:
    """The figures of a base policy, from the file beside it or else measured and written there.

    Every process has to call this function.

    Args:
      base: the directory of the base policy.
      identity: what the figures depend on; None measures them and keeps nothing.
      measure: measures them.
    """
    if identity is None:
        return measure()
    base = base.absolute()
    path = base.with_name(base.name + SUFFIX) / f'{_digest(identity)[:16]}.json'
    figures = _read(path, identity)
    if distributed.largest(int(figures is None)):  # all processes measure, or none does
        figures = measure()
        if distributed.is_leader():
            _write(path, identity, figures)
    assert figures is not None
    return figures


def identity_of(
    policy: Policy,
    variables: Variables,
    task: Task,
    tokenizer: Tokenizer,
    evaluation: Evaluation,
    problems: Sequence[Sequence[Example]],
    mesh: Mesh,
) -> Identity | None:
    """Everything that the figures of a policy depend on.

    Returns:
      JSON values. None for a task or a sampler in a file of the user, because that file may import
      others, whose changes nobody would notice, and for a task with settings that are no JSON
      values.
    """
    rules = {decoding.rule_name for decoding in evaluation.decodings}
    if task.defining_files() or any(source_file(rule) for rule in rules):
        return None
    identity = {
        'parameters': digest_arrays(variables),
        'policy': [dataclasses.asdict(policy.config), policy.mask_id, policy.eos_id],
        'allowed': hashlib.sha256(policy.allowed.tobytes()).hexdigest(),
        'tokenizer': tokenizer.identity(),
        'task': [task.name, f'{type(task).__module__}.{type(task).__qualname__}', task.prefill],
        'task_settings': dataclasses.asdict(task),
        'evaluation': dataclasses.asdict(evaluation),
        'problems': [_digest(list(split)) for split in problems],
        'package': package_digest(),
        'libraries': [platform.python_version(), jax.__version__, jaxlib.__version__],
        'machine': _machine(mesh),
    }
    try:
        return json.loads(json.dumps(identity))  # as it will be read back, with lists for tuples
    except TypeError:
        return None


def _machine(mesh: Mesh) -> list[Any]:
    """What may change the last bits of a result, and with them the choice between two tokens."""
    devices = sorted({device.device_kind for device in mesh.devices.flat})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return [
        [mesh.devices.flat[0].platform, devices, list(mesh.shape.items()), jax.process_count()],
        [platform.machine(), _processor(), cores, os.environ.get('XLA_FLAGS', '')],
    ]


def _processor() -> list[str]:
    """Model and instruction sets of the processor, as far as Linux tells them."""
    with contextlib.suppress(OSError):
        lines = Path('/proc/cpuinfo').read_text(errors='replace').splitlines()
        return sorted({line for line in lines if line.startswith(('model name', 'flags'))})
    return [platform.processor()]


@functools.cache
def package_digest() -> str:
    """A digest of the files that make up this package, whose code decodes, samples and scores."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(folder.rglob('*')):
        if file.suffix in ('.py', '.txt', '.json'):
            digest.update(f'{file.relative_to(folder)}\n'.encode() + file.read_bytes())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path, identity: Identity) -> BaseFigures | None:
    """The figures in a file; None if it is not there, not whole or for something else."""
    with contextlib.suppress(OSError, ValueError):
        kept = read_json(path, _File, 'remove it')
        content = {'identity': kept['identity'], 'figures': kept['figures']}
        if kept['identity'] == identity and kept['digest'] == _digest(content):
            return kept['figures']
    return None


def _write(path: Path, identity: Identity, figures: BaseFigures) -> None:
    content = {'identity': identity, 'figures': figures}
    with contextlib.suppress(OSError):  # another user's base policy may be read, and not written
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(content | {'digest': _digest(content)}, indent=1))

"""Writes a policy in the layouts that PEFT and transformers read.

    python -m spg_jax.export --workdir=DIR --out=OUT           # adapters, as PEFT saves them
    python -m spg_jax.export --workdir=DIR --out=OUT --merge   # a whole checkpoint

DIR is a run of `spg_jax.train` that started from a published checkpoint, or the policy directory of
such a run. A run that trained every parameter gives a whole checkpoint, with or without --merge.
Adapters that were trained on a quantised base are merged into the checkpoint as it was published.
With --distributed every process of a job runs the command, and each holds a part of the parameters
that --merge reads.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from spg_jax import sharding
from spg_jax.models import weights
from spg_jax.models.lora import COLLECTION
from spg_jax.process import cli, distributed
from spg_jax.runs import policies
from spg_jax.runs.directory import policy_of_run, run_config

FLAGS = flags.FLAGS


def export(directory: Path, source: Path, out: Path, whole: bool) -> None:
    """Writes a policy to `out`. Every process has to call this function; the leader writes.

    Args:
      directory: the policy.
      source: the published checkpoint that the policy started from.
      out: a directory, which must not exist.
      whole: whether adapters are merged into a whole checkpoint or written alone.

    Raises:
      ValueError, FileNotFoundError: if `out` exists, the policy or checkpoint is damaged or cannot
        be read, or a file to copy is a link to another place.
    """
    if out.exists():
        raise ValueError(f'{out} exists; give a new directory as --out')
    # Every process has to see that `out` does not exist before another process creates it.
    distributed.barrier(f'room for {out}')
    adapter = directory / policies.ADAPTER
    if adapter.is_dir() and not whole:
        _refuse_links(directory, [adapter, *adapter.rglob('*')])
        policies.check_saved_adapters(directory)
        if distributed.is_leader():
            shutil.copytree(adapter, out)
        distributed.barrier(f'exported {out}')
        return
    weights.read_config(source / 'config.json')  # Fails early if the checkpoint cannot be used.
    _refuse_links(source, weights.copied_files(source))
    mesh = sharding.make_mesh({'fsdp': -1})
    policy, _, variables = policies.load_policy(directory, mesh)
    weights.save_checkpoint(
        out,
        variables['params'],
        source,
        adapters=variables.get(COLLECTION),
        lora=policy.config.lora,
    )


def source_of(checkpoint: Path) -> Path:
    """The published checkpoint that a run started from, by way of other runs if it did.

    Args:
      checkpoint: base.checkpoint of the run, which may be another run or a policy.

    Returns:
      The checkpoint; without one, the policy that was trained from scratch. A conversion makes a
      model of another kind, and therefore counts as one that was.

    Raises:
      FileNotFoundError, ValueError: a policy on the way is gone or damaged.
    """
    source, passed = policies.base_of(policy_of_run(checkpoint)), []
    while source not in passed and policies.is_policy(source):
        passed.append(source)
        start = run_config(source).base.checkpoint
        if start and 'conversion' not in policies.policy_notes(source):
            source = policies.base_of(policy_of_run(Path(start)))
    return source


def _refuse_links(directory: Path, copied: Iterable[Path]) -> None:
    """Refuses links among the files to copy that lead out of their directory.

    The contents of any file of this machine would be in what is published otherwise.

    The cache of Hugging Face holds a checkpoint as links from `snapshots/` to `blobs/` beside it;
    these lead nowhere else.

    Raises:
      ValueError: names the first such link.
    """
    inside = directory.resolve()
    if inside.parent.name == 'snapshots':
        inside = inside.parent.parent
    for path in copied:
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise ValueError(
                f'{path} is a link to {path.readlink()}, outside {inside}, whose contents would be '
                'copied; remove the link, or replace it by the file that belongs there'
            )


def main(_: list[str]) -> None:
    workdir = Path(FLAGS.workdir)
    checkpoint = run_config(workdir).base.checkpoint
    if not checkpoint:
        raise ValueError(
            f'{workdir} did not start from a published checkpoint, and other programs cannot read '
            f'its model; use {policy_of_run(workdir)} as it is'
        )
    source = source_of(Path(checkpoint))
    export(policy_of_run(workdir), source, Path(FLAGS.out), FLAGS.merge)
    print(f'exported  {FLAGS.out}')


if __name__ == '__main__':
    cli.define_path_flag('workdir', None, 'A run of spg_jax.train, or a policy trained here.')
    cli.define_path_flag('out', None, 'The directory to write, which must not exist.')
    flags.DEFINE_bool('merge', False, 'Write a whole checkpoint, with adapters merged into it.')
    flags.mark_flags_as_required(['workdir', 'out'])
    cli.define_distributed_flag()
    cli.run(main)

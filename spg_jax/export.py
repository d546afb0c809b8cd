"""Writes a policy in the layouts that PEFT and transformers read.

    python -m spg_jax.export --workdir=DIR --out=OUT           # adapters, as PEFT saves them
    python -m spg_jax.export --workdir=DIR --out=OUT --merge   # a whole checkpoint

DIR is a run of `spg_jax.train` that started from a published checkpoint, or a policy directory. A
run that trained every parameter gives a whole checkpoint either way. Adapters trained on a
quantised base are merged into the checkpoint as it was published. With --distributed every process
of a job runs the command, and together they hold the parameters that --merge reads.
"""

import shutil
from pathlib import Path

from absl import flags

from spg_jax import sharding
from spg_jax.models.llada import weights
from spg_jax.models.lora import COLLECTION
from spg_jax.process import cli, distributed
from spg_jax.runs import policies
from spg_jax.runs.directory import policy_of_run, run_config

FLAGS = flags.FLAGS


def export(directory: Path, source: Path, out: Path, whole: bool) -> None:
    """Writes the policy in `directory` to `out`; every process calls this, and the leader writes.

    Args:
      directory: a policy.
      source: the published checkpoint it started from.
      out: must not exist.
      whole: merge adapters into a checkpoint; False writes them alone.

    Raises:
      ValueError, FileNotFoundError: `out` exists, or what is to be read is not there.
    """
    if out.exists():
        raise ValueError(f'{out} exists; give a new directory as --out')
    distributed.barrier(f'room for {out}')  # else one would find what another has begun
    adapter = directory / policies.ADAPTER
    if adapter.is_dir() and not whole:
        if distributed.is_leader():
            shutil.copytree(adapter, out)
        distributed.barrier(f'exported {out}')
        return
    weights.read_config(source / 'config.json')  # says what is wrong before any long work
    mesh = sharding.make_mesh({'fsdp': -1})
    policy, _, variables = policies.load_policy(directory, mesh)
    weights.save_checkpoint(
        out,
        variables['params'],
        source,
        adapters=variables.get(COLLECTION),
        lora=policy.config.lora,
    )


def main(_: list[str]) -> None:
    workdir = Path(FLAGS.workdir)
    given = run_config(workdir).base.checkpoint
    if not given:
        raise ValueError(
            f'{workdir} did not start from a published checkpoint, and others cannot read its '
            f'model; use {policy_of_run(workdir)} as it is'
        )
    source = policies.base_of(Path(given))
    export(policy_of_run(workdir), source, Path(FLAGS.out), FLAGS.merge)
    print(f'exported  {FLAGS.out}')


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'A run of spg_jax.train, or a policy trained here.')
    flags.DEFINE_string('out', None, 'A new directory.')
    flags.DEFINE_bool('merge', False, 'A whole checkpoint, with adapters merged into it.')
    flags.mark_flags_as_required(['workdir', 'out'])
    cli.define_distributed_flag()
    cli.run(main)

"""Answers without the machine whether a run fits it, and how long the run will take.

    python -m spg_jax.plan --config=configs/gsm8k.py:llada_8b_v5e16 --topology=v5e:4x4
    python -m spg_jax.plan --config=configs/gsm8k.py:llada_8b_h100 --topology=h100:1 \\
      --fine_tuning --config.base.batch_size=8 --config.model.quantize=nf4

For a TPU slice (v5e, v5p or v6e with its shape) the command compiles the real rollout, evaluation
and update, on any CPU, in minutes. For GPUs (h100:1, a100:8) it lowers them and estimates their
memory by formula. If the run does not fit, it says what to change and exits with status 1. With
--fine_tuning it plans `spg_jax.pretrain` from the checkpoint, in place of reinforcement learning.
Times count every row to its end. --signal and --length take two metrics of an earlier run, and
count what idle rows and completions that end early are then expected to save.
"""

import json
import sys
from pathlib import Path

import jax
from absl import flags
from rich.console import Console

from spg_jax.assembly import assemble
from spg_jax.method import complete
from spg_jax.planning.machines import LISTED, find_machine
from spg_jax.planning.programs import published_copy
from spg_jax.planning.report import make_report, summary
from spg_jax.planning.savings import Expected
from spg_jax.planning.tables import heading, table, verdict
from spg_jax.process import cli
from spg_jax.process.config_flag import define_config_flag

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    if not 0 < FLAGS.efficiency <= 1:
        raise ValueError(f'--efficiency is {FLAGS.efficiency}; use a share within (0, 1]')
    expected = Expected(FLAGS.signal, FLAGS.length)
    config = FLAGS.config
    assemble(config)  # Settings that cannot work are refused before any long work.
    checkpoint = config.base.checkpoint
    if checkpoint and not Path(checkpoint).is_dir():
        sizes = published_copy(Path(checkpoint)).stem
        print(f'{checkpoint} does not exist: planned with the sizes of {sizes}', file=sys.stderr)
    # Parameters have shapes and no values; the CPU is enough for the little that is computed.
    jax.config.update('jax_platforms', 'cpu')
    machine = find_machine(FLAGS.topology)
    if machine.devices is None:
        jax.config.update('jax_num_cpu_devices', machine.count)
    report = make_report(config, machine, FLAGS.fine_tuning, expected)
    if FLAGS.json:
        print(json.dumps(summary(report, config, machine, FLAGS.efficiency)))
    else:
        print(heading(report, config, machine))
        Console(width=200).print(table(report, machine))
    sentence = verdict(report, config, machine, FLAGS.efficiency)
    if not report.fits(machine.chip):
        raise ValueError(sentence)
    if not FLAGS.json:
        print(sentence)


if __name__ == '__main__':
    define_config_flag(complete)
    flags.DEFINE_string('topology', None, f'The chips, such as {", ".join(LISTED)}.')
    flags.mark_flag_as_required('topology')
    flags.DEFINE_float('efficiency', 0.4, 'Share of the published rates that a run reaches.')
    flags.DEFINE_float('signal', 1.0, 'Expected share of groups with unequal rewards.')
    flags.DEFINE_float('length', 0.0, 'Expected tokens of a completion; 0 for all.')
    flags.DEFINE_bool('fine_tuning', False, 'Plan the fine-tuning on demonstrations, and not RL.')
    flags.DEFINE_bool('json', False, 'Print one JSON object instead of a table.')
    cli.run(main)

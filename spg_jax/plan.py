"""Does a run fit a machine, and how long will it take: answered without the machine.

    python -m spg_jax.plan --config=configs/gsm8k.py:llada_8b_v5e16 --topology=v5e:4x4

Compiles the real rollout, evaluation and update for a TPU slice, on any CPU, in minutes: v5e, v5p
or v6e with the slice's shape. For GPUs (h100:1, a100:8) it lowers them, and estimates by formula.
Exits with status 1 and says what to change if the run does not fit.
"""

import json
import sys
from pathlib import Path

import jax
from absl import flags
from rich.console import Console

from spg_jax.assembly import assemble
from spg_jax.planning.machines import LISTED, find_machine
from spg_jax.planning.report import make_report, summary
from spg_jax.planning.tables import heading, table, verdict
from spg_jax.process import cli

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    if not 0 < FLAGS.efficiency <= 1:
        raise ValueError(f'--efficiency is {FLAGS.efficiency}; use a share within (0, 1]')
    config = FLAGS.config
    assemble(config)  # refuses settings that cannot work before any long work
    checkpoint = config.base.checkpoint
    if checkpoint and not Path(checkpoint).is_dir():
        print(f'{checkpoint} is not here: planned with the sizes of LLaDA-8B', file=sys.stderr)
    # The parameters stay shapes: what little is computed, this machine's CPU does.
    jax.config.update('jax_platforms', 'cpu')
    machine = find_machine(FLAGS.topology)
    if machine.devices is None:
        jax.config.update('jax_num_cpu_devices', machine.count)
    report = make_report(config, machine)
    if FLAGS.json:
        print(json.dumps(summary(report, config, machine, FLAGS.efficiency)))
    else:
        print(heading(report, config, machine))
        Console(width=200).print(table(report, machine))
    found = verdict(report, config, machine, FLAGS.efficiency)
    if not report.fits(machine.chip):
        raise ValueError(found)
    if not FLAGS.json:
        print(found)


if __name__ == '__main__':
    cli.define_config_flag()
    flags.DEFINE_string('topology', None, f'Chips and their number: {", ".join(LISTED)}, ...')
    flags.mark_flag_as_required('topology')
    flags.DEFINE_float('efficiency', 0.4, 'Share of the published rates a run is taken to get.')
    flags.DEFINE_bool('json', False, 'Print one JSON object instead of a table.')
    cli.run(main)

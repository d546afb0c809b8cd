"""docs/plan.md: the plan of every LLaDA-8B preset, four tasks on six machines, none of them here.

    python -m benchmarks.plan_tables [--topologies=v5e:4x4,h100:1]

Tasks of the same shapes share what was compiled. A program takes minutes to compile, so what was
found is kept in build/plan/ and read again; delete it after a change to the programs.
"""

import dataclasses
import importlib
import io
import json
import resource
from pathlib import Path

import jax
import ml_collections
from absl import app, flags
from rich.console import Console

from spg_jax.config import HARDWARE, digest
from spg_jax.planning import memory
from spg_jax.planning.machines import LISTED, Machine, find_machine
from spg_jax.planning.report import Program, Report, make_report
from spg_jax.planning.tables import heading, table, verdict
from spg_jax.validation import validate

FLAGS = flags.FLAGS
TASKS = ('countdown', 'gsm8k', 'math500', 'sudoku')
STORE = Path('build/plan')
EFFICIENCY = 0.4


def preset_for(topology: str) -> str:
    """The preset made for a machine."""
    return next(name for name, hardware in HARDWARE.items() if hardware.topology == topology)


def find_report(config: ml_collections.ConfigDict, machine: Machine) -> Report:
    """A report, from the store if a configuration of the same programs is there."""
    same = {
        group: config[group].to_dict()
        for group in ('model', 'lora', 'sampling', 'corruption', 'rl', 'mesh')
    }
    same['evaluation'] = config.evaluation.batch, config.evaluation.lengths
    path = STORE / f'{machine.topology.replace(":", "-")}-{digest(same)}.json'
    if not path.exists():
        report = make_report(config, machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(report), indent=1))
    found = json.loads(path.read_text())
    return Report(
        **found
        | {
            'resident': memory.Resident(**found['resident']),
            'programs': {name: Program(**one) for name, one in found['programs'].items()},
        }
    )


def main(_: list[str]) -> None:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 8)  # stand in for GPUs, for which nothing is compiled
    lines = [(__doc__ or '').splitlines()[0]]
    for topology in FLAGS.topologies:
        machine, preset = find_machine(topology), preset_for(topology)
        for task in TASKS:
            config = importlib.import_module(f'configs.{task}').get_config(preset)
            validate(config)
            report = find_report(config, machine)
            console = Console(width=250, file=io.StringIO())
            console.print(table(report, machine, markdown=True))
            lines += [
                f'\n## {task}, {topology}\n',
                f'    python -m spg_jax.plan --config=configs/{task}.py:{preset} '
                f'--topology={topology}\n',
                heading(report, config, machine),
                '\n'.join(line.rstrip() for line in console.file.getvalue().splitlines()),
                verdict(report, config, machine, EFFICIENCY),
            ]
            print('\n'.join(lines[-3:]), flush=True)
            host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            took = {name: round(one.seconds) for name, one in report.programs.items()}
            print(f'compiled in {took} s; host memory so far {host:.1f} GiB', flush=True)
    if tuple(FLAGS.topologies) == LISTED:
        Path('docs/plan.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    flags.DEFINE_list('topologies', list(LISTED), 'Of the machines; docs/plan.md needs all.')
    app.run(main)

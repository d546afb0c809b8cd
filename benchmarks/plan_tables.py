"""The plans of all LLaDA-8B presets: four tasks on six machines, none of which has to be here.

    python -m benchmarks.plan_tables [--topologies=v5e:4x4,h100:1] [--objectives=spg,d1]

The command writes docs/plan.md. Tasks with the same shapes share their compiled programs. A program
takes minutes to compile, and an update for v6e takes half an hour. Reports are therefore kept in
build/plan/ and read again; delete this folder after a change to the programs.
"""

import dataclasses
import importlib
import io
import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from rich.console import Console

from configs import gsm8k
from spg_jax import sharding
from spg_jax.assembly import assemble
from spg_jax.errors import check_one_of
from spg_jax.method import set_objective
from spg_jax.planning import costs, memory
from spg_jax.planning.machines import GIB, LISTED, Machine, find_machine
from spg_jax.planning.programs import make_plan
from spg_jax.planning.report import Program, Report, make_report, times
from spg_jax.planning.tables import heading, table, verdict
from spg_jax.presets import HARDWARE
from spg_jax.process import cli
from spg_jax.process.files import write_whole
from spg_jax.rl.objectives import REGISTRY
from spg_jax.runs.directory import digest

FLAGS = flags.FLAGS
TASKS = ('countdown', 'gsm8k', 'math500', 'sudoku')
STORE = Path('build/plan')
RECORDS = Path('docs/results/plans.jsonl')  # what the compiler for TPUs needed
EFFICIENCY = 0.4  # share of the published rates that times assume
TOLERANCE = 0.15  # largest error of the formula, as a share of the compiler's peak
EXAMPLE = 'gsm8k', 'v5e:4x4'  # the plan that docs/plan.md shows in full
DRAWS_ON = 'v5e:4x4'  # the machine for which more draws, and every objective, are planned
# How rollouts must be decoded for an objective, beside the published settings of SPG.
NEEDS = {
    'just_grpo': {'commit': 'left_to_right', 'steps': 256},
    'autoedit': {'sampler': 'autoedit'},
}
OBJECTIVES = f"""## Every objective on {DRAWS_ON}

GSM8K with 96 completions a rollout and 4 updates on it, each objective with its own numbers of
draws. Some keep a policy beside the trained one, which stays on the chips, and some read rollouts
out when they arrive (`arrival`), or look at the reference or a teacher in every update. Peaks are
in GiB a chip, by formula and without the code of the programs; FLOPs are of all chips together.
`--topologies=` prints this table alone, and `--topologies= --objectives=spg,d1` compiles these
updates too.

Of these updates spg's was compiled to its end: 5.33 GiB with its code. Two more were compiled up to
their buffers (the total of `*memory-usage-report.txt` in XLA's dump), without the code, of which
there is about 0.1 GiB: d1 needs 4.88 GiB and dtm 6.13."""
INTRODUCTION = f"""# LLaDA-8B on machines that are not here

    python -m benchmarks.plan_tables

The recipe of SPG at its published sizes: adapters of rank 128, 96 completions a rollout, M = 2
draws, 4 updates a rollout. TPU programs are those that a run would execute, compiled by the TPU
compiler on a CPU; memory is that compiler's, and beside it stands how far the formula is off. For
GPUs the same programs are lowered, not compiled, with einsum in place of cuDNN's attention, which
JAX lowers only where it finds cuDNN; memory is by the formula alone, with it: an estimate.
Times are of decoding every completion to its end, at {EFFICIENCY:.0%} of the published rates of
the chip: an assumption, not a measurement. They leave out evaluations, rewards and input. What idle
rows and completions that end early save depends on policy and prompts: `spg_jax.plan --signal
--length` takes the metrics `groups_with_signal` and `length` of an earlier run and counts it.

Memory is in GiB a chip: what stays there (weights, adapters, optimiser), then the peak of each
program."""
COLUMNS = (
    'machine',
    'task',
    'stays',
    *('rollout', 'evaluation', 'update'),
    'chip has',
    'formula off',
    *('s a rollout', 's an update', 'hours'),
)
SUMMARY = f'| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}'


def preset_for(topology: str) -> str:
    """The preset that was made for a machine."""
    return next(name for name, hardware in HARDWARE.items() if hardware.topology == topology)


def find_report(
    config: ml_collections.ConfigDict, machine: Machine, programs: tuple[str, ...] = ()
) -> Report:
    """A report on some programs or all, read from the store if it has one of the same programs."""
    shapes = {
        group: config[group].to_dict()
        for group in ('model', 'lora', 'sampling', 'corruption', 'rl', 'mesh')
    }
    shapes['evaluation'] = config.evaluation.batch, config.evaluation.lengths
    if programs:
        shapes['programs'] = programs
        if config.rl.objective in config:
            shapes['objective'] = config[config.rl.objective].to_dict()
    path = STORE / f'{machine.topology.replace(":", "-")}-{digest(shapes)}.json'
    if not path.exists():
        report = make_report(config, machine, programs=programs)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dataclasses.asdict(report), indent=1))
    saved = json.loads(path.read_text())
    return Report(
        **saved
        | {
            'resident': memory.Resident(**saved['resident']),
            'programs': {name: Program(**fields) for name, fields in saved['programs'].items()},
        }
    )


def main(_: list[str]) -> None:
    for name in FLAGS.objectives:
        check_one_of('--objectives', name, REGISTRY)
    jax.config.update('jax_platforms', 'cpu')
    # CPU devices take the place of GPUs, for which nothing is compiled.
    jax.config.update('jax_num_cpu_devices', 16)
    rows, records, shown = [], [], ''
    for topology in FLAGS.topologies:
        for task in TASKS:
            report, row, detail = planned(task, topology)
            rows.append(row)
            records += compiled(task, report)
            if (task, topology) == EXAMPLE:
                shown = detail
            print(detail, flush=True)
    summary = '\n'.join([SUMMARY, *rows])
    objectives = every_objective()
    print(f'\n{summary}\n\n{objectives}')
    if tuple(FLAGS.topologies) == LISTED:
        page = [INTRODUCTION, summary, more_draws(), OBJECTIVES, objectives, shown]
        write_whole(Path('docs/plan.md'), '\n\n'.join(page) + '\n')
        write_whole(RECORDS, ''.join(json.dumps(record) + '\n' for record in records))


def compiled(task: str, report: Report) -> list[dict[str, Any]]:
    """What the compiler needed for each program, in GiB a chip."""
    return [
        {
            'task': task,
            'topology': report.topology,
            'program': name,
            'activations_gib': round(program.compiled / GIB, 2),
            'peak_gib': round(report.peak(name) / GIB, 2),
        }
        for name, program in report.programs.items()
        if program.compiled is not None
    ]


def planned(task: str, topology: str) -> tuple[Report, str, str]:
    """(report, row of the summary, section of the page) for a task on a machine."""
    machine, preset = find_machine(topology), preset_for(topology)
    config = importlib.import_module(f'configs.{task}').get_config(preset)
    assemble(config)
    report = find_report(config, machine)
    chip = machine.chip
    if not report.fits(chip):
        raise RuntimeError(verdict(report, config, machine, EFFICIENCY))
    deviations = [report.deviation(name) for name in report.programs]
    if machine.chip.platform == 'tpu' and max(map(abs, deviations)) > TOLERANCE:
        raise RuntimeError(f'{task} on {topology}: the formula is off by {deviations}')
    time = times(report, config, chip, EFFICIENCY)
    peaks = [report.peak(name) for name in ('rollout', 'evaluation', 'update')]
    row = (
        f'| {topology} | {task} | {report.resident.total / GIB:.1f} | '
        + ' | '.join(f'{peak / GIB:.1f}' for peak in peaks)
        + f' | {chip.memory / GIB:.1f} | '
        + ('estimate' if None in deviations else f'{min(deviations):+.0%} … {max(deviations):+.0%}')
        + f' | {time.rollout:.0f} | {time.update:.1f} | {time.hours:.0f} |'
    )
    console = Console(width=250, file=io.StringIO())
    console.print(table(report, machine, markdown=True))
    detail = [
        f'## {task}, {topology}',
        f'    python -m spg_jax.plan --config=configs/{task}.py:{preset} --topology={topology}',
        heading(report, config, machine),
        '\n'.join(line.rstrip() for line in console.file.getvalue().strip().splitlines()),
        verdict(report, config, machine, EFFICIENCY),
    ]
    return report, row, '\n\n'.join(detail)


def more_draws() -> str:
    """A sentence about the memory that four times as many Monte-Carlo draws need."""
    peaks = []
    for draws in (2, 8):
        config = gsm8k.get_config(preset_for(DRAWS_ON))
        config.corruption.draws = draws
        report = find_report(config, find_machine(DRAWS_ON))
        peaks.append(report.peak('update') / GIB)
    return (
        f'The update of GSM8K on {DRAWS_ON} peaks at {peaks[0]:.2f} GiB with M = 2 draws and at '
        f'{peaks[1]:.2f} GiB with M = 8 (`--config.corruption.draws=8`).'
    )


def every_objective() -> str:
    """A table of what each objective needs on one machine, with its own numbers, by formula.

    The updates of `--objectives` are compiled too.
    """
    machine = find_machine(DRAWS_ON)
    mesh = sharding.make_mesh(
        gsm8k.get_config(preset_for(DRAWS_ON)).mesh, jax.devices('cpu')[: machine.count]
    )
    columns = ['objective', 'M', 'stays', 'arrival', 'PFLOP', 'update', 'PFLOP']
    if FLAGS.objectives:
        columns += ['compiled', 'formula off']
    lines = [f'| {" | ".join(columns)} |', f'|{"---|" * len(columns)}']
    for name in REGISTRY:
        config = gsm8k.get_config(preset_for(DRAWS_ON))
        set_objective(config, name)
        for key, value in NEEDS.get(name, {}).items():
            config.sampling[key] = value
        plan = make_plan(config, mesh, machine.chip.platform)
        stays = memory.resident(plan.state).total
        peaks = {
            program: (stays + sum(memory.estimate(plan, program).values())) / GIB
            for program in plan.programs
        }
        cells = [name, f'{plan.parts.objective.draws}', f'{stays / GIB:.2f}']
        for program in ('arrival', 'update'):
            if program not in peaks:
                cells += ['–', '–']
                continue
            work = costs.work(plan, program)
            cells += [f'{peaks[program]:.2f}', f'{work.flops / 1e15:.2f}']
        if name in FLAGS.objectives:
            report = find_report(config, machine, programs=('update',))
            cells += [f'{report.peak("update") / GIB:.2f}', f'{report.deviation("update"):+.0%}']
        elif FLAGS.objectives:
            cells += ['–', '–']
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    flags.DEFINE_list(
        'topologies', list(LISTED), 'The machines; docs/plan.md is written only for all of them.'
    )
    flags.DEFINE_list('objectives', [], 'The objectives whose updates are compiled.')
    cli.run(main)

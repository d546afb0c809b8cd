"""A plan as a table with lines of text around it, for a terminal or for Markdown."""

import ml_collections
from rich import box
from rich.table import Table

from spg_jax.planning.machines import GIB, Machine
from spg_jax.planning.programs import FINE_TUNING
from spg_jax.planning.report import Program, Report, remedy, times

# Kind of collective -> its name in the table.
SHORT = {
    'all-gather': 'gather',
    'all-reduce': 'reduce',
    'reduce-scatter': 'scatter',
    'all-to-all': 'all-to-all',
    'collective-permute': 'permute',
    'expected': 'expected',
}


def table(report: Report, machine: Machine, markdown: bool = False) -> Table:
    """A table with a row for each program: memory and work on each chip, and what limits it."""
    chip = machine.chip
    grid = Table(box=box.MARKDOWN if markdown else box.SIMPLE)
    grid.add_column('program')
    for column in ('activations GiB', 'peak GiB', 'of chip', 'by formula GiB', 'off by'):
        grid.add_column(column, justify='right')
    for column in ('TFLOP', 'memory GB', 'links GB', 'seconds at least'):
        grid.add_column(column, justify='right')
    grid.add_column('limited by')
    grid.add_column('collectives: times, GB')
    for name, program in report.programs.items():
        limits = program.limits(chip)
        slowest = max(limits, key=limits.get)
        deviation = report.deviation(name)
        peak = report.peak(name)
        by_formula = peak - program.needed + program.estimate
        grid.add_row(
            name,
            f'{program.needed / GIB:.2f}' if not program.exceeded else 'too much',
            f'{peak / GIB:.2f}' if not program.exceeded else 'too much',
            f'{peak / chip.memory:.0%}' if not program.exceeded else '',
            f'{by_formula / GIB:.2f}',
            'estimate' if deviation is None else f'{deviation:+.0%}',
            f'{program.flops / 1e12:.0f}',
            f'{program.bytes / 1e9:.0f}',
            f'{program.received / 1e9:.1f}',
            f'{limits[slowest]:.2f}',
            slowest,
            _collectives(program),
        )
    return grid


def heading(report: Report, config: ml_collections.ConfigDict, machine: Machine) -> str:
    """Lines that say what is planned, and which bytes stay on each chip."""
    chip, resident = machine.chip, report.resident
    mesh = ' x '.join(f'{axis}={size}' for axis, size in report.mesh.items())
    fine_tuning = FINE_TUNING in report.programs
    kept = 'average' if fine_tuning else 'kept policies'
    rows = (
        f'fine-tuning, {config.base.batch_size} rows'
        if fine_tuning
        else f'microbatch {config.rl.microbatch} of {config.rl.prompts * config.rl.group_size} rows'
    )
    return (
        f'{config.task.name} on {machine.topology}: {machine.count} x {chip.name}, '
        f'{chip.memory / GIB:.1f} GiB each; mesh {mesh}, {rows}, {report.attention} attention. On '
        'each chip all the time: weights '
        f'{resident.weights / GIB:.2f} GiB, adapters {resident.adapters / GIB:.2f}, optimiser '
        f'{resident.optimizer / GIB:.2f}'
        f'{f", {kept} {resident.kept / GIB:.2f}" if resident.kept else ""}.'
    )


def verdict(
    report: Report, config: ml_collections.ConfigDict, machine: Machine, efficiency: float
) -> str:
    """A sentence that says whether the run fits, and how long the recipe takes."""
    chip = machine.chip
    how = '' if chip.platform == 'tpu' else ' (by formula: an estimate)'
    if not report.fits(chip):
        return f'does not fit{how}: {remedy(report, config, chip)}'
    peak = report.peak(report.largest)
    time = times(report, config, chip, efficiency)
    if FINE_TUNING in report.programs:
        return (
            f'fits{how}: {peak / GIB:.1f} of {chip.memory / GIB:.1f} GiB. At {efficiency:.0%} of '
            f'the published rates a step takes {time.update:.1f} s, all of base.stages '
            f'{time.hours:.1f} h; input comes on top.'
        )
    saved = (
        f'{report.left["rollout"]:.0%} of the work of rollouts and {report.left["update"]:.0%} of '
        'that of updates are expected to be left, and counted'
        if min(report.left.values(), default=1.0) < 1
        else 'completions that end early and idle rows come off'
    )
    return (
        f'fits{how}: {peak / GIB:.1f} of {chip.memory / GIB:.1f} GiB. At {efficiency:.0%} of the '
        f'published rates a rollout takes {time.rollout:.0f} s, an update {time.update:.1f} s, the '
        f'recipe of {config.train.steps} updates {time.hours:.0f} h; evaluations, rewards and '
        f'input come on top, {saved}.'
    )


def _collectives(program: Program) -> str:
    return '; '.join(
        f'{SHORT[kind]} {f"{times:,} x, " if times else ""}{received / 1e9:.1f}'
        for kind, (times, received) in sorted(program.collectives.items())
        if received
    )

"""The tables and the plot of the benchmark."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.programs import Row

MIB = 2**20


def print_report(report: dict[str, Any]) -> None:
    """Prints what `__main__` has measured as one table."""
    machine = report['machine']
    title = (
        f'{machine["peak_gflops"]:.0f} GFLOP/s in products of float32 at most, '
        f'{machine["bandwidth_gb"]:.0f} GB/s to memory; {machine["processor"]}, '
        f'{machine["cores"]} cores, load {machine["load"]:.1f}'
    )
    table = Table('preset', 'what', 'seconds', 'speed', 'share of peak', 'MiB', title=title)
    for row in report['rows']:
        table.add_row(*_cells(row))
    table.add_section()
    for row in report['growth']:
        seconds = ', '.join(f'{value:.3g}' for value in row['seconds'])
        slopes = f'slope {row["slope"]:.2f}'
        memory = f'slope {row["memory_slope"]:.2f}' if 'memory_slope' in row else ''
        sizes = ', '.join(map(str, row['sizes']))
        table.add_row('small', f'{row["axis"]}: {sizes}', seconds, slopes, '', memory)
    table.add_section()
    table.add_row('', 'peak memory of this process', '', '', '', _mib(report['peak_bytes']))
    Console(width=120).print(table)


def _cells(row: Row) -> list[str]:
    speed = share = ''
    if row.get('count'):
        speed = f'{row["count"] / row["seconds"]:,.4g} {row["unit"]}/s'
    if row.get('shares'):
        share = f'{statistics.median(row["shares"]):.0%}'
        if len(row['shares']) > 1:
            share += f' [{min(row["shares"]):.0%}, {max(row["shares"]):.0%}]'
    if row.get('cpu_seconds'):
        speed = f'{row["cpu_seconds"]:.1f} s of processor'
    return [
        row['preset'],
        row['what'],
        f'{row["seconds"]:.3g}',
        speed,
        share,
        _mib(row.get('bytes')),
    ]


def _mib(amount: int | None) -> str:
    return f'{amount / MIB:,.0f}' if amount else ''


def print_pairs(rows: Sequence[Row], revision: str) -> None:
    """Prints how many times as fast this tree is as another commit."""
    table = Table('preset', 'what', f'{revision}, s', 'here, s', 'as fast', 'from', 'to', 'pairs')
    for row in rows:
        numbers = [f'{row[key]:.3g}' for key in ('before', 'after')]
        numbers += [f'{row[key]:.2f}' for key in ('ratio', 'least', 'most')]
        table.add_row(row['preset'], row['what'], *numbers, str(row['pairs']))
    Console(width=120).print(table)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the shares of the peak, the growth, and the ratios of pairs if there are any."""
    import matplotlib.pyplot as plt

    rows = [row for row in report.get('rows', ()) if row.get('shares')]
    growth, pairs = report.get('growth', ()), report.get('pairs', ())
    panels = [name for name, part in (('s', rows), ('g', growth), ('p', pairs)) if part]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        if panel == 's':
            shares = [100 * statistics.median(row['shares']) for row in rows]
            axis.barh([f'{row["preset"]}: {row["what"]}' for row in rows], shares)
            axis.set_xlabel('% of the peak of float32 products')
        elif panel == 'g':
            for row in growth:
                sizes = [size / row['sizes'][0] for size in row['sizes']]
                times = [value / row['seconds'][0] for value in row['seconds']]
                axis.loglog(sizes, times, marker='o', label=f'{row["axis"]} ({row["slope"]:.2f})')
            axis.set_xlabel('size, as a multiple of the first')
            axis.set_ylabel('time, as a multiple of the first')
            axis.legend(fontsize=7)
        else:
            names = [f'{row["preset"]}: {row["what"]}' for row in pairs]
            ratios = [row['ratio'] for row in pairs]
            errors = [
                [row['ratio'] - row['least'] for row in pairs],
                [row['most'] - row['ratio'] for row in pairs],
            ]
            axis.errorbar(ratios, names, xerr=errors, fmt='o', capsize=3)
            axis.axvline(1, linewidth=1)
            axis.set_xlabel('times as fast as before')
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

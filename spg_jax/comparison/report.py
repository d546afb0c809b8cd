"""Tables and curves of a comparison, from its lines of figures alone."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from spg_jax.comparison.plan import MEASURED, TUNING
from spg_jax.comparison.records import FAILED, FINISHED, LINES, Line, newest
from spg_jax.comparison.statistics import Estimate, estimate, paired_difference, percent
from spg_jax.process.files import make_folder, write_whole
from spg_jax.tasks.card import check_alike, from_json

TABLE = 'table.md'
HEAD = (
    'method',
    'learning rate',
    'seeds',
    'test',
    'difference',
    'validation: best',
    'at the end',
    'collapsed',
    'updates',
    'sequences forwards / backwards',
    'of an update',
    'seconds',
    'of an update',
)


def write_report(lines: Iterable[Line], folder: Path) -> str:
    """Writes table.md and TASK.png of each task, and returns the text of the tables.

    Args:
      lines: of figures, as in runs.jsonl.
      folder: where the files go.

    Raises:
      ValueError: figures of a task were measured by unlike protocols.
    """
    kept = list(newest(lines).values())
    tasks = list(dict.fromkeys(line['task'] for line in kept))
    of_task = {task: [line for line in kept if line['task'] == task] for task in tasks}
    text = '\n\n'.join(_section(task, of_task[task]) for task in tasks)
    packages = {line['package'] for line in kept if 'package' in line}
    if len(packages) > 1:
        text += f'\n\nThe runs come from {len(packages)} versions of the code.'
    make_folder(folder, 'give a folder that can be written as --workdir')
    write_whole(folder / TABLE, text + '\n')
    for task in tasks:
        if measured := list(filter(is_measured, of_task[task])):
            draw(task, measured, folder / f'{task}.png')
    return text


def is_measured(line: Line) -> bool:
    """Whether figures of a table come from a line."""
    return line['role'] == MEASURED and line['status'] == FINISHED


def by_method(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by method, the method that others are compared with first; seeds ascend."""
    groups: dict[str, list[Line]] = {}
    ordered = sorted(lines, key=lambda line: line['method'] != line['reference'])
    for line in ordered:
        groups.setdefault(line['method'], []).append(line)
    return {name: sorted(group, key=lambda line: line['seed']) for name, group in groups.items()}


def _section(task: str, lines: Sequence[Line]) -> str:
    """The tables of a task."""
    measured = by_method(filter(is_measured, lines))
    parts = [f'## {task}']
    if measured:
        parts.append(_table(measured))
        parts.append(_base(next(iter(measured.values()))))
        if all('draft_accuracy' in line for group in measured.values() for line in group):
            parts.append(_edits_table(measured))
    if any(line['role'] == TUNING for line in lines):
        parts.append(_tuning_table([line for line in lines if line['role'] == TUNING]))
    failed = [line for line in lines if line['status'] == FAILED]
    parts += [
        f'failed: {line["method"]}, {line["role"]} {line["seed"]}, learning rate '
        f'{line["learning_rate"]:g}: {line.get("error", "")}'
        for line in failed
    ]
    return '\n\n'.join(parts)


def _table(groups: dict[str, list[Line]]) -> str:
    """The figures of methods, in per cent where they are shares.

    Raises:
      ValueError: figures were measured by unlike protocols; the message names the difference.
    """
    # Lines of older versions have no card. They are compared with each other alone.
    cards = {
        f'{method}, seed {line["seed"]}': from_json(line['card'], LINES) if 'card' in line else None
        for method, lines in groups.items()
        for line in lines
    }
    check_alike(cards, 'compare anew in another --workdir')
    first = next(iter(groups.values()))
    reference = first[0]['reference']
    compared = groups.get(reference, [])
    has_grids = 'grid_accuracy' in first[0]
    head = [*HEAD[:3], *(['test: cells', 'grids'] if has_grids else ['test']), *HEAD[4:]]
    head[head.index('difference')] = f'difference to {reference}'
    rows = [head, ['---'] * len(head)]
    of_sequences = _mean(compared, _sequences_of_update)
    of_seconds = _mean(compared, lambda line: line.get('seconds_per_update'))
    for method, lines in groups.items():
        # What counts as solved is a whole grid where there are any.
        solved = 'grid_accuracy' if has_grids else 'accuracy'
        difference = None
        if method != reference and compared:
            difference = paired_difference(
                {line['seed']: line[solved] for line in lines},
                {line['seed']: line[solved] for line in compared},
            )
        rates = sorted({line['learning_rate'] for line in lines})
        accuracies = ['accuracy', *(['grid_accuracy'] if has_grids else [])]
        forward, backward = (
            _mean(lines, lambda line, k=k: line[k]) for k in ('forward', 'backward')
        )
        rows.append(
            [
                method,
                ', '.join(f'{rate:g}' for rate in rates),
                str(len(lines)),
                *(percent(estimate([line[name] for line in lines])) for name in accuracies),
                percent(difference, signed=True),
                percent(estimate([line['validation_accuracy'] for line in lines])),
                percent(estimate([line['last_accuracy'] for line in lines])),
                _collapses(lines),
                f'{_mean(lines, lambda line: line["updates"]):.0f}',
                f'{forward:,.0f} / {backward:,.0f}',
                _ratio(_mean(lines, _sequences_of_update), of_sequences),
                f'{_mean(lines, lambda line: line["seconds"]):.0f}',
                _ratio(_mean(lines, lambda line: line.get('seconds_per_update')), of_seconds),
            ]
        )
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _base(lines: Sequence[Line]) -> str:
    """One line about the base policy."""
    words = percent(_estimate_of(lines, 'base_accuracy'))
    if 'base_grid_accuracy' in lines[0]:
        words = f'{words} of cells, {percent(_estimate_of(lines, "base_grid_accuracy"))} of grids'
    return f'base policy on test: {words}; budget of all methods: the same {lines[0]["budget"]}'


def _edits_table(groups: dict[str, list[Line]]) -> str:
    """Accuracy of drafts and of edited answers on test, and how many problems editing changes."""
    head = ['test', 'draft', 'answer', 'gain', 'problems: wrong to right', 'right to wrong']
    rows = [head, ['---'] * len(head)]
    policies = {'base policy': ('base_', [line for lines in groups.values() for line in lines])}
    policies |= {method: ('', lines) for method, lines in groups.items()}
    for policy, (when, lines) in policies.items():
        # Runs of one seed have one base policy.
        edited = list({line['seed']: line for line in lines}.values())
        drafts = [line[f'{when}draft_accuracy'] for line in edited]
        answers = [line[f'{when}accuracy'] for line in edited]
        gains = [after - before for before, after in zip(drafts, answers, strict=True)]
        changes = (
            f'{sum(line[f"{when}{name}"] for line in edited) / len(edited):.1f}'
            for name in ('wrong_to_right', 'right_to_wrong')
        )
        accuracies = percent(estimate(drafts)), percent(estimate(answers))
        rows.append([policy, *accuracies, percent(estimate(gains), signed=True), *changes])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _estimate_of(lines: Sequence[Line], name: str) -> Estimate:
    """The estimate of a figure; runs that share a base policy have one figure of it."""
    values = [line[name] for line in lines]
    return estimate(values[:1] if len(set(values)) == 1 else values)


def _collapses(lines: Sequence[Line]) -> str:
    """How many runs collapsed, and after which updates."""
    steps = [line['collapsed_at'] for line in lines if line.get('collapsed_at') is not None]
    after = f' (at {", ".join(map(str, sorted(steps)))})' if steps else ''
    return f'{len(steps)} of {len(lines)}{after}'


def _sequences_of_update(line: Line) -> float:
    return (line['forward'] + line['backward']) / line['updates']


def _mean(lines: Sequence[Line], figure: Callable[[Line], float | None]) -> float | None:
    """The mean of a figure over the lines that have it; None if none has."""
    values = [value for line in lines if (value := figure(line)) is not None]
    return sum(values) / len(values) if values else None


def _ratio(value: float | None, reference: float | None) -> str:
    return '–' if value is None or not reference else f'× {value / reference:.2f}'


def _tuning_table(lines: Sequence[Line]) -> str:
    """Accuracy of the best validation by method and learning rate, in per cent."""
    rates = sorted({line['learning_rate'] for line in lines})
    head = [f'best validation, seed {lines[0]["seed"]}', *(f'{rate:g}' for rate in rates)]
    rows = [head, ['---'] * len(head)]
    for method, tried in by_method(lines).items():
        line_of = {line['learning_rate']: line for line in tried}
        cells = [
            f'{100 * line_of[rate]["validation_accuracy"]:.1f}'
            if rate in line_of and line_of[rate]['status'] == FINISHED
            else ('failed' if rate in line_of else '–')
            for rate in rates
        ]
        rows.append([method, *cells])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def draw(task: str, lines: Sequence[Line], path: Path) -> None:
    """Draws reward and accuracy over the budget: means over seeds, with the range of the seeds.

    Args:
      task: its name.
      lines: finished runs of the task.
      path: of the picture.
    """
    # Pyplot would ask for the backend of a screen; a figure alone draws into files.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups = by_method(lines)
    colours = colormaps['tab20' if len(groups) > 10 else 'tab10'].colors
    figure = Figure(figsize=(11, 4), layout='constrained')
    axes = figure.subplots(1, 2)
    panels = (('rewards', 'reward of rollouts'), ('validations', 'accuracy on validation'))
    unit = lines[0]['budget']
    for axis, (name, title) in zip(axes, panels, strict=True):
        for place, (method, runs) in enumerate(groups.items()):
            colour = colours[place % len(colours)]
            style = '-' if place < len(colours) else '--'
            steps, low, mean, high = band([run[name] for run in runs])
            scale = budget_of_update(runs[0])
            x = [step * scale for step in steps]
            axis.plot(x, mean, style, color=colour, lw=1.3, label=method)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axis.set(title=f'{task}: {title}', xlabel=unit)
        axis.locator_params(axis='x', nbins=5)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center', fontsize=8)
    figure.savefig(path, dpi=110)


def budget_of_update(line: Line) -> float:
    """What an update of a run takes of the budget, on average, in its unit."""
    amounts = {'updates': line['updates'], 'forward': line['forward'], 'backward': line['backward']}
    total = amounts.get(line['budget'], line['forward'] + line['backward'])
    return total / line['updates']


def band(
    curves: Sequence[Sequence[tuple[int, float]]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """(updates, lowest, mean, highest) over curves, at the updates that all of them have."""
    values = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in values)))
    columns = [[curve[step] for curve in values] for step in steps]
    means = [sum(column) / len(column) for column in columns]
    return steps, [*map(min, columns)], means, [*map(max, columns)]

"""The figures of a run, read from the files that it left in its directory."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spg_jax.comparison.plan import TUNING, Job
from spg_jax.process.json_files import read_json
from spg_jax.runs.guard import Guard, Rules
from spg_jax.runs.metrics import read_rows
from spg_jax.runs.report import EDIT_FIGURES, RESULT

POINTS = 60  # of a curve of rewards in a line of figures
RARE = 0.05

Row = dict[str, Any]


def figures_of(workdir: Path, job: Job, due: Callable[[int], int]) -> dict[str, Any]:
    """The figures of a finished run, as fields of `records.Line`.

    Args:
      workdir: of the run.
      job: which run it is; figures of the test split are left out where a rate is tuned.
      due: updates done -> batches of prompts that are collected before the next update.
    """
    result = read_json(workdir / RESULT, dict[str, Any], 'remove it and run the same command again')
    rows = read_rows(workdir / 'metrics.jsonl')
    validations = [row for row in rows if row.get('validation_accuracy') is not None]
    best = next(row for row in validations if row['step'] == result['best_step'])
    every = result['config']['evaluation']['every']
    figures = {
        'updates': result['updates'],
        'seconds': result['seconds'],
        'seconds_per_update': seconds_per_update(rows, due, every),
        'validation_accuracy': best['validation_accuracy'],
        'validation_reward': best['validation_reward'],
        'last_accuracy': validations[-1]['validation_accuracy'],
        'best_update': best['step'],
        'collapsed_at': first_seen(rows, result['config']).get('collapse'),
        'rewards': thinned([(row['step'], row['reward']) for row in updates_in(rows)]),
        'validations': [(row['step'], row['validation_accuracy']) for row in validations],
    }
    if job.role == TUNING:
        return figures
    names = ('card', 'base_accuracy', 'base_grid_accuracy', 'accuracy', 'grid_accuracy', 'reward')
    names += tuple(f'{when}{name}' for when in ('base_', '') for name in EDIT_FIGURES)
    return figures | {name: result[name] for name in names if name in result}


def updates_in(rows: Sequence[Row]) -> list[Row]:
    """The rows of updates that have a reward, each update once and in order.

    Updates go on counting after a rollback, and a start drops the rows that will come again
    (`keep_rows`). If a file has an update twice all the same, its newest row counts.
    """
    newest = {row['step']: row for row in rows if isinstance(row.get('reward'), float)}
    return [newest[step] for step in sorted(newest)]


def thinned(points: Sequence[tuple[int, float]], most: int = POINTS) -> list[tuple[int, float]]:
    """A curve with fewer points, each the mean of neighbours, at the last of their updates."""
    size = -(-len(points) // most) or 1
    pieces = [points[first : first + size] for first in range(0, len(points), size)]
    return [(piece[-1][0], sum(value for _, value in piece) / len(piece)) for piece in pieces]


def seconds_per_update(
    rows: Sequence[Row], due: Callable[[int], int], validated_every: int
) -> float | None:
    """The seconds of an update with its share of the rollouts, without evaluations.

    Updates are sorted by the batches of prompts that are collected before them. The median of each
    kind is not moved by the first of its kind, which compiles. An update after a validation is left
    out, because its time has the validation in it.

    Args:
      rows: of metrics.jsonl.
      due: updates done -> batches that are collected before the next update.
      validated_every: updates between two validations.

    Returns:
      The mean over updates of the medians; None where a run is too short to say it, because more
      than RARE of its updates are of kinds that were never timed.
    """
    updates = updates_in(rows)
    seconds: dict[int, list[float]] = {}
    for before, row in zip(updates, updates[1:], strict=False):
        duration = row['seconds'] - before['seconds']
        is_next = row['step'] == before['step'] + 1 and duration > 0  # A start begins elsewhere.
        if is_next and before['step'] % validated_every:
            seconds.setdefault(due(before['step']), []).append(duration)
    medians = {kind: statistics.median(durations) for kind, durations in seconds.items()}
    kinds = [due(step) for step in range(1, len(updates))]
    timed = [medians[kind] for kind in kinds if kind in medians]
    return sum(timed) / len(timed) if timed and len(timed) >= (1 - RARE) * len(kinds) else None


def first_seen(rows: Sequence[Row], config: dict[str, Any]) -> dict[str, int]:
    """The update after which each sign of the guard, and the collapse, first appeared in a run.

    Rows after the first rollback are left out, because the signs then begin anew.

    Args:
      rows: of metrics.jsonl.
      config: the settings of the run.
    """
    rules = Rules(**config['guard'] | {'rollbacks': 0})
    guard, steps = Guard(rules, config['evaluation']['problems'], tell=lambda _: None), {}
    for row in rows:
        if row.get('rollbacks'):
            break
        if 'validation_accuracy' in row:
            guard.read_validation(row['step'], row['validation_accuracy'])
        elif 'loss' in row:
            guard.read(row)
        for name in guard.memory['present']:
            steps.setdefault(name, row['step'])
    return steps

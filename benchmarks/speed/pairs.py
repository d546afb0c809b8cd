"""Two commits side by side: processes of both trees take turns, and each pair gives a ratio."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.programs import Row

PROTOCOL = 1  # of what --json prints; a tree that says another number cannot be compared
Report = dict[str, Any]


def compare(
    root: Path, revision: str, pairs: int, arguments: Sequence[str], folder: Path
) -> list[Row]:
    """Runs the benchmark of two trees in turn.

    Args:
      root: the checkout to compare, as it is on disk.
      revision: the commit to compare it with.
      pairs: how often each tree runs.
      arguments: flags of the benchmark for both.
      folder: an empty folder, for the other tree and for compiled programs.

    Raises:
      ValueError: the commit does not exist, or its benchmark speaks another protocol.
    """
    tree = folder / 'tree'
    added = _git(root, 'worktree', 'add', '--detach', str(tree), revision)
    if added.returncode:
        raise ValueError(f'--against={revision}: {added.stderr.strip().splitlines()[-1]}')
    try:
        if not (tree / 'benchmarks' / 'speed' / 'pairs.py').is_file():
            # A commit from before this benchmark is measured by this one, which works as long as
            # the functions that it calls are there.
            shutil.copytree(root / 'benchmarks' / 'speed', tree / 'benchmarks' / 'speed')
        reports = [
            (_measure(tree, arguments, folder), _measure(root, arguments, folder))
            for _ in range(pairs)
        ]
    finally:
        _git(root, 'worktree', 'remove', '--force', str(tree))
    return paired(reports)


def paired(reports: Sequence[tuple[Report, Report]]) -> list[Row]:
    """For each row that both trees have: medians, and median and spread of before / after.

    Args:
      reports: of the other commit and of this tree, in the order in which they ran.
    """
    seconds_of: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for before, after in reports:
        old, new = (_seconds(report) for report in (before, after))
        for key in old.keys() & new.keys():
            seconds_of.setdefault(key, []).append((old[key], new[key]))
    rows = []
    for (preset, what), seconds in sorted(seconds_of.items()):
        ratios = [before / after for before, after in seconds]
        rows.append(
            {
                'preset': preset,
                'what': what,
                'before': statistics.median(before for before, _ in seconds),
                'after': statistics.median(after for _, after in seconds),
                'ratio': statistics.median(ratios),
                'least': min(ratios),
                'most': max(ratios),
                'pairs': len(ratios),
            }
        )
    return rows


def _seconds(report: Report) -> dict[tuple[str, str], float]:
    return {(row['preset'], row['what']): row['seconds'] for row in report['rows']}


def _measure(
    tree: Path,
    arguments: Sequence[str],
    folder: Path,
    run: Callable[..., Any] = subprocess.run,
) -> Report:
    """The report of the benchmark of a tree, from a process of its own.

    Raises:
      ValueError: it failed, or speaks another protocol.
    """
    environment = os.environ | {
        'PYTHONPATH': str(tree),
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    }
    command = [sys.executable, '-m', 'benchmarks.speed', '--json', *arguments]
    result = run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ['it said nothing'])[-1]
        raise ValueError(f'the benchmark of {tree} failed: {last}')
    report = json.loads(result.stdout.splitlines()[-1])
    if report.get('protocol') != PROTOCOL:
        raise ValueError(
            f'the benchmark of {tree} speaks protocol {report.get("protocol")}, expected '
            f'{PROTOCOL}; compare with a commit whose benchmarks/speed is as this one'
        )
    return report


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(['git', '-C', str(root), *arguments], capture_output=True, text=True)

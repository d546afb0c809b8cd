"""The progress of long work: a live bar on a terminal, or a line every few seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column

from spg_jax.process import distributed

LINE_SECONDS = 10.0  # between two lines in a log


def track(steps: range, label: str, describe: Callable[[], str]) -> Iterator[int]:
    """Yields `steps` and shows the steps done, steps per second, the time left and `describe()`.

    Args:
      steps: the steps that are left; their stop is the total.
      label: what a step is, in two or three words such as 'SPG updates'.
      describe: returns the latest figures in a few words.
    """
    if not distributed.is_leader():
        return iter(steps)
    console = Console(stderr=True)
    is_alive = sys.stderr.isatty() and not console.is_dumb_terminal
    return _bar(steps, label, describe, console) if is_alive else _lines(steps, label, describe)


def track_if_long(count: int, label: str) -> Iterator[int]:
    """Yields 0, 1, … below count, with a line every LINE_SECONDS, so that short work says nothing.

    It may run within what another bar tracks, which a second bar could not.
    """
    steps = range(count)
    return _lines(steps, label, str, says_end=False) if distributed.is_leader() else iter(steps)


def _bar(steps: range, label: str, describe: Callable[[], str], console: Console) -> Iterator[int]:
    # On a narrow terminal the figures are cut, and not the count or the time left.
    rest = Column(no_wrap=True, ratio=1, overflow='ellipsis')
    columns = (
        rich_progress.TextColumn('{task.description}'),
        rich_progress.BarColumn(bar_width=10),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn('{task.fields[rate]}'),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn('{task.fields[figures]}', table_column=rest),
    )
    start = time.monotonic()
    with rich_progress.Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(label, total=steps.stop, completed=steps.start, rate='', figures='')
        for step in steps:
            yield step
            rate = (step + 1 - steps.start) / (time.monotonic() - start)
            bar.update(task, completed=step + 1, rate=f'{rate:.2f}/s', figures=describe())


def _lines(
    steps: range, label: str, describe: Callable[[], str], says_end: bool = True
) -> Iterator[int]:
    start = last = time.monotonic()
    for step in steps:
        yield step
        now = time.monotonic()
        if now - last >= LINE_SECONDS or says_end and step + 1 == steps.stop:
            last = now
            rate = (step + 1 - steps.start) / (now - start)
            left = (steps.stop - step - 1) / rate
            line = f'{label} {step + 1}/{steps.stop}  {rate:.2f}/s  {left:.0f} s left  {describe()}'
            print(line.rstrip(), file=sys.stderr, flush=True)

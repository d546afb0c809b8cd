"""What progress shows on narrow terminals, in logs, and for work too short to speak of."""

import io
import re
import sys

import pytest
from rich.console import Console

from spg_jax.process import progress

pytestmark = pytest.mark.fast


def shown(width: int) -> str:
    """What the bar shows at the end, on a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    figures = 'reward 0.006  best validation 0.000 at 0'
    assert list(progress._bar(range(3000), 'spg updates', lambda: figures, console))[-1] == 2999
    text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', console.file.getvalue())
    return re.split(r'[\r\n]+', text.strip())[-1].rstrip()


def test_a_narrow_terminal_cuts_the_figures_first():
    assert re.search(r'spg updates .* 3000/3000 .*/s 0:00:00 reward .*…$', shown(80))
    assert shown(120).endswith('best validation 0.000 at 0')


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv('TERM', 'dumb')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    list(progress.track(range(2), 'spg updates', str))
    assert sys.stderr.getvalue().startswith('spg updates 2/2 ')


def test_short_work_says_nothing_and_long_work_how_far_it_is(capsys, monkeypatch):
    assert list(progress.track_if_long(3, 'batches')) == [0, 1, 2]
    assert capsys.readouterr() == ('', '')
    monkeypatch.setattr(progress, 'LINE_SECONDS', 0.0)
    list(progress.track_if_long(2, 'batches'))
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r'batches 1/2  [\d.]+/s  \d+ s left', first)
    assert second.startswith('batches 2/2 ')

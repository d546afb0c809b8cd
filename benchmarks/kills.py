"""Runs as processes that are killed at a random moment and go on, for benchmarks.faults and
benchmarks.every_method."""

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from benchmarks import runs
from spg_jax.runs.checkpoints import DAMAGED

CLOCKS = ('seconds', 'base_seconds')
HANG_SECONDS = 600
DELAY = 0.5  # seconds; a signal follows a row of metrics within this time
# One device compiles faster than several, and kills do not know devices.
ENVIRONMENT = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
SETTINGS = (
    *('--config=countdown:tiny', '--config.train.steps=40'),
    '--config.checkpoint.keep=3',
    # This base policy writes answers of several rewards, without which no update changes anything.
    '--config.base.stages=((40,1.0),)',
)

ALONE = 'exec "$@" >>"$0" 2>&1'
TEE = 'trap : INT; "$@" 2>&1 | tee -a "$0" >/dev/null; exit ${PIPESTATUS[0]}'
HEAD = 'trap : TERM; "$@" 2>&1 | head -n 1 >>"$0"; exit ${PIPESTATUS[0]}'
TERMINAL = 'exec <>"$0" >&0 2>&0; exec "$@"'  # makes it the terminal that the kernel hangs up


class Kill(NamedTuple):
    """A way to end a run that has not finished.

    Attributes:
      times: number of trials.
      signal: goes to the run and all that was started with it; 0 sends none.
      line: in bash, where "$@" is the run, and "$0" its terminal or the file of its output.
      on_terminal: whether the run has a terminal, which is closed before the signal is sent.
      starts: number of starts in a row that are killed in this way.
    """

    times: int
    signal: int
    line: str = ALONE
    on_terminal: bool = False
    starts: int = 1


KILLS = {
    'SIGKILL': Kill(6, signal.SIGKILL),
    'SIGKILL, and again after a new start': Kill(2, signal.SIGKILL, starts=2),
    'SIGKILL of a pipeline into tee': Kill(2, signal.SIGKILL, TEE),
    'Ctrl-C of a pipeline into tee': Kill(2, signal.SIGINT, TEE),
    'SIGTERM of a pipeline whose reader has ended': Kill(2, signal.SIGTERM, HEAD),
    'SIGTERM': Kill(2, signal.SIGTERM),
    'SIGHUP': Kill(2, signal.SIGHUP),
    'SIGUSR1': Kill(2, signal.SIGUSR1),
    'a closed terminal': Kill(2, 0, TERMINAL, on_terminal=True),
    'a closed terminal under nohup, and SIGTERM': Kill(
        2, signal.SIGTERM, f'trap "" HUP; {TERMINAL}', on_terminal=True
    ),
}


class Outcome(NamedTuple):
    """What became of a trial, and whether that is what was promised."""

    held: bool
    what: str


class Processes:
    """Runs as processes, whose base policy and problems are made once."""

    def __init__(
        self,
        root: Path,
        jobs: int,
        module: str = 'spg_jax.train',
        settings: Sequence[str] = SETTINGS,
        shared: Path | None = None,
        clocks: Sequence[str] = CLOCKS,
    ):
        """Makes the run that is left alone, with as many cores as the others will have.

        Args:
          root: the folder of the runs.
          jobs: runs at the same time.
          module: the program of a run.
          settings: its flags.
          shared: the folder of problems and base policies; by default `root`.
          clocks: figures that differ between runs that are equal.
        """
        self.root, self.whole = root, root / 'whole'
        self._module, self._settings, self._shared = module, tuple(settings), shared or root
        self._clocks = frozenset(clocks)
        self._reading = threading.Lock()
        [code] = runs.at_once(jobs, [lambda: self._finish(self.whole)])
        if code:
            raise ValueError(f'the run that was left alone failed: {_last_line(self.whole)}')
        self._rows, self._contents = len(rows_of(self.whole)), contents_of(self.whole, self._clocks)
        if not any(row.get('gradient_norm') for row in self._contents['metrics']):
            raise ValueError('the run that was left alone learned nothing, so nothing can be lost')

    def killed(self, kill: Kill, folder: str, rng: np.random.Generator) -> Outcome:
        """Kills a run and goes on; a kill that comes too late is tried again on another run."""
        for attempt in range(5):
            workdir = self.root / f'{folder}-{attempt}'
            failures = [self._cut(workdir, kill, rng) for _ in range(kill.starts)]
            if not (workdir / 'result.json').exists():
                failure = next(filter(None, failures), '')
                return Outcome(False, failure) if failure else self._goes_on(workdir)
        return Outcome(False, 'every kill came after the end')

    def damaged(self, damage: Callable[[Path], Any], folder: str) -> Outcome:
        """Damages the newest checkpoint of a run that is cut before its result, and goes on."""
        workdir = self.root / folder
        shutil.copytree(self.whole, workdir)
        (workdir / 'result.json').unlink()
        newest = newest_checkpoint(workdir)
        damage(newest)
        outcome = self._goes_on(workdir)
        if outcome.held and not newest.with_name(newest.name + DAMAGED).is_dir():
            return Outcome(False, 'the damaged checkpoint was not set aside')
        return outcome

    def _start(self, workdir: Path, line: str, place: str) -> subprocess.Popen:
        command = [
            *(sys.executable, '-m', self._module, f'--workdir={workdir}', *self._settings),
            f'--config.base.cache={self._shared}/base',
            f'--config.task.data_dir={self._shared}/data',
        ]
        quiet = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
        words = ['bash', '-c', line, place, *command]
        return subprocess.Popen(words, env=ENVIRONMENT, start_new_session=True, **quiet)

    def _finish(self, workdir: Path) -> int | str:
        return _wait(self._start(workdir, ALONE, f'{workdir}.log'))

    def _cut(self, workdir: Path, kill: Kill, rng: np.random.Generator) -> str:
        """Starts a run and kills it. Returns '', or what was lost although it could be saved."""
        saves = kill.signal != signal.SIGKILL
        # A run that is to save must not be near its end, where nothing is left to save.
        last = self._rows // 2 if saves else self._rows
        rows = rng.integers(len(lines_of(workdir)) + saves, last + 1)
        delay = rng.random() * DELAY
        terminal = pty.openpty() if kill.on_terminal else ()
        place = os.ttyname(terminal[1]) if terminal else f'{workdir}.log'
        process = self._start(workdir, kill.line, place)
        _watch(process, lambda: len(lines_of(workdir)) >= rows, *terminal)
        moment = time.monotonic() + delay
        _watch(process, lambda: time.monotonic() >= moment, *terminal)
        for end in terminal:
            os.close(end)
        if terminal and kill.signal:  # The run has to outlive its terminal first.
            rows = len(lines_of(workdir)) + 3
            _watch(process, lambda: len(lines_of(workdir)) >= rows)
        with contextlib.suppress(ProcessLookupError):  # The run has ended.
            os.killpg(process.pid, kill.signal)
        code = _wait(process)
        if not saves:
            return ''
        done = max((row['step'] for row in rows_of(workdir) if 'loss' in row), default=0)
        saved = int(newest_checkpoint(workdir).name)
        if saved < done or not saved:
            return f'{done} updates were done, {saved} saved'
        return f'saved, but with exit status {code}' if code else ''

    def _goes_on(self, workdir: Path) -> Outcome:
        """Whether the same command ends as the run that was left alone."""
        code = self._finish(workdir)
        if code:
            return Outcome(False, f'exit status {code}: {_last_line(workdir)}')
        if 'Traceback' in Path(f'{workdir}.log').read_text(errors='replace'):
            return Outcome(False, 'went on, with tracebacks on the screen')
        with self._reading:  # Orbax is not made for several threads.
            contents = contents_of(workdir, self._clocks)
        different = [name for name in contents if contents[name] != self._contents[name]]
        return Outcome(not different, f'other {different[0]}' if different else 'equal')


def _watch(process: subprocess.Popen, condition: Callable[[], bool], *terminal: int) -> None:
    """Returns when a condition holds, or the process has ended or hangs.

    What it shows on its terminal is read, because a full terminal would hold it up.
    """
    deadline = time.monotonic() + HANG_SECONDS
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        if terminal and select.select(terminal[:1], [], [], 0.01)[0]:
            os.read(terminal[0], 4096)
        elif not terminal:
            time.sleep(0.01)


def _wait(process: subprocess.Popen) -> int | str:
    """The exit status; a process that hangs is killed with all that it started."""
    try:
        return process.wait(HANG_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 'of a run that hangs'


def _last_line(workdir: Path) -> str:
    lines = Path(f'{workdir}.log').read_text(errors='replace').splitlines()
    return lines[-1][:300] if lines else 'it says nothing'


def lines_of(workdir: Path) -> list[str]:
    """The whole lines of metrics.jsonl; [] without the file."""
    path = workdir / 'metrics.jsonl'
    return path.read_text().split('\n')[:-1] if path.exists() else []


def rows_of(workdir: Path, clocks: Collection[str] = CLOCKS) -> list[dict[str, Any]]:
    """The metrics of a run without its clocks."""
    return [_without(clocks, json.loads(line)) for line in lines_of(workdir)]


def contents_of(workdir: Path, clocks: Collection[str] = CLOCKS) -> dict[str, Any]:
    """What two runs that are equal have in common, by the name of the part; clocks are left out."""
    best = workdir / 'best' / 'params'
    adapter = workdir / 'best' / 'adapter' / 'adapter_model.safetensors'
    return {
        'metrics': rows_of(workdir, clocks),
        'completions': (workdir / 'completions.jsonl').read_text(),
        'result': _without(clocks, json.loads((workdir / 'result.json').read_text())),
        'checkpoint': bits_of(ocp.load(newest_checkpoint(workdir).absolute())),
        'best policy': bits_of(ocp.load(best.absolute()))
        if best.is_dir()
        else adapter.read_bytes(),
    }


def _without(clocks: Collection[str], row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in clocks}


def newest_checkpoint(workdir: Path) -> Path:
    """The directory of the newest checkpoint; its name is 0 if there is none."""
    names = [path.name for path in (workdir / 'checkpoints').glob('*')]
    newest = max((int(name) for name in names if name.isdigit()), default=0)
    return workdir / 'checkpoints' / str(newest)


def bits_of(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, type, shape and bytes of every array of a tree."""
    leaves = [
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return [(name, str(leaf.dtype), leaf.shape, leaf.tobytes()) for name, leaf in leaves]

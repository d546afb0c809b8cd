"""The folder of a comparison: runs.jsonl, a line of figures for each run, and protocol.json.

Jobs on several machines may write to one folder. Lines are added whole, under a lock, and a line
that is damaged is set aside in a file beside, so that nothing is lost.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from spg_jax.comparison.plan import MEASURED, Comparison, Job
from spg_jax.process.files import locked, make_folder, write_whole
from spg_jax.process.json_files import check_json, read_json
from spg_jax.rl.objectives import source_file
from spg_jax.runs.identity import FREE, digest_path

LINES, PROTOCOL = 'runs.jsonl', 'protocol.json'
FINISHED, FAILED = 'finished', 'failed'
TASK = 'task'  # the kind of the entries of a protocol that hold settings of tasks
REMEDY = 'use another --workdir, or the settings that it was begun with'


class OtherProtocol(ValueError):
    """A folder holds a comparison whose figures cannot be compared with those to come."""


class Line(TypedDict):
    """A line of runs.jsonl: one run. Accuracies are fractions, points of curves [update, value]."""

    task: str
    method: str
    role: Literal['tuning', 'seed']
    seed: int
    learning_rate: float
    status: Literal['finished', 'failed']
    settings: str  # of the arm
    reference: str  # the arm that others are compared with
    budget: str  # the unit in which all arms have the same budget
    error: NotRequired[str]  # what a failed run said; it has none of the rest
    package: NotRequired[str]  # digest of the files of this package
    updates: NotRequired[int]
    forward: NotRequired[int]  # sequences through the network
    backward: NotRequired[int]
    seconds: NotRequired[float]  # of the whole run, evaluations and compilation included
    seconds_per_update: NotRequired[float | None]  # rollouts included, evaluations not
    validation_accuracy: NotRequired[float]  # of the checkpoint that validated best
    validation_reward: NotRequired[float]
    last_accuracy: NotRequired[float]  # on validation, of the policy at the end
    best_update: NotRequired[int]
    collapsed_at: NotRequired[int | None]  # the update after which the guard saw a collapse
    rewards: NotRequired[list[tuple[int, float]]]  # curve of the mean reward of rollouts
    validations: NotRequired[list[tuple[int, float]]]  # curve of the accuracy on validation
    card: NotRequired[dict[str, Any]]  # the rest is of the test split, which tuning does not see
    base_accuracy: NotRequired[float]
    base_grid_accuracy: NotRequired[float]
    accuracy: NotRequired[float]
    grid_accuracy: NotRequired[float]
    reward: NotRequired[float]
    # Where evaluations edit: the accuracy of drafts, and how many rows editing solves and spoils.
    base_draft_accuracy: NotRequired[float]
    base_wrong_to_right: NotRequired[int]
    base_right_to_wrong: NotRequired[int]
    draft_accuracy: NotRequired[float]
    wrong_to_right: NotRequired[int]
    right_to_wrong: NotRequired[int]


def job_of(line: Line) -> Job:
    """The job that a line belongs to."""
    return Job(line['task'], line['method'], line['role'], line['seed'], line['learning_rate'])


def newest(lines: Iterable[Line]) -> dict[Job, Line]:
    """The line that counts of each job: the newest of a finished run, or else of a failed one."""
    lines_of: dict[Job, Line] = {}
    for line in lines:
        job = job_of(line)
        if line['status'] == FINISHED or lines_of.get(job, line)['status'] == FAILED:
            lines_of[job] = line
    return lines_of


def read_lines(path: Path, mends: bool = False) -> list[Line]:
    """The lines of a file of runs; [] if there is none. A message counts those that are damaged.

    Args:
      path: of the file.
      mends: whether damaged lines are moved to a file beside; otherwise they are left out.
    """
    if not path.is_file():
        return []
    lines, damaged, whole = [], [], []
    for text in path.read_bytes().splitlines():
        try:
            lines.append(check_json(json.loads(text), Line, path, 'restore it'))
            whole.append(text)
        except (ValueError, RecursionError):
            if text.strip():
                damaged.append(text)
    if damaged and mends:
        place = path.with_name(path.name + '.damaged')
        with place.open('ab') as file:
            file.writelines(text + b'\n' for text in damaged)
        write_whole(path, b''.join(text + b'\n' for text in whole))
        print(f'{path}: {len(damaged)} damaged lines set aside in {place}', flush=True)
    elif damaged:
        print(f'{path}: {len(damaged)} damaged lines left out', flush=True)
    return lines


class Records:
    """The folder of a comparison."""

    def __init__(self, folder: Path):
        """Makes the folder if it does not exist."""
        self.folder = folder
        make_folder(folder, 'give a folder that can be written as --workdir')

    @property
    def path(self) -> Path:
        """The file of lines."""
        return self.folder / LINES

    def lines(self) -> dict[Job, Line]:
        """The line that counts of each job, of all jobs that write to the folder."""
        with locked(self.folder / 'lock'):
            return newest(read_lines(self.path, mends=True))

    def add(self, line: Line) -> None:
        """Adds a line, which is on disk when the function returns."""
        text = json.dumps(line, allow_nan=False).encode() + b'\n'
        with locked(self.folder / 'lock'), self.path.open('ab+') as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b'\n':  # A start before this one was killed while it wrote.
                    text = b'\n' + text
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def check(self, protocol: dict[str, Any]) -> None:
        """Refuses a folder of another protocol, and writes down what is new.

        Tasks, arms and base policies that are not there yet are added to those that are.

        Args:
          protocol: texts by kind and name, as `protocol_of` makes them.

        Raises:
          OtherProtocol: the folder holds a comparison that differs; the message names the first
            difference.
        """
        path = self.folder / PROTOCOL
        with locked(self.folder / 'lock'):
            if not path.is_file():
                if self.path.is_file():
                    raise OtherProtocol(
                        f'{path} is gone, the protocol of the runs in {self.path}; restore it, or '
                        'use another --workdir'
                    )
                write_whole(path, json.dumps(protocol, indent=1))
                return
            shape = dict[str, dict[str, Any]]
            saved = read_json(path, shape, 'restore it, or use another --workdir')
            protocol = json.loads(json.dumps(protocol))  # as it was read back
            for kind, entries in protocol.items():
                for name, entry in entries.items():
                    before = saved.setdefault(kind, {}).setdefault(name, entry)
                    if difference := _difference(kind, before, entry):
                        raise OtherProtocol(
                            f'{self.folder} holds a comparison with another {kind} {name}'
                            f'{difference}; {REMEDY}'
                        )
            write_whole(path, json.dumps(saved, indent=1))


def protocol_of(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """What makes the figures of runs comparable, by kind and name, as far as settings say it."""
    arms: dict[str, dict[str, str]] = {}
    for method in comparison.arms:
        arms[method] = comparison.own_settings(method)
        if file := source_file(arms[method]['rl.objective']):
            arms[method]['digest of its file'] = digest_path(file)
    tasks = {
        task: {
            key: value for key, value in comparison.shared_settings(task).items() if key not in FREE
        }
        for task in comparison.tasks
    }
    rules = {
        name: getattr(comparison, name)
        for name in ('rates', 'tuning_seed', 'tuning_share', 'budget', 'validations', 'own_bases')
    }
    return {'rule': rules | {'reference': comparison.reference}, TASK: tasks, 'arm': arms}


def _difference(kind: str, before: Any, wanted: Any) -> str:
    """Where two entries of a protocol differ first, in words; '' if they do not."""
    if before == wanted:
        return ''
    if isinstance(before, dict) and isinstance(wanted, dict):
        for key in [*wanted, *before]:
            # A setting of a task that only one of them has did not exist in the other's version.
            is_comparable = kind != TASK or (key in before and key in wanted)
            if is_comparable and before.get(key) != wanted.get(key):
                old, new = (
                    repr(each[key]) if key in each else 'unset' for each in (before, wanted)
                )
                return f': {key} {old}, asked for {new}'
        return ''
    return f' {before!r}, asked for {wanted!r}'


def missing_of(comparison: Comparison, lines: Mapping[Job, Line]) -> list[str]:
    """The arms, as TASK/METHOD, that lack figures of a seed."""
    measured = {
        (job.task, job.method, job.seed)
        for job, line in lines.items()
        if job.role == MEASURED and line['status'] == FINISHED
    }
    return [
        f'{task}/{method}'
        for task, method in comparison.cells()
        if not measured >= {(task, method, seed) for seed in range(comparison.seeds[method])}
    ]

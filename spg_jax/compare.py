"""Compares methods: the same base policy, prompts and budget for all, and a table of the outcome.

    python -m spg_jax.compare --config=configs/compare.py[:PRESET] [--workdir=DIR]
    python -m spg_jax.compare --config=configs/compare.py:full --jobs=2
    python -m spg_jax.compare --config=configs/compare.py:full --workdir=DIR --shard=0/4
    python -m spg_jax.compare --report=DIR [--workdir=OUT]

Every run is an ordinary run of spg_jax.train below DIR/runs. The same command goes on after an
interruption. A shard takes every n-th pair of a task and a method, with all of its runs, so that
--shard=0/4 to 3/4 share one DIR, one after the other or on four machines. --jobs=2 makes a shard of
each pair, and runs two at a time. DIR gets runs.jsonl, a line for each run, and from these lines
alone table.md and TASK.png, which --report draws again.
docs/compare.md says what is held equal and how to read the table.
"""

import contextlib
import re
import shlex
import sys
import traceback
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from absl import flags
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.assembly import check_base, check_mesh
from spg_jax.comparison.measure import figures_of
from spg_jax.comparison.plan import Comparison, Job
from spg_jax.comparison.progress import Progress
from spg_jax.comparison.reading import complete_comparison, read
from spg_jax.comparison.records import (
    FAILED,
    FINISHED,
    LINES,
    Line,
    OtherProtocol,
    Records,
    missing_of,
    newest,
    protocol_of,
    read_lines,
)
from spg_jax.comparison.report import TABLE, write_report
from spg_jax.comparison.shards import Shards, command_of
from spg_jax.comparison.tuning import Score, best_rate, next_rate
from spg_jax.errors import one_line
from spg_jax.pretrain import find_or_make_base
from spg_jax.process import cli
from spg_jax.process.config_flag import define_config_flag, sources
from spg_jax.process.interruption import Interruption
from spg_jax.rl.experience import collections_due
from spg_jax.runs import policies
from spg_jax.runs.base_figures import package_digest
from spg_jax.runs.identity import digest_path
from spg_jax.tasks.listed import Listed
from spg_jax.tasks.source import Source
from spg_jax.train import make_run

FLAGS = flags.FLAGS
OUTPUT = 'output.txt'  # in the folder of a run: what spg_jax.train would print


class Outcome(NamedTuple):
    """What came of a start."""

    finished: bool  # False if it was interrupted
    failures: dict[Job, str]  # what runs that failed said


def compare(comparison: Comparison, folder: Path, shard: tuple[int, int] = (0, 1)) -> Outcome:
    """Runs what is left of a comparison, one run after the other, and writes their lines.

    A run that fails is named, and the others go on; the next start tries it again.

    Args:
      comparison: what to run.
      folder: where everything goes, and what an earlier start left.
      shard: (index, number): which part to run.

    Raises:
      ValueError: the settings cannot work, or the folder holds another comparison.
    """
    comparison.check()
    meshes = {task: _mesh_for(comparison, task) for task in comparison.tasks}
    records = Records(folder)
    records.check(protocol_of(comparison))
    cells, failures = comparison.share(*shard), dict[Job, str]()
    progress = Progress(comparison, cells)
    for task, method in cells:
        while job := next_job(comparison, task, method, records.lines(), failures):
            progress.tell(job, records.lines(), failures)
            try:
                line = run(comparison, job, records, meshes[task])
                if line is None:
                    return Outcome(False, failures)
            except OtherProtocol:
                raise  # No other run could go on either.
            except KeyboardInterrupt:  # A run that is reporting saves nothing more.
                return Outcome(False, failures)
            except Exception as error:
                failures[job] = _told(error)
                print(f'FAILED {job.name}: {failures[job]}', file=sys.stderr, flush=True)
                if isinstance(error, BlockingIOError):
                    continue  # Another process makes this run, and writes its line.
                line = _line(comparison, job, FAILED, error=failures[job])
            records.add(line)
            progress.count(job)
    return Outcome(True, failures)


def next_job(
    comparison: Comparison,
    task: str,
    method: str,
    lines: Mapping[Job, Line],
    failures: Collection[Job],
) -> Job | None:
    """The next run of an arm: first the runs that choose its learning rate, then its seeds.

    Args:
      comparison: what to run.
      task, method: the arm.
      lines: the line that counts of each job.
      failures: jobs that this start has tried in vain.

    Returns:
      The job; None if nothing is left, or no learning rate could be chosen.
    """
    scores: dict[float, Score | None] = {}
    for rate in comparison.rates:
        job = comparison.tuning_job(task, method, rate)
        line = lines.get(job)
        if line and line['status'] == FINISHED:
            scores[rate] = line['validation_accuracy'], line['validation_reward']
        elif job in failures:
            scores[rate] = None
    rate = next_rate(comparison.rates, scores)
    if rate is not None:
        return comparison.tuning_job(task, method, rate)
    rate = best_rate(comparison.rates, scores)
    if rate is None:
        return None
    for job in comparison.jobs(task, method, rate):
        finished = job in lines and lines[job]['status'] == FINISHED
        if not finished and job not in failures:
            return job
    return None


def run(comparison: Comparison, job: Job, records: Records, mesh: Mesh) -> Line | None:
    """Makes a run, or goes on with it, and returns its line; None if it was interrupted.

    Raises:
      OtherProtocol: base policy or problems are not those of the other runs in the folder.
      Exception: whatever a run raises.
    """
    config = comparison.config_of(job)
    workdir = records.folder / 'runs' / job.name
    workdir.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh), Interruption() as interruption:
        base = find_or_make_base(config, mesh, interruption)
    if base is None:
        return None
    records.check(identity_of(comparison, job, base))
    with (workdir / OUTPUT).open('a') as file, contextlib.redirect_stdout(file):
        if not make_run(config, workdir, mesh):
            return None
    parts = comparison.parts(job.task, job.method)
    due = partial(collections_due, parts.objective, parts.batching)
    figures = figures_of(workdir, job, due)
    forward, backward = comparison.counts(job.task, job.method, figures['updates'])
    counts = {'forward': forward, 'backward': backward}
    return _line(comparison, job, FINISHED, package=package_digest(), **counts, **figures)


def identity_of(comparison: Comparison, job: Job, base: Path) -> dict[str, dict[str, Any]]:
    """Digests of the base policy and of the problems of a job, as entries of a protocol."""
    config = comparison.config_of(job)
    source = comparison.parts(job.task, job.method).task.source('train', config.task.data_dir)
    problems = source.digest() if isinstance(source, Source | Listed) else ''
    seed = f', base.seed {config.base.seed}'
    return {
        'base policy': {job.task + seed: policies.digest_of(base) or digest_path(base)},
        'problems': {job.task: problems},
    }


def _line(comparison: Comparison, job: Job, status: str, **figures: Any) -> Line:
    """A line with what identifies a run, and its figures."""
    words = comparison.words(job.method)
    head = {
        'task': job.task,
        'method': job.method,
        'role': job.role,
        'seed': job.seed,
        'learning_rate': job.rate,
        'status': status,
        'settings': ' '.join(f'{key}={value}' for key, value in words.items()),
        'reference': comparison.reference,
        'budget': comparison.budget,
    }
    return cast(Line, head | figures)


def _told(error: Exception) -> str:
    """What a user is told of a run that failed, in one line; a bug shows its traceback as well."""
    if isinstance(error, cli.MENDABLE):
        return ' '.join(str(error).split())
    traceback.print_exception(error)
    return one_line(error)


def _mesh_for(comparison: Comparison, task: str) -> Mesh:
    """The devices of a task; raises ValueError where its arms do not fit on them."""
    config = comparison.config_of(comparison.jobs(task, comparison.reference, 1.0)[0])
    mesh = sharding.make_mesh(config.mesh)
    for method in comparison.arms:
        parts = comparison.parts(task, method)
        check_mesh(config, parts, mesh)
        if not config.base.checkpoint:
            check_base(config, parts)
    return mesh


def beside_each_other(comparison: Comparison, folder: Path, jobs: int) -> Outcome:
    """`compare` in processes, one for each task and arm, of which `jobs` run at a time.

    Raises:
      ValueError: the settings cannot work, or this process is told to run one shard.
    """
    if FLAGS['shard'].present:
        raise ValueError('--jobs given with --shard, which is for one process; give one of the two')
    comparison.check()
    cells = comparison.cells()
    shards = Shards(command_of(sys.argv[1:]), len(cells), folder / 'shards')
    progress = Progress(comparison, cells)

    def tell() -> None:
        lines = newest(read_lines(folder / LINES))
        left = len(progress.jobs_left(lines, ()))
        print(f'{len(lines)} runs have ended, up to {left} are left', flush=True)

    print(f'{len(cells)} shards, {jobs} at a time; {shards.output(0).parent} has their output')
    try:
        failed = shards.run(jobs, tell)
    except KeyboardInterrupt:
        return Outcome(False, {})
    lines, failures = newest(read_lines(folder / LINES)), dict[Job, str]()
    for index in failed:
        recorded = {
            job: line['error']
            for job, line in lines.items()
            if (job.task, job.method) == cells[index] and line['status'] == FAILED
        }
        # A shard that failed before any run, such as in a folder of another protocol, has no line.
        first = comparison.jobs(*cells[index], comparison.rates[0])[0]
        failures |= recorded or {first: f'see the end of {shards.output(index)}'}
    return Outcome(True, failures)


def shard_of(text: str) -> tuple[int, int]:
    """(index, number) of a shard that is written as 0/4.

    Raises:
      ValueError: it is written otherwise, or there is no such shard.
    """
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    index, number = map(int, match.groups()) if match else (0, 0)
    if index >= number:
        raise ValueError(f'--shard is {text!r}; use i/n with i from 0 to n - 1, such as 0/4')
    return index, number


def default_folder(config: str) -> str:
    """The folder of a comparison by the value of --config, such as runs/compare-smoke."""
    name, _, preset = config.rpartition('/')[2].partition(':')
    return f'runs/{name.removesuffix(".py")}' + (f'-{preset}' if preset else '')


def closing_lines(folder: Path, tasks: Iterable[str]) -> str:
    """The last lines on the screen: where everything is, and what to do next."""
    curves = ' '.join(f'{folder}/{task}.png' for task in tasks)
    quoted = shlex.quote(str(folder))
    return (
        f'table     {folder}/{TABLE}\ncurves    {curves}\nruns      {folder}/{LINES}\n'
        f'redraw    python -m spg_jax.compare --report={quoted}\n'
        f'look      python -m spg_jax.evaluate --workdir={quoted}/runs/TASK/METHOD/RUN'
    )


def report(path: Path, folder: Path) -> None:
    """Writes tables and curves of a file of lines, or of the folder of a comparison.

    Raises:
      FileNotFoundError, ValueError: there are no lines.
    """
    file = path / LINES if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f'{file} does not exist; give a folder of spg_jax.compare')
    lines = read_lines(file)
    if not lines:
        raise ValueError(f'{file} has no line of a run; give a folder of spg_jax.compare')
    print(write_report(lines, folder))
    print(f'table     {folder}/{TABLE}')


def main(_: list[str]) -> None:
    if FLAGS.report:
        path = Path(FLAGS.report)
        report(path, Path(FLAGS.workdir or (path if path.is_dir() else path.parent)))
        return
    if FLAGS.config is None:
        raise ValueError('--config not given; use --config=configs/compare.py:smoke, or --report')
    comparison, shard = read(FLAGS.config), shard_of(FLAGS.shard)
    folder = Path(FLAGS.workdir or default_folder(sources().file))
    print(f'workdir {folder}', flush=True)
    if FLAGS.jobs > 1:
        outcome = beside_each_other(comparison, folder, FLAGS.jobs)
    else:
        cli.compile_cache()
        outcome = compare(comparison, folder, shard)
    lines = newest(read_lines(folder / LINES))
    print(write_report(lines.values(), folder))
    for job, message in outcome.failures.items():
        print(f'FAILED {job.name}: {message}')
    if not outcome.finished:
        print('stopped, saved; run the same command to go on')
    elif missing := missing_of(comparison, lines):
        print(
            f'figures are missing of {", ".join(missing)}; run the other shards, or this one again'
        )
    print(closing_lines(folder, comparison.tasks))
    if outcome.failures:
        raise SystemExit(1)


if __name__ == '__main__':
    define_config_flag(complete_comparison, required=False)
    cli.define_path_flag(
        'workdir', '', "The folder of the comparison; '' is runs/CONFIG-PRESET.", saves=True
    )
    cli.define_path_flag(
        'report', '', 'Only draw the tables and curves of this folder or file of lines.'
    )
    flags.DEFINE_string('shard', '0/1', 'Which part to run, i/n with i from 0 to n - 1.')
    flags.DEFINE_integer(
        'jobs', 1, 'Processes at a time on this machine, such as one for each core.', lower_bound=1
    )
    cli.run(main)

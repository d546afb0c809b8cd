"""Reinforcement learning of a base policy: one run, resumable, from nothing to a report.

    python -m spg_jax.train --config=configs/countdown.py [--workdir=DIR] [--config.spg.beta=2 …]

--explain prints every setting in force, what it means and where its value comes from, and exits.

Run the same command again to go on after an interruption. DIR gets metrics.jsonl, TensorBoard
events, completions.jsonl (a few of each rollout), curves.png, best/ (the policy that validated
best), test/ (its completions of the test problems, with their cards) and result.json. With
--distributed, every process of a job runs the command; DIR is one that all of them see.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh
from rich.console import Console

from spg_jax import sharding
from spg_jax.assembly import (
    Parts,
    assemble,
    check_base,
    check_mesh,
    fit_to_model,
    model_of,
)
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.explain import print_explanation
from spg_jax.method import complete
from spg_jax.models.policy import Variables
from spg_jax.planning.duration import cpu_seconds
from spg_jax.pretrain import base_directory, find_or_make_base
from spg_jax.process import cli, distributed
from spg_jax.process.config_flag import define_config_flag, sources
from spg_jax.process.files import local_path, write_whole
from spg_jax.process.interruption import Interruption
from spg_jax.process.progress import track
from spg_jax.process.trace import show_trace
from spg_jax.rl.evaluator import Figures, Transcript
from spg_jax.runs import plots, policies
from spg_jax.runs.ahead import update_ahead
from spg_jax.runs.base_figures import BaseFigures, base_figures, identity_of
from spg_jax.runs.claim import claimed
from spg_jax.runs.directory import default_workdir, identity
from spg_jax.runs.evaluations import TEST, write_evaluation
from spg_jax.runs.guard import Guard, Rules
from spg_jax.runs.preparation import ProblemSets, Programs, check_origins, origins_of, prepare
from spg_jax.runs.profile import prepare_tracing, profiled
from spg_jax.runs.report import (
    RESULT,
    closing_lines,
    is_finished,
    quality,
    read_result,
    summary,
    validation_row,
)
from spg_jax.runs.run import Run
from spg_jax.runs.saved import Arrays, go_back, restored_by, slowed
from spg_jax.runs.wandb_log import check_wandb
from spg_jax.tasks.task import Example
from spg_jax.training.train_state import Metrics, TrainState

FLAGS = flags.FLAGS
STUCK = 'lower optimizer.learning_rate in a new --workdir'


def make_run(config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh) -> bool:
    """Makes a run in a directory, or goes on with it. Returns whether it is finished.

    Raises:
      ValueError, OSError, FloatingPointError: the directory cannot be used, or what `train` raises.
    """
    finished = is_finished(workdir, config.train.steps)
    with claimed(workdir, identity(config), finished), jax.set_mesh(mesh):
        if finished:
            return True
        if distributed.is_leader():  # A run that is made longer is not finished, whoever asks.
            (workdir / RESULT).unlink(missing_ok=True)
        with Interruption() as interruption:
            return train(config, workdir, mesh, interruption)


def train(
    config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh, interruption: Interruption
) -> bool:
    """The whole run. Returns whether it finished; if not, it was interrupted and is saved.

    Raises:
      ValueError, FileNotFoundError: settings, base policy or problems cannot be used.
      FloatingPointError: `train.max_skipped` updates in a row were not finite; the state is saved.
    """
    parts = assemble(config)
    if not config.base.checkpoint:  # Fail early: a base policy takes minutes to train.
        fit_to_model(config, parts, model_of(config, vocab_size=1, platform='cpu'))
    base = find_or_make_base(config, mesh, interruption)
    if base is None:
        return False
    parts = fit_to_model(config, parts, policies.model_of_policy(base))
    guard = Guard(Rules(**config.guard), config.evaluation.problems, partial(print, flush=True))
    settings = config.to_dict()
    run = Run(workdir, config.checkpoint.keep, config.train.wandb, settings, guard.read)
    # A run that is made longer keeps the length of its warm-up.
    planned = run.record.get('planned_steps', config.train.steps)
    state, problems, programs = prepare(config, parts, base, mesh, planned)
    validation = Validation(config, run, guard, programs, problems.validation, base)
    origins = origins_of(parts, problems, base)
    patience = min(config.train.max_skipped, config.train.steps)

    # --- start, or go on where an earlier start was cut -----------------------------------------
    if run.resumes:
        arrays = restore(run, guard, state, parts, programs, mesh)
        check_origins(workdir, run.record.get('origins', {}), origins)
        run.check_progress(patience, STUCK)
        programs.prompts.set_state(run.record['prompts'])
        programs = slowed(programs, run.record)
    else:
        arrays = Arrays(state, None, None)
        programs = update_ahead(programs, parts, problems, state, mesh)
        figures = figures_of_base(parts, problems, programs, state, base, mesh)
        run.record['base'] = figures['report']
        validation.look_at(state, figures['validation'])
    programs = profiled(programs, config.train.profile, workdir)

    # --- the loop: metrics are read one update late, so that the next is already dispatched -------
    updates = range(run.step, config.train.steps)
    for step in track(updates, f'{config.rl.objective} updates', lambda: _describe(run)):
        gap: Metrics = {}
        if due := programs.due(step):  # If none, the checkpoint had the experience.
            run.flush()  # The samples come from the update under way, so all wait for it anyway.
            if guard.has_given_up():
                print(f'update {step}: {guard.collapse}, and no rollback is left; the run ends')
                break
            if guard.goes_back():
                arrays, programs = go_back(run, guard, arrays, parts, programs, mesh)
            arrays, gap = collect(run, programs, arrays, step, due)
        arrays, metrics = update(programs, arrays, step, config.train.diagnose_every)
        run.push(metrics | gap)
        last, stop = run.step == config.train.steps, interruption.requested()
        if last:
            run.flush()  # no update comes after it that would read its metrics
        stuck = run.skipped(patience)
        if not stuck and (last or run.step % config.evaluation.every == 0):
            run.flush()
            validation.look_at(arrays.state)
        scheduled = run.step % config.checkpoint.every == 0
        if scheduled:  # Others depend on cuts, which must not change what counts as sound.
            run.flush()
            guard.mark(run.step)
        if scheduled or last or stop or stuck:
            save(run, guard, programs, arrays, planned_steps=planned, origins=origins)
        if stuck:
            run.check_progress(patience, STUCK)
        if stop:
            print(f'stopped after update {run.step}, saved; run the same command to go on')
            return False
    run.record['guard'] = guard.memory
    run.close()
    interruption.release()
    best = arrays.state.frozen | policies.load_trained(workdir / 'best', programs.policy, mesh)
    report(config, parts, run, programs, best, problems.test, base)
    return True


def collect(
    run: Run, programs: Programs, arrays: Arrays, step: int, batches: int
) -> tuple[Arrays, Metrics]:
    """The arrays with completions of the next batches of prompts, from which updates learn.

    The metrics say how far the log-probabilities that a sampler records are from the model's, where
    it records any; of several batches the last one is measured.
    """
    state, rollout, probe = arrays
    gap: Metrics = {}
    for collected in range(batches):
        batch = next(programs.prompts)
        fresh, texts = programs.collect(state, batch, step)
        gap = programs.gap(state, fresh, step)
        run.samples.write(step, batch.examples, texts, fresh)
        rollout = programs.keep(rollout, fresh, step, collected)
        if step == collected == 0 and programs.diagnosis:
            probe = programs.diagnosis.begin(state, fresh)
    return Arrays(state, rollout, probe), gap


def update(
    programs: Programs, arrays: Arrays, step: int, diagnose_every: int
) -> tuple[Arrays, Metrics]:
    """The arrays after the update that follows `step` others, and its metrics."""
    state, rollout, probe = arrays
    state, metrics = programs.update(state, rollout)
    if probe and programs.diagnosis and (step + 1) % diagnose_every == 0:
        probe, figures = programs.diagnosis.look(state, probe)
        metrics |= figures
    return Arrays(state, rollout, probe), metrics


def save(run: Run, guard: Guard, programs: Programs, arrays: Arrays, **record: Any) -> None:
    """Writes a checkpoint with everything that a later start needs, and `record`."""
    run.save(
        arrays.to_save(),
        guard=guard.memory,
        needed=guard.needed,
        probe_length=arrays.probe and arrays.probe.rows.prompt.shape[1],
        prompts=programs.prompts.get_state(),
        prompt_length=arrays.rollout.prompt.shape[1],
        **record,
    )


class Validation:
    """Measures the policy on validation problems, and keeps the best one as best/."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        run: Run,
        guard: Guard,
        programs: Programs,
        problems: list[Example],
        base: Path,
    ):
        self._config, self._run, self._programs = config, run, programs
        self._guard = guard
        self._problems, self._base = problems, policies.base_of(base)

    def look_at(self, state: TrainState, figures: Figures | None = None) -> None:
        """Writes the figures of a policy, and the policy if none before it was better.

        Args:
          state: holds the policy.
          figures: of its validation; None measures them.
        """
        run, programs = self._run, self._programs
        if figures is None:
            figures = programs.evaluator.validate(state.variables, self._problems)
        run.write(validation_row(figures))
        self._guard.read_validation(run.step, figures['accuracy'])
        if 'best' in run.record and quality(figures) <= quality(run.record['best']):
            return
        run.record['best'] = {'step': run.step} | figures
        notes = {'best': run.record['best'], 'config': self._config.to_dict()}
        policies.save_policy(
            run.directory / 'best',
            state.variables,
            programs.policy.config,
            programs.tokenizer,
            notes,
            self._base,
        )


def figures_of_base(
    parts: Parts,
    problems: ProblemSets,
    programs: Programs,
    state: TrainState,
    base: Path,
    mesh: Mesh,
) -> BaseFigures:
    """The figures of the policy before the first update, measured unless a run before has."""

    def measure() -> BaseFigures:
        print('evaluating the base policy', flush=True)
        return {
            'report': programs.evaluator.report(state.variables, problems.test),
            'validation': programs.evaluator.validate(state.variables, problems.validation),
        }

    identity = identity_of(
        programs.policy,
        state.variables,
        parts.evaluation_task,
        programs.tokenizer,
        parts.evaluation,
        (problems.test, problems.validation),
        mesh,
    )
    return base_figures(base, identity, measure)


def restore(
    run: Run, guard: Guard, state: TrainState, parts: Parts, programs: Programs, mesh: Mesh
) -> Arrays:
    """The arrays of the newest checkpoint, on the devices of this start, and what the guard saw.

    Raises:
      FileNotFoundError: the best policy of the run is gone, which its report would need.
      ValueError: no checkpoint is whole, or the best policy is damaged.
    """
    best = run.directory / 'best'
    if not policies.is_policy(best):
        raise FileNotFoundError(
            f'{best} is gone, the policy that validated best so far; restore it, or use another '
            '--workdir'
        )
    policies.load_trained(best, programs.policy, mesh)  # Fail early: the report reads it again.
    target, arrays_of = restored_by(run, state, parts, programs, mesh)
    arrays = arrays_of(run.restore(target))
    guard.memory |= run.record.get('guard', {})
    return arrays


def report(
    config: ml_collections.ConfigDict,
    parts: Parts,
    run: Run,
    programs: Programs,
    best: Variables,
    problems: list[Example],
    base: Path,
) -> None:
    """Measures the best policy on problems that nothing has seen, and finishes the run."""
    transcripts: list[Transcript] = []
    figures = programs.evaluator.report(best, problems, transcripts)
    completion = programs.evaluator.trace(best, problems[0])
    if distributed.is_leader():
        plots.curves(run.directory)
        show_example(parts, programs.tokenizer, problems[0], completion)
        card = write_evaluation(
            run.directory / TEST, config, problems, transcripts, 'validation', figures
        )
        result = summary(config.to_dict(), run, figures, base) | {'card': card.to_json()}
        # This file comes last, because it says that the run is finished.
        write_whole(run.directory / RESULT, json.dumps(result, indent=1))
    distributed.barrier('result')


def show_example(
    parts: Parts,
    tokenizer: Tokenizer,
    example: Example,
    completion: tuple[np.ndarray, np.ndarray],
) -> None:
    """Prints a prompt and how its completion (tokens [C], commit steps [C]) was filled in."""
    print(f'\n{parts.evaluation_task.prompt(example)}')
    show_trace(*completion, lambda token: tokenizer.decode([token], True), Console())


def opening_line(config: ml_collections.ConfigDict, parts: Parts, mesh: Mesh) -> str:
    """What a new run will do, and on CPUs roughly how long that takes."""
    base, duration = config.base.checkpoint, ''
    if not base:
        directory = base_directory(config)
        exists = policies.is_policy(directory)
        steps = sum(stage.steps for stage in parts.stages)
        base = str(directory) if exists else f'a base policy that is trained in {steps} steps'
        if mesh.devices.flat[0].platform == 'cpu':
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1
            minutes = max(1, round(cpu_seconds(config, parts, cores, exists) / 60))
            duration = f'; roughly {minutes} min on {cores} CPU cores'
    return (
        f'{config.task.name} by {config.rl.objective}: {config.train.steps} updates of '
        f'{parts.batching.rows} completions, from {base}{duration}'
    )


def _describe(run: Run) -> str:
    reward, best = run.last_row.get('reward'), run.record['best']
    shown = f'reward {reward:.3f}  ' if reward is not None else ''
    return f'{shown}best validation {best["accuracy"]:.3f} at {best["step"]}'


def main(_: list[str]) -> None:
    config = FLAGS.config
    if FLAGS.explain:
        if distributed.is_leader():
            print_explanation(config, sources())
        assemble(config)  # Refuse what cannot work, as a run would.
        return
    parts = assemble(config)
    if config.train.profile:
        prepare_tracing()
    mesh = sharding.make_mesh(config.mesh)
    check_mesh(config, parts, mesh)
    if not config.base.checkpoint:
        check_base(config, parts)
    workdir = local_path(FLAGS.workdir or str(default_workdir(config)), saves=True)
    print(f'{opening_line(config, parts, mesh)}\nworkdir {workdir}', flush=True)
    if config.train.wandb:
        check_wandb(config.train.wandb)
    cli.compile_cache()
    if make_run(config, workdir, mesh):
        print(closing_lines(read_result(workdir / RESULT), workdir))


if __name__ == '__main__':
    define_config_flag(complete)
    cli.define_distributed_flag()
    flags.DEFINE_bool('explain', False, 'Print every setting and where it comes from, and exit.')
    cli.define_path_flag(
        'workdir', '', "Where the run lives; '' is runs/TASK-OBJECTIVE-HASH.", saves=True
    )
    cli.run(main)

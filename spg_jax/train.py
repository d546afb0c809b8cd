"""Reinforcement learning of a base policy: one run, resumable, from nothing to a report.

    python -m spg_jax.train --config=configs/countdown.py [--workdir=DIR] [--config.rl.beta=2 …]

Run the same command again to go on after an interruption. DIR gets metrics.jsonl, TensorBoard
events, completions.jsonl, curves.png, best/ (the policy that validated best) and result.json. With
--distributed, every process of a job runs the command; DIR is one that all of them see.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh
from rich.console import Console

from spg_jax import sharding
from spg_jax.assembly import Parts, assemble, check_mesh
from spg_jax.data import batches
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.models.policy import Policy, Variables, check_adapters, with_adapters
from spg_jax.planning.duration import cpu_seconds
from spg_jax.pretrain import base_directory, find_or_make_base
from spg_jax.process import cli, distributed
from spg_jax.process.files import write_whole
from spg_jax.process.interruption import Interruption
from spg_jax.process.progress import track
from spg_jax.process.trace import show_trace
from spg_jax.random import check_range
from spg_jax.rl.evaluator import Evaluator
from spg_jax.rl.learner import make_update
from spg_jax.rl.rollout import Rollout, empty_rollout, make_collect
from spg_jax.runs import plots, policies
from spg_jax.runs.directory import claimed, default_workdir, identity
from spg_jax.runs.report import (
    check_record,
    closing_lines,
    quality,
    read_result,
    summary,
    validation_row,
)
from spg_jax.runs.run import Run
from spg_jax.runs.wandb_log import check_wandb
from spg_jax.tasks.task import Example
from spg_jax.training import optimizers
from spg_jax.training.train_state import Metrics, TrainState, initial_state, shardings_of

FLAGS = flags.FLAGS


def train(
    config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh, interruption: Interruption
) -> bool:
    """The whole run. Returns whether it finished; if not, it was interrupted and is saved.

    Raises:
      ValueError, FileNotFoundError: settings, base policy or problems cannot be used.
      FloatingPointError: `train.max_skipped` updates in a row were not finite; the state is saved.
    """
    parts = assemble(config)
    base = find_or_make_base(config, mesh, interruption)
    if base is None:
        return False
    run = Run(workdir, config.checkpoint.keep, config.train.wandb, config.to_dict())
    # A run that is made longer keeps the length of its warm-up.
    planned = run.record.get('planned_steps', config.train.steps)
    state, problems, programs = prepare(config, parts, base, mesh, planned)
    batching, prompts, evaluator = parts.batching, programs.prompts, programs.evaluator

    def validate(state: TrainState) -> None:
        """Measures the policy, and keeps it as best/ if none before it was better."""
        figures = evaluator.validate(state.variables, problems.validation)
        run.write(validation_row(figures))
        if 'best' not in run.record or quality(figures) > quality(run.record['best']):
            run.record['best'] = {'step': run.step} | figures
            notes = {'best': run.record['best'], 'config': config.to_dict()}
            made_from = policies.base_of(base)
            policies.save_policy(
                workdir / 'best',
                state.variables,
                programs.policy.config,
                programs.tokenizer,
                notes,
                made_from,
            )

    # --- start, or go on where an earlier start was cut -----------------------------------------
    if run.resumes:
        if not policies.is_policy(workdir / 'best'):
            raise FileNotFoundError(
                f'{workdir}/best is gone, the policy that validated best so far; restore it, or '
                'use another --workdir'
            )

        def saved_arrays(record: dict[str, Any]) -> tuple[TrainState, Rollout]:
            check_record(record, workdir / 'checkpoints')
            rows, length = batching.rows, parts.sampling.length
            return state.replace(frozen={}), empty_rollout(
                rows, record['prompt_length'], length, mesh
            )

        saved, rollout = run.restore(saved_arrays)
        state = saved.replace(frozen=state.frozen)
        prompts.set_state(run.record['prompts'])
    else:
        print('evaluating the base policy', flush=True)
        run.record['base'] = evaluator.report(state.variables, problems.test)
        validate(state)

    # --- the loop: metrics are read one update late, so that the next is already dispatched -------
    updates = range(run.step, config.train.steps)
    patience = min(config.train.max_skipped, config.train.steps)
    for step in track(updates, f'{config.rl.objective} updates', lambda: _describe(run)):
        if step % batching.inner_updates == 0:  # otherwise the rollout came with the checkpoint
            batch = next(prompts)
            rollout, texts = programs.collect(state.variables, batch, step)
            run.samples.write(step, batch.examples, texts, rollout)
        state, metrics = programs.update(state, rollout)
        run.push(metrics)
        stuck = run.skipped(patience)
        last, stop = run.step == config.train.steps, interruption.requested()
        if not stuck and (last or run.step % config.evaluation.every == 0):
            run.flush()
            validate(state)
        if last or stop or stuck or run.step % config.checkpoint.every == 0:
            run.save(
                (state.replace(frozen={}), rollout),
                prompts=prompts.get_state(),
                prompt_length=rollout.prompt.shape[1],
                planned_steps=planned,
            )
        if stuck:
            raise FloatingPointError(
                f'{workdir}: {patience} non-finite updates in a row, saved '
                f'at step {run.step}; lower optimizer.learning_rate in a new --workdir'
            )
        if stop:
            print(f'stopped after update {run.step}, saved; run the same command to go on')
            return False
    run.close()
    interruption.release()

    # --- the policy that validated best, on problems that nothing has seen ------------------------
    best = state.frozen | policies.load_trained(workdir / 'best', programs.policy, mesh)
    result = summary(config.to_dict(), run, evaluator.report(best, problems.test), base)
    completion = evaluator.trace(best, problems.test[0])
    if distributed.is_leader():
        plots.curves(workdir)
        show_example(parts, programs.tokenizer, problems.test[0], completion)
        # This file comes last, because it says that the run is finished.
        write_whole(workdir / 'result.json', json.dumps(result, indent=1))
    distributed.barrier('result')
    return True


class ProblemSets(NamedTuple):
    """The problems of a run, by what they are for."""

    train: batches.Problems
    validation: list[Example]
    test: list[Example]


def read_problems(
    config: ml_collections.ConfigDict, parts: Parts, tokenizer: Tokenizer
) -> ProblemSets:
    """Finds or makes the problems, and measures every training prompt before any is used.

    Raises:
      ValueError: problems cannot be had, or prompts do not fit.
    """
    with distributed.leader_first('problems'):
        source = parts.task.source('train', config.task.data_dir)
    check_range(len(source), parts.batching.group_size)
    validation = parts.task.source('validation', config.task.data_dir)
    test = parts.task.source('test', config.task.data_dir)
    train, message = batches.fit_prompts(
        parts.task, tokenizer, source, config.sampling.prompt_length, config.data.long_prompts
    )
    if message:
        print(message, flush=True)
    return ProblemSets(train, validation[: config.evaluation.problems], list(test))


class Programs(NamedTuple):
    """What a run calls: the policy and the compiled functions around it."""

    policy: Policy
    tokenizer: Tokenizer
    prompts: grain.DatasetIterator  # endless batches of training prompts
    collect: Callable[[Variables, batches.PromptBatch, int], tuple[Rollout, list[str]]]
    update: Callable[[TrainState, Rollout], tuple[TrainState, Metrics]]
    evaluator: Evaluator


def prepare(
    config: ml_collections.ConfigDict, parts: Parts, base: Path, mesh: Mesh, planned_steps: int
) -> tuple[TrainState, ProblemSets, Programs]:
    """Reads problems and base policy, and makes the train state and the programs of a run.

    The learning rate warms up for a share of `planned_steps`, the updates that were asked for when
    the run began.

    Weights may be large, so they are read after everything else was found to fit.

    Raises:
      ValueError, FileNotFoundError: base policy, adapters or problems cannot be used.
    """
    seed, batching = config.train.seed, parts.batching
    adapters = policies.check_policy(base, mesh, parts.adapter)
    check_adapters(adapters, parts.lora, where=parts.adapter or base)
    problems = read_problems(config, parts, policies.load_tokenizer(base))
    policy, tokenizer, variables = policies.load_policy(
        base, mesh, parts.adapter, **parts.execution
    )
    policy, variables = with_adapters(policy, variables, parts.lora, seed, mesh)
    optimizer = optimizers.for_rl(parts.optimizer, planned_steps)
    state = initial_state(variables, optimizer, policy, mesh, average=False)
    shardings = shardings_of(state)
    prompts = batches.prompts(
        parts.task,
        tokenizer,
        problems.train,
        batch_size=batching.prompts,
        buckets=parts.prompt_lengths,
        seed=seed,
        truncate=config.data.long_prompts == 'truncate_left',
        local_prompts=batching.local_prompts(mesh),
    )
    programs = Programs(
        policy=policy,
        tokenizer=tokenizer,
        prompts=prompts,
        collect=make_collect(policy, parts.task, tokenizer, parts.sampling, batching, seed, mesh),
        update=make_update(policy, parts.objective, optimizer, batching, seed, shardings),
        evaluator=Evaluator(policy, parts.evaluation_task, tokenizer, parts.evaluation, mesh),
    )
    return state, problems, programs


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
    parts = assemble(config)
    mesh = sharding.make_mesh(config.mesh)
    check_mesh(config, parts, mesh)
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else default_workdir(config)
    print(f'{opening_line(config, parts, mesh)}\nworkdir {workdir}', flush=True)
    if config.train.wandb:
        check_wandb(config.train.wandb)
    cli.compile_cache()
    result = workdir / 'result.json'
    with claimed(workdir, identity(config), result.is_file()), jax.set_mesh(mesh):
        if not result.is_file() or read_result(result)['steps'] < config.train.steps:
            with Interruption() as interruption:
                if not train(config, workdir, mesh, interruption):
                    return
    print(closing_lines(read_result(result), workdir))


if __name__ == '__main__':
    cli.define_config_flag()
    cli.define_distributed_flag()
    cli.define_path_flag(
        'workdir', '', "Where the run lives; '' is runs/TASK-OBJECTIVE-HASH.", saves=True
    )
    cli.run(main)

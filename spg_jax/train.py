"""Base policy -> SPG -> evaluation: one run, resumable, from nothing to a report.

    python -m spg_jax.train --config=configs/countdown.py [--workdir=DIR] [--config.rl.beta=2 …]

Run the same command again to go on after an interruption. DIR gets metrics.jsonl, TensorBoard
events, completions.jsonl, curves.png, best/ (the policy that validated best) and result.json. With
--distributed, every process of a job runs the command; DIR is one that all of them see.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.config import (
    adapter_of,
    evaluation_task,
    execution_of,
    lora_of,
    prompt_buckets,
    sampling_config,
    training_task,
)
from spg_jax.data import batches
from spg_jax.models.policy import Variables, check_adapters, with_adapters
from spg_jax.pretrain import find_or_make_base
from spg_jax.process import cli, distributed
from spg_jax.process.interruption import Interruption
from spg_jax.process.progress import track
from spg_jax.random import check_range
from spg_jax.rl.evaluator import Evaluator
from spg_jax.rl.learner import make_update
from spg_jax.rl.objectives import REGISTRY
from spg_jax.rl.rollout import empty_rollout, make_collect
from spg_jax.runs import checkpoints, plots, policies
from spg_jax.runs.directory import claimed, default_workdir
from spg_jax.runs.metrics import MetricsWriter, SampleWriter
from spg_jax.training import optimizers
from spg_jax.training.train_state import initial_state, shardings_of
from spg_jax.validation import check_mesh, validate

FLAGS = flags.FLAGS


def train(
    config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh, interruption: Interruption
) -> bool:
    """The whole run. Returns whether it finished; if not, it was interrupted and is saved.

    Raises:
      FloatingPointError: `train.max_skipped` updates in a row were not finite; the state is saved.
    """
    # --- base policy and task -------------------------------------------------------------------
    base_directory = find_or_make_base(config, mesh, interruption)
    if base_directory is None:
        return False
    started = time.monotonic()
    # All is looked at, every prompt too, before the parameters, which may be large, are read.
    adapter = adapter_of(config)
    has = policies.check_policy(base_directory, mesh, adapter)
    check_adapters(has, lora_of(config), where=adapter or base_directory)
    tokenizer = policies.load_tokenizer(base_directory)
    task = training_task(config)
    with distributed.leader_first('problems'):
        source = task.source('train', config.task.data_dir)
    check_range(len(source), config.rl.group_size)
    validation = task.source('validation', config.task.data_dir)[: config.evaluation.problems]
    test = list(task.source('test', config.task.data_dir))
    problems, said = batches.fit_prompts(
        task, tokenizer, source, config.sampling.prompt_length, config.data.long_prompts
    )
    if said:
        print(said, flush=True)
    policy, tokenizer, variables = policies.load_policy(
        base_directory, mesh, adapter, **execution_of(config)
    )
    policy, variables = with_adapters(policy, variables, lora_of(config), config.train.seed, mesh)

    # --- programs -------------------------------------------------------------------------------
    optimizer = optimizers.for_rl(config.optimizer, config.train.steps)
    collect = make_collect(policy, task, tokenizer, sampling_config(config), config, mesh)
    prompts = batches.prompts(
        task,
        tokenizer,
        problems,
        batch_size=config.rl.prompts,
        buckets=prompt_buckets(config),
        seed=config.train.seed,
        truncate=config.data.long_prompts == 'truncate_left',
        own=own_prompts(config, mesh),
    )
    evaluator = Evaluator(policy, evaluation_task(config), tokenizer, config, mesh)

    # --- start, or go on where an earlier run was cut -------------------------------------------
    state = initial_state(variables, optimizer, policy, mesh, average=False)
    objective = REGISTRY[config.rl.objective](config)
    update = make_update(policy, objective, optimizer, config, shardings_of(state))
    run = checkpoints.RunCheckpoints(workdir / 'checkpoints', config.checkpoint.keep)
    record: dict[str, Any] = {'seconds': 0.0}

    def save_best(variables: Variables) -> None:
        notes = {'best': record['best'], 'config': config.to_dict()}
        base = policies.base_of(base_directory)
        policies.save_policy(workdir / 'best', variables, policy.config, tokenizer, notes, base)

    if run.latest_step is not None:
        frozen, record = state.frozen, run.record()
        rollout = empty_rollout(config, mesh, record['prompt_length'])
        saved = state.replace(frozen={}), rollout
        state, rollout = run.restore(checkpoints.abstract(saved))
        state = state.replace(frozen=frozen)
        prompts.set_state(record['prompts'])
    else:
        print('evaluating the base policy', flush=True)
        record['base'] = evaluator.report(state.variables, test)
        record['best'] = {'step': 0} | evaluator.validate(state.variables, validation)
        save_best(state.variables)
    start = int(state.step)
    seconds_before = record['seconds']
    writer = MetricsWriter(
        workdir,
        start if start else -1,
        record.get('last_row'),
        wandb=config.train.wandb,
        seconds=seconds_before + time.monotonic() - started,
    )
    samples = SampleWriter(workdir, start)
    if start == 0:
        writer.write({'step': 0} | _validation_row(record['best']))

    def save() -> None:
        writer.flush()
        record.update(
            prompts=prompts.get_state(),
            prompt_length=rollout.prompt.shape[1],
            seconds=seconds_before + time.monotonic() - started,
            last_row=writer.last_row,
        )
        run.save(int(state.step), (state.replace(frozen={}), rollout), record)

    # --- the loop: metrics are read one update late, so that the next is already dispatched -------
    what = f'{config.rl.objective} updates'
    steps = range(start, config.train.steps)
    for step in track(steps, what, lambda: _describe(writer.last_row, record['best'])):
        if step % config.rl.inner_updates == 0:  # else the rollout came with the checkpoint
            batch = next(prompts)
            rollout, texts = collect(state.variables, batch, step)
            samples.write(step, batch.examples, texts, rollout)
        state, metrics = update(state, rollout)
        done = step + 1
        writer.push(done, metrics)
        if writer.last_row.get('skipped_in_a_row', 0) >= config.train.max_skipped:
            save()
            raise FloatingPointError(
                f'{workdir}: {config.train.max_skipped} non-finite updates in a row, saved '
                f'at step {done}; lower optimizer.learning_rate in a new --workdir'
            )
        last, stop = done == config.train.steps, interruption.requested()
        if last or done % config.evaluation.every == 0:
            writer.flush()
            found = evaluator.validate(state.variables, validation)
            writer.write({'step': done} | _validation_row(found))
            if _quality(found) > _quality(record['best']):
                record['best'] = {'step': done} | found
                save_best(state.variables)
        if last or done % config.checkpoint.every == 0 or stop:
            save()
        if stop:
            print(f'stopped after update {done}, saved; run the same command to go on')
            return False
    writer.close()
    run.close()
    interruption.release()

    # --- the policy that validated best, on problems nothing has seen -----------------------------
    best = policies.load_trained(workdir / 'best', policy, mesh)
    final = evaluator.report(state.frozen | best, test)
    base_notes = policies.policy_notes(base_directory)
    seconds = seconds_before + time.monotonic() - started
    result = summary(config, record, final, seconds, base_notes.get('seconds'))
    if distributed.is_leader():
        plots.curves(workdir)
        unfinished = workdir / 'result.json.new'
        unfinished.write_text(json.dumps(result, indent=1))
        unfinished.rename(workdir / 'result.json')  # whole or not at all: the run is finished
    distributed.barrier('result')
    return True


def own_prompts(config: ml_collections.ConfigDict, mesh: Mesh) -> np.ndarray:
    """Which prompts of a rollout batch this process reads and scores: those of its rows."""
    rows = sharding.own_rows(mesh, config.rl.prompts * config.rl.group_size)
    return np.unique(rows // config.rl.group_size)


def summary(
    config: ml_collections.ConfigDict,
    record: dict[str, Any],
    final: dict[str, Any],
    seconds: float,
    base_seconds: float | None,
) -> dict[str, Any]:
    """The contents of result.json: accuracies are fractions, on the test split, of base and best
    policy."""
    samples = f'pass_at_{config.evaluation.samples}'
    base = record['base']
    result = {
        'task': config.task.name,
        'objective': config.rl.objective,
        'scorer': final['scorer'],
        'base_accuracy': base['accuracy'],
        'accuracy': final['accuracy'],
        'base_reward': base['reward'],
        'reward': final['reward'],
        f'base_{samples}': base[samples],
        samples: final[samples],
        'best_step': record['best']['step'],
        'validation_accuracy': record['best']['accuracy'],
        'steps': config.train.steps,
        'seconds': seconds,
        'base_seconds': base_seconds,
        'seed': config.train.seed,
        'config': config.to_dict(),
    }
    if 'grid_accuracy' in final:
        result |= {
            'base_grid_accuracy': base['grid_accuracy'],
            'grid_accuracy': final['grid_accuracy'],
        }
    return result


def _quality(found: dict[str, Any]) -> tuple[float, float]:
    """What makes a policy the best on validation: accuracy, then reward."""
    return found['accuracy'], found['reward']


def _validation_row(found: dict[str, Any]) -> dict[str, float]:
    names = ('accuracy', 'grid_accuracy', 'reward')
    return {f'validation_{name}': found[name] for name in names if name in found}


def _describe(row: dict[str, Any], best: dict[str, Any]) -> str:
    reward = f'reward {row["reward"]:.3f}  ' if row.get('reward') is not None else ''
    return f'{reward}best validation {best["accuracy"]:.3f} at {best["step"]}'


def main(_: list[str]) -> None:
    config = FLAGS.config
    validate(config)
    mesh = sharding.make_mesh(config.mesh)
    check_mesh(config, mesh)
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else default_workdir(config)
    print(f'workdir {workdir}', flush=True)
    cli.compile_cache()
    with claimed(workdir, config.to_dict()), jax.set_mesh(mesh):
        if not (workdir / 'result.json').is_file():
            with Interruption() as interruption:
                if not train(config, workdir, mesh, interruption):
                    return
    result = json.loads((workdir / 'result.json').read_text())
    name = 'cells' if 'grid_accuracy' in result else 'accuracy'
    grids = (
        f', grids {result["base_grid_accuracy"]:.3f} -> {result["grid_accuracy"]:.3f}'
        if name == 'cells'
        else ''
    )
    print(
        f'finished: test {name} {result["base_accuracy"]:.3f} -> {result["accuracy"]:.3f}{grids} '
        f'in {result["seconds"]:.0f} s ({result["scorer"]} scorer)\n'
        f'curves    {workdir}/curves.png\nresult    {workdir}/result.json\n'
        f'look      python -m spg_jax.generate --workdir={workdir} --trace\n'
        f'evaluate  python -m spg_jax.evaluate --workdir={workdir}'
    )


if __name__ == '__main__':
    cli.define_config_flag()
    cli.define_distributed_flag()
    flags.DEFINE_string('workdir', '', "Where the run lives; '' is runs/TASK-OBJECTIVE-HASH.")
    cli.run(main)

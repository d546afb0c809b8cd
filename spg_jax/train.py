"""Base policy -> SPG -> evaluation: one run, resumable, from nothing to a report.

    python -m spg_jax.train --config=configs/countdown.py [--workdir=DIR] [--config.rl.negative=eubo …]

Run the same command again to go on after an interruption. DIR gets metrics.jsonl, TensorBoard events,
completions.jsonl, curves.png, best/ (the policy that validated best) and result.json.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags
from ml_collections import config_flags

from spg_jax import checkpoints, data, optimizers, plots, sharding, tasks
from spg_jax.cli import compile_cache, one_line_errors
from spg_jax.config import sampling_config
from spg_jax.interruption import Interruption
from spg_jax.metrics import MetricsWriter, SampleWriter
from spg_jax.pretrain import find_or_make_base, initial_state
from spg_jax.progress import track
from spg_jax.random import check_range
from spg_jax.rl.evaluator import Evaluator
from spg_jax.rl.learner import make_update
from spg_jax.rl.objectives import REGISTRY
from spg_jax.rl.rollout import empty_rollout, make_collect
from spg_jax.runs import claim, default_workdir
from spg_jax.tasks.source import SPLITS
from spg_jax.validation import validate

FLAGS = flags.FLAGS


def train(config: ml_collections.ConfigDict, workdir: Path) -> bool:
    """The whole run. Returns whether it finished; if not, it was interrupted and everything is saved.

    Raises:
      FloatingPointError: `train.max_skipped` updates in a row were not finite; the state is saved.
    """
    # --- devices, task, base policy -------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    jax.set_mesh(mesh)
    task = tasks.get(config.task.name, config.task.format, config.task.prompt_template)
    problems = {split: task.source(split, config.task.data_dir) for split in SPLITS}
    check_range(len(problems['train']), config.rl.group_size)
    base_directory = find_or_make_base(config, mesh)
    if base_directory is None:
        return False
    started = time.monotonic()
    policy, tokenizer, base_params = checkpoints.load_policy(base_directory, mesh)

    # --- programs -------------------------------------------------------------------------------
    optimizer = optimizers.for_rl(config.optimizer, config.train.steps)
    update = make_update(policy, REGISTRY[config.rl.objective](config), optimizer, config)
    collect = make_collect(policy, task, tokenizer, sampling_config(config), config, mesh)
    prompts = data.prompts(
        task, tokenizer, problems['train'],
        batch_size=config.rl.prompts, length=config.sampling.prompt_length, seed=config.train.seed,
    )
    evaluator = Evaluator(policy, task, tokenizer, config, mesh)
    validation = list(problems['validation'])[: config.evaluation.problems]

    # --- start, or go on where an earlier run was cut -------------------------------------------
    state = initial_state(base_params, optimizer, policy, mesh, average=False)
    rollout = empty_rollout(config, mesh)
    run = checkpoints.RunCheckpoints(workdir / 'checkpoints', config.checkpoint.keep)
    record: dict[str, Any] = {'seconds': 0.0}
    if run.latest_step is not None:
        (state, rollout), record = run.restore(checkpoints.abstract((state, rollout)))
        prompts.set_state(record['prompts'])
    else:
        print('evaluating the base policy', flush=True)
        record['base'] = evaluator.report(state.params, list(problems['test']))
        record['best'] = {'step': 0} | evaluator.validate(state.params, validation)
        checkpoints.save_policy(workdir / 'best', state.params, policy.config, tokenizer, record['best'])
    start = int(state.step)
    writer = MetricsWriter(workdir, start, record.get('last_row'))
    samples = SampleWriter(workdir, start)
    if start == 0:
        writer.write({'step': 0} | _validation_row(record['best']))
    seconds_before = record['seconds']

    def save() -> None:
        writer.flush()
        record.update(
            prompts=prompts.get_state(),
            seconds=seconds_before + time.monotonic() - started,
            last_row=writer.last_row,
        )
        run.save(int(state.step), (state, rollout), record)

    # --- the loop: metrics are read one update late, so that the next is already dispatched -------
    with Interruption() as interruption:
        describe = lambda: _describe(writer.last_row, record['best'])  # noqa: E731
        for step in track(range(start, config.train.steps), f'{config.rl.objective} updates', describe):
            if step % config.rl.inner_updates == 0:       # otherwise the rollout came with the checkpoint
                batch = next(prompts)
                rollout, texts = collect(state.params, batch, step)
                samples.write(step, batch.examples, texts, rollout)
            state, metrics = update(state, rollout)
            done = step + 1
            writer.push(done, metrics)
            if writer.last_row.get('skipped_in_a_row', 0) >= config.train.max_skipped:
                save()
                raise FloatingPointError(
                    f'{workdir}: {config.train.max_skipped} non-finite updates in a row, state saved at step '
                    f'{done}; lower optimizer.learning_rate in a new --workdir'
                )
            if done % config.evaluation.every == 0 or done == config.train.steps:
                writer.flush()
                found = evaluator.validate(state.params, validation)
                writer.write({'step': done} | _validation_row(found))
                if (found['accuracy'], found['reward']) > (record['best']['accuracy'], record['best']['reward']):
                    record['best'] = {'step': done} | found
                    checkpoints.save_policy(
                        workdir / 'best', state.params, policy.config, tokenizer, record['best']
                    )
            if done % config.checkpoint.every == 0 or done == config.train.steps or interruption.requested:
                save()
            if interruption.requested:
                print(f'stopped after update {done} of {config.train.steps}, saved; run the same command to go on')
                return False
    writer.close()
    run.close()

    # --- the policy that validated best, on problems nothing has seen -----------------------------
    _, _, best_params = checkpoints.load_policy(workdir / 'best', mesh)
    final = evaluator.report(best_params, list(problems['test']))
    plots.curves(workdir)
    base_notes = checkpoints.policy_notes(base_directory)
    result = summary(config, record, final, seconds_before + time.monotonic() - started, base_notes.get('seconds'))
    (workdir / 'result.json').write_text(json.dumps(result, indent=1))
    return True


def summary(
    config: ml_collections.ConfigDict,
    record: dict[str, Any],
    final: dict[str, Any],
    seconds: float,
    base_seconds: float | None,
) -> dict[str, Any]:
    """The contents of result.json: accuracies are fractions, on the test split, of base and best policy."""
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
        result |= {'base_grid_accuracy': base['grid_accuracy'], 'grid_accuracy': final['grid_accuracy']}
    return result


def _validation_row(found: dict[str, Any]) -> dict[str, float]:
    return {f'validation_{name}': value for name, value in found.items() if name != 'step'}


def _describe(row: dict[str, Any], best: dict[str, Any]) -> str:
    reward = f'reward {row["reward"]:.3f}  ' if 'reward' in row else ''
    return f'{reward}best validation {best["accuracy"]:.3f} at {best["step"]}'


def main(_: list[str]) -> None:
    config = FLAGS.config
    validate(config)
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else default_workdir(config)
    claim(workdir, config)
    print(f'workdir {workdir}', flush=True)
    compile_cache()
    if not (workdir / 'result.json').is_file():
        if not train(config, workdir):
            return
    result = json.loads((workdir / 'result.json').read_text())
    name = 'cells' if 'grid_accuracy' in result else 'accuracy'
    grids = f', grids {result["base_grid_accuracy"]:.3f} -> {result["grid_accuracy"]:.3f}' if name == 'cells' else ''
    print(
        f'finished: test {name} {result["base_accuracy"]:.3f} -> {result["accuracy"]:.3f}{grids} '
        f'in {result["seconds"]:.0f} s ({result["scorer"]} scorer)\n'
        f'curves    {workdir}/curves.png\nresult    {workdir}/result.json\n'
        f"look      python -m spg_jax.generate --workdir={workdir} --trace --prompt='…'\n"
        f'evaluate  python -m spg_jax.evaluate --workdir={workdir}'
    )


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'configs/TASK.py[:PRESET]; --config.GROUP.KEY=VALUE overrides.')
    flags.DEFINE_string('workdir', '', "Where the run lives; '' is runs/TASK-OBJECTIVE-HASH.")
    flags.mark_flag_as_required('config')
    app.run(one_line_errors(main))

"""Trains a base policy: masked diffusion from scratch, or supervised fine-tuning of a checkpoint.

    python -m spg_jax.pretrain --config=configs/countdown.py          # that task's base policy
    python -m spg_jax.pretrain --config=… --workdir=DIR --demonstrations=FILE
    python -m spg_jax.pretrain --config=… --workdir=DIR --config.base.checkpoint=POLICY_DIR

The loss is that of LLaDA (arXiv 2502.09992, eq. 3 and 5): a uniformly drawn number k >= 1 of the C
completion tokens is masked, EOS filling included, and their cross-entropy weighs 1/k. The numbers
are stratified over the batch, which lowers the variance. The parameters kept are the average.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.config import digest, execution_of, model_of, training_task
from spg_jax.data import batches
from spg_jax.data.tokenizers import SPECIALS, Tokenizer, WordTokenizer
from spg_jax.diffusion.denoising import denoising_loss, stratified_masks
from spg_jax.models.number_features import with_number_features
from spg_jax.models.policy import Policy, Variables
from spg_jax.process import cli, distributed
from spg_jax.process.interruption import Interruption
from spg_jax.process.progress import track
from spg_jax.random import Purpose, example_keys, step_key
from spg_jax.runs import checkpoints, policies
from spg_jax.runs.directory import claimed, policy_of_run
from spg_jax.runs.metrics import MetricsWriter
from spg_jax.tasks.task import Example, Task
from spg_jax.training import optimizers
from spg_jax.training.train_state import (
    Metrics,
    TrainState,
    apply_gradient,
    initial_state,
    shardings_of,
)
from spg_jax.validation import check_mesh, validate

CHECKPOINT_EVERY = 1000
FLAGS = flags.FLAGS


def made_of(config: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
    """Everything in a configuration that makes its base policy, wording of the prompt included."""
    task = training_task(config)
    return {
        'task': {'name': task.name, 'format': task.format, 'template': task.template},
        'model': {name: x for name, x in config.model.items() if name != 'quantize'},
        'base': {
            name: value
            for name, value in config.base.to_dict().items()
            if name not in ('checkpoint', 'cache')
        },
        'sampling': {name: config.sampling[name] for name in ('prompt_length', 'length')},
    }


def base_directory(config: ml_collections.ConfigDict) -> Path:
    """Where the base policy of a configuration is or will be: named by everything that makes it."""
    return Path(config.base.cache) / f'{config.task.name}-{digest(made_of(config))}'


def find_or_make_base(
    config: ml_collections.ConfigDict, mesh: Mesh, interruption: Interruption
) -> Path | None:
    """The directory of the base policy, trained now unless it exists; None if interrupted (and
    saved).

    Raises:
      ValueError, FileNotFoundError: `base.checkpoint` names something that is no policy.
    """
    if config.base.checkpoint:
        return policy_of_run(Path(config.base.checkpoint))
    directory = base_directory(config)
    if not policies.is_policy(directory):
        print(f'base policy: training {directory}', flush=True)
        if not pretrain(config, directory, mesh, interruption):
            return None
    return directory


def pretrain(
    config: ml_collections.ConfigDict,
    directory: Path,
    mesh: Mesh,
    interruption: Interruption,
    start_from: Path | None = None,
    records: list[batches.Record] | None = None,
) -> bool:
    """Trains through `base.stages` and writes a policy directory, unless it is there already; goes
    on where a call was cut.

    Args:
      config: of the run; its `base` group says how to train.
      directory: where the policy goes. What a cut training goes on from is beside it.
      mesh: the devices.
      interruption: looked at after every step.
      start_from: a policy to fine-tune; None starts from random parameters.
      records: (problem, answer) pairs to imitate in every stage instead of the demonstrator.

    Returns:
      Whether it finished. If not, it was interrupted and everything is saved.

    Raises:
      FloatingPointError: `train.max_skipped` steps in a row were not finite; the state is saved.
      ValueError, BlockingIOError: the place is another training's, or one is at work there.
    """
    training = directory.with_name(directory.name + '.training')
    given = {'checkpoint': str(start_from or ''), 'demonstrations': digest({'records': records})}
    finished = policies.is_policy(directory)
    with claimed(training, made_of(config) | {'given': given}, finished):
        if finished:
            return True
        return _pretrain(config, directory, training, mesh, interruption, start_from, records)


def _pretrain(
    config: ml_collections.ConfigDict,
    directory: Path,
    training: Path,
    mesh: Mesh,
    interruption: Interruption,
    start_from: Path | None,
    records: list[batches.Record] | None,
) -> bool:
    started = time.monotonic()
    task = training_task(config)
    policy, tokenizer, variables = _starting_point(config, task, mesh, start_from)
    with distributed.leader_first('problems to imitate'):
        problems = None if records else list(task.source('train', config.task.data_dir))
    _check_fit(config, task, tokenizer, problems, records)
    total = sum(steps for steps, _ in config.base.stages)
    optimizer = optimizers.for_pretraining(config.base, total)
    state = initial_state(variables, optimizer, policy, mesh, average=True)
    train_step = make_step(policy, optimizer, config, shardings_of(state))
    run = checkpoints.RunCheckpoints(training / 'checkpoints', keep=1)
    record: dict[str, Any] = {'stage': None, 'seconds': 0.0}
    if run.latest_step is not None:
        state, record = run.restore(checkpoints.abstract(state)), run.record()
    done, seconds_before = int(state.step), record['seconds']
    writer = MetricsWriter(training, done, record.get('last_row'), seconds=seconds_before)

    def save() -> None:
        writer.flush()
        seconds = seconds_before + time.monotonic() - started
        saved = {'stage': stage, 'iterator': demonstrations.get_state(), 'seconds': seconds}
        run.save(done, state, saved | {'last_row': writer.last_row})

    for stage, (steps, right_share) in enumerate(config.base.stages):
        first = sum(steps for steps, _ in config.base.stages[:stage])
        demonstrations = _demonstrations(
            config, mesh, task, tokenizer, problems, records, right_share, stage
        )
        if record['stage'] == stage:
            demonstrations.set_state(record['iterator'])
        what = 'fine-tuning' if records else f'base policy, {right_share:.0%} right answers'
        for step in track(range(done - first, steps), what, lambda: _figures(writer)):
            state, metrics = train_step(state, sharding.put_batch(mesh, next(demonstrations)))
            done = first + step + 1
            writer.push(done, metrics)
            if done == total:
                writer.flush()
            if writer.last_row.get('skipped_in_a_row', 0) >= config.train.max_skipped:
                save()
                raise FloatingPointError(
                    f'{training}: {config.train.max_skipped} non-finite steps in a row, saved at '
                    f'step {done}; lower base.learning_rate in another --workdir'
                )
            stop = interruption.requested()
            if stop or done % CHECKPOINT_EVERY == 0:
                save()
            if stop:
                print(f'stopped at step {done} of {total}, saved; the same command goes on')
                return False
    writer.close()
    run.close()
    seconds = seconds_before + time.monotonic() - started
    notes = {'seconds': seconds, 'config': config.to_dict()}
    policies.save_policy(directory, state.average, policy.config, tokenizer, notes)
    return True


def _starting_point(
    config: ml_collections.ConfigDict, task: Task, mesh: Mesh, start_from: Path | None
) -> tuple[Policy, Tokenizer, Variables]:
    """A policy from disk, or a new one for the words of the task's compact format.

    Raises:
      ValueError: the policy has adapters: here every parameter is trained.
    """
    if start_from:
        if policies.base_of(start_from) != start_from:
            raise ValueError(
                f'{start_from} has adapters, but every parameter is trained here; merge them with '
                'spg_jax.export --merge and start from the result'
            )
        execution = execution_of(config) | {'quantize': ''}  # only what is frozen is quantised
        return policies.load_policy(start_from, mesh, **execution)
    tokenizer = WordTokenizer(task.vocabulary)
    model = model_of(config, tokenizer.size, mesh.devices.flat[0].platform)
    model = dataclasses.replace(model, quantize='')
    policy = policies.make_policy(model, tokenizer)
    key = jax.random.fold_in(jax.random.key(config.base.seed), Purpose.INIT)
    params = sharding.init_params(policy.model, key, mesh)
    if config.base.number_features:
        params = with_number_features(params, tokenizer.words, len(SPECIALS))
        params = jax.device_put(params, sharding.param_shardings(policy.model, mesh))
    return policy, tokenizer, {'params': params}


def _check_fit(
    config: ml_collections.ConfigDict,
    task: Task,
    tokenizer: Tokenizer,
    problems: list[Example] | None,
    records: list[batches.Record] | None,
) -> None:
    """Finds what has no room now, and not when its batch comes; raises as
    `batches.encode_pairs`."""
    prompt_length, length = config.sampling.prompt_length, config.sampling.length
    if records:
        batches.encode_pairs(task, tokenizer, records, prompt_length, length)
    else:
        batches.encode_prompts(task, tokenizer, problems, prompt_length)


def make_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    shardings: TrainState,
):
    """A compiled (state, Demonstrations) -> (state, metrics); the old state is given up."""

    def step(state: TrainState, batch: batches.Demonstrations) -> tuple[TrainState, Metrics]:
        seed, purpose = config.base.seed, Purpose.CORRUPT
        row_keys = example_keys(seed, purpose, state.step, batch.index)
        masked = stratified_masks(
            step_key(seed, purpose, state.step), row_keys, batch.completion.shape[1]
        )
        loss, gradient = jax.value_and_grad(denoising_loss, argnums=1)(
            policy, state.trained, batch.prompt, batch.prompt_mask, batch.completion, masked
        )
        state, applied = apply_gradient(state, gradient, loss, optimizer)
        # A young average follows its parameters closely, or it would remember the initial ones.
        decay = jnp.minimum(config.base.ema, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, state.average, state.trained
        )
        return state.replace(average=average), applied | {'loss': (loss, jnp.float32(1))}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _demonstrations(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    task: Task,
    tokenizer: Tokenizer,
    problems: list[Example] | None,
    records: list[batches.Record] | None,
    right_share: float,
    stage: int,
) -> grain.DatasetIterator:
    sizes = dict(
        batch_size=config.base.batch_size,
        prompt_length=config.sampling.prompt_length,
        length=config.sampling.length,
        seed=config.base.seed + stage,
        own=sharding.own_rows(mesh, config.base.batch_size),
    )
    if records is not None:
        return batches.recorded_demonstrations(task, tokenizer, records, **sizes)
    return batches.demonstrations(task, tokenizer, problems, right_share=right_share, **sizes)


def _figures(writer: MetricsWriter) -> str:
    loss = writer.last_row.get('loss')
    return f'loss {loss:.3f}' if loss is not None else ''


def main(_: list[str]) -> None:
    config = FLAGS.config
    validate(config)
    if (FLAGS.demonstrations or config.base.checkpoint) and not FLAGS.workdir:
        raise ValueError(
            '--demonstrations or base.checkpoint without --workdir; give one, since base.cache is '
            'for policies trained from scratch by the demonstrator'
        )
    cli.compile_cache()
    mesh = sharding.make_mesh(config.mesh)
    check_mesh(config, mesh)
    records = None
    if FLAGS.demonstrations:
        records = batches.read_demonstrations(FLAGS.demonstrations, training_task(config))
    start_from = policy_of_run(Path(config.base.checkpoint)) if config.base.checkpoint else None
    directory = Path(FLAGS.workdir) if FLAGS.workdir else base_directory(config)
    with jax.set_mesh(mesh), Interruption() as interruption:
        if pretrain(config, directory, mesh, interruption, start_from, records):
            print(f'policy    {directory}')
            print(f'evaluate  python -m spg_jax.evaluate --workdir={directory}')


if __name__ == '__main__':
    cli.define_config_flag()
    cli.define_distributed_flag()
    flags.DEFINE_string('workdir', '', "Where the policy goes; '' is a folder of base.cache.")
    flags.DEFINE_string(
        'demonstrations',
        '',
        'JSON lines {"example": problem, "completion": text} to imitate in place of the '
        "task's demonstrator.",
    )
    cli.run(main)

"""Trains a base policy: masked diffusion from scratch, or supervised fine-tuning of a checkpoint.

    python -m spg_jax.pretrain --config=configs/countdown.py          # that task's base policy
    python -m spg_jax.pretrain --config=… --workdir=DIR --demonstrations=FILE
    python -m spg_jax.pretrain --config=… --workdir=DIR --config.base.checkpoint=POLICY_DIR

The loss is that of LLaDA (arXiv 2502.09992, eq. 3 and 5): a uniformly drawn number k >= 1 of the C
completion tokens is masked, EOS filling included, and their cross-entropy weighs 1/k. The numbers
are stratified over the batch, which lowers the variance. The parameters kept are the average.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags
from jax import Array
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.assembly import Parts, assemble, check_base, check_mesh, model_of
from spg_jax.data.batches import check_room
from spg_jax.data.demonstrations import Demonstrations, Lessons, Record, read_demonstrations
from spg_jax.data.prompts import prompt_lengths
from spg_jax.data.tokenizers import SPECIALS, Tokenizer, word_tokenizer
from spg_jax.diffusion.denoising import denoising_loss, stratified_masks
from spg_jax.method import complete
from spg_jax.models.number_features import with_number_features
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.transformer import EXECUTION
from spg_jax.process import cli, distributed
from spg_jax.process.config_flag import define_config_flag
from spg_jax.process.interruption import Interruption
from spg_jax.process.json_files import check_json
from spg_jax.process.progress import track
from spg_jax.random import Purpose, example_keys, root_key, step_key
from spg_jax.runs import policies
from spg_jax.runs.claim import claimed
from spg_jax.runs.directory import Settings, digest, policy_of_run
from spg_jax.runs.identity import FILES, digest_task
from spg_jax.runs.run import Run
from spg_jax.tasks.task import Example, Task
from spg_jax.training import optimizers
from spg_jax.training.train_state import (
    Metrics,
    TrainState,
    apply_gradient,
    initial_state,
    shardings_of,
)

CHECKPOINT_EVERY = 1000  # steps
STUCK = 'lower base.learning_rate (with --workdir, in another one)'
FLAGS = flags.FLAGS


def made_of(config: ml_collections.ConfigDict, task: Task) -> Settings:
    """Everything that makes the base policy of a configuration, wording of the prompt included."""
    # The group of files is there only for a task in a file of the user, so that the directories of
    # base policies keep the names that they had before there were such tasks.
    files = {FILES: digests} if (digests := digest_task(task)) else {}
    return files | {
        'task': {'name': task.name, 'format': task.format, 'template': task.template},
        'model': {name: x for name, x in config.model.items() if name not in EXECUTION},
        'base': {
            name: value
            for name, value in config.base.to_dict().items()
            if name not in ('checkpoint', 'cache')
        },
        'sampling': {name: config.sampling[name] for name in ('prompt_length', 'length')},
    }


def base_directory(config: ml_collections.ConfigDict) -> Path:
    """Where the base policy of a configuration is or will be: named by everything that makes it."""
    settings = made_of(config, assemble(config).task)
    return Path(config.base.cache) / f'{config.task.name}-{digest(settings)}'


def _training_of(directory: Path) -> Path:
    """Where a training that makes a policy keeps what it goes on from."""
    return directory.with_name(directory.name + '.training')


def find_or_make_base(
    config: ml_collections.ConfigDict, mesh: Mesh, interruption: Interruption
) -> Path | None:
    """The directory of the base policy, which is trained now unless it exists.

    Returns:
      The directory, or None if the training was interrupted, and is saved.

    Raises:
      ValueError, FileNotFoundError: `base.checkpoint` names something that is no policy.
    """
    if config.base.checkpoint:
        return policy_of_run(Path(config.base.checkpoint))
    directory = base_directory(config)
    if not policies.is_policy(directory):
        print(f'base policy: training {directory}', flush=True)
        if not pretrain(config, directory, mesh, interruption, wait=True):
            return None
    return directory


def pretrain(
    config: ml_collections.ConfigDict,
    directory: Path,
    mesh: Mesh,
    interruption: Interruption,
    start_from: Path | None = None,
    records: list[Record] | None = None,
    wait: bool = False,
) -> bool:
    """Trains through `base.stages` and writes a policy directory, unless it is there already.

    Goes on where an earlier call was cut.

    Args:
      config: of the run; its `base` group says how to train.
      directory: where the policy goes. What a cut training goes on from is beside it.
      mesh: the devices.
      interruption: looked at after every step.
      start_from: a policy to fine-tune; None starts from random parameters.
      records: (problem, answer) pairs to imitate in every stage instead of the demonstrator.
      wait: whether to wait for another process that is making the policy.

    Returns:
      Whether it finished. If not, it was interrupted and everything is saved.

    Raises:
      FloatingPointError: `train.max_skipped` steps in a row were not finite; the state is saved.
      ValueError, BlockingIOError: the directory is another training's or no policy's, or a training
        is at work in it.
    """
    parts = assemble(config)
    training = _training_of(directory)
    imitated = {'checkpoint': str(start_from or ''), 'demonstrations': digest({'records': records})}
    settings = made_of(config, parts.task) | {'given': imitated}
    is_taken = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    finished = policies.is_policy(directory)
    if is_taken and not finished:
        raise ValueError(
            f'{directory} is no policy and would be replaced by one, expected a policy, an empty '
            'directory or none; use another --workdir, or move it away'
        )
    with claimed(training, settings, finished, interruption if wait else None) as is_free:
        if not is_free:
            return False
        if policies.is_policy(directory):  # perhaps only since another process has made it
            return True
        return _pretrain(
            config, parts, directory, training, mesh, interruption, start_from, records
        )


class _Record(TypedDict):
    """What is read of the record of a checkpoint when a training goes on."""

    stage: int
    iterator: dict[str, Any]
    seconds: float
    last_row: dict[str, Any]


def _pretrain(
    config: ml_collections.ConfigDict,
    parts: Parts,
    directory: Path,
    training: Path,
    mesh: Mesh,
    interruption: Interruption,
    start_from: Path | None,
    records: list[Record] | None,
) -> bool:
    """The training itself, in a directory that is claimed; arguments and result of `pretrain`."""
    policy, tokenizer, variables = _starting_point(config, parts, mesh, start_from)
    lessons = _lessons(config, parts, tokenizer, mesh, records)
    run = Run(training, keep=2)  # If the newest is damaged, the other is there to go on from.
    total = sum(stage.steps for stage in parts.stages)
    patience = min(config.train.max_skipped, total)
    base = config.base
    optimizer = optimizers.for_pretraining(
        base.learning_rate, base.weight_decay, base.grad_clip, total
    )
    state = initial_state(variables, optimizer, policy, mesh, average=True)
    train_step = make_step(policy, optimizer, base.seed, base.ema, shardings_of(state))
    if run.resumes:

        def saved_state(record: dict[str, Any]) -> TrainState:
            check_json(record, _Record, f'{training}/checkpoints', 'restore the checkpoint')
            return state

        state = run.restore(saved_state)
        run.check_progress(patience, STUCK)
    first_step = 0
    for number, stage in enumerate(parts.stages):
        demonstrations = lessons.batches(stage.right_share, base.seed + number)
        if run.record.get('stage') == number:
            demonstrations.set_state(run.record['iterator'])
        left = range(run.step - first_step, stage.steps)
        label = 'fine-tuning' if records else f'base policy, {stage.right_share:.0%} right answers'
        for _ in track(left, label, lambda: _figures(run)):
            state, metrics = train_step(state, sharding.put_batch(mesh, next(demonstrations)))
            run.push(metrics)
            if run.step == total:
                run.flush()
            stuck, stop = run.skipped(patience), interruption.requested()
            if stuck or stop or run.step % CHECKPOINT_EVERY == 0:
                run.save(state, stage=number, iterator=demonstrations.get_state())
            if stuck:
                run.check_progress(patience, STUCK)
            if stop:
                print(f'stopped at step {run.step} of {total}, saved; the same command goes on')
                return False
        first_step += stage.steps
    run.close()
    notes = {'seconds': run.seconds, 'config': config.to_dict()}
    policies.save_policy(directory, state.average, policy.config, tokenizer, notes)
    return True


def _lessons(
    config: ml_collections.ConfigDict,
    parts: Parts,
    tokenizer: Tokenizer,
    mesh: Mesh,
    records: list[Record] | None,
) -> Lessons:
    """The records to imitate, or else the problems of the task, which are read now.

    Raises:
      ValueError: a prompt or an answer is too long; `data.long_prompts` does not apply here.
    """
    problems: list[Example] = []
    if records is None:
        with distributed.leader_first('problems to imitate'):
            source = parts.task.source('train', config.task.data_dir)
        problems = list(source)
        longest = prompt_lengths(parts.task, tokenizer, source, problems).max(initial=0)
        check_room(int(longest), config.sampling.prompt_length)
    lessons = Lessons(
        task=parts.task,
        tokenizer=tokenizer,
        problems=problems,
        records=records,
        batch_size=config.base.batch_size,
        local_rows=sharding.own_rows(mesh, config.base.batch_size),
        prompt_length=config.sampling.prompt_length,
        length=config.sampling.length,
    )
    if records is not None:
        lessons.encode(records)  # so that one that is too long shows before training
    return lessons


def _starting_point(
    config: ml_collections.ConfigDict, parts: Parts, mesh: Mesh, start_from: Path | None
) -> tuple[Policy, Tokenizer, Variables]:
    """A policy from disk, or a new one for the words of the task's compact format.

    Raises:
      ValueError: the policy has adapters, but pre-training trains every parameter.
    """
    if start_from:
        if policies.base_of(start_from) != start_from:
            raise ValueError(
                f'{start_from} has adapters, but every parameter is trained here; merge them with '
                'spg_jax.export --merge and start from the result'
            )
        if policies.model_of_policy(start_from).autoregressive:
            raise ValueError(
                f'{start_from} is an autoregressive model, which this training of diffusion models '
                'would not make one; convert it first, or start from a diffusion model'
            )
        execution = parts.execution | {'quantize': ''}  # only frozen parameters are quantised
        return policies.load_policy(start_from, mesh, **execution)
    tokenizer = word_tokenizer(parts.task)
    model = model_of(config, tokenizer.size, mesh.devices.flat[0].platform)
    model = dataclasses.replace(model, quantize='')
    policy = policies.make_policy(model, tokenizer)
    key = jax.random.fold_in(root_key(config.base.seed), Purpose.INIT)
    params = sharding.init_params(policy.model, key, mesh)
    if config.base.number_features:
        params = with_number_features(params, tokenizer.words, len(SPECIALS))
        params = jax.device_put(params, sharding.param_shardings(policy.model, mesh))
    return policy, tokenizer, {'params': params}


def make_step(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    seed: int,
    ema: float,
    shardings: TrainState,
) -> Callable[[TrainState, Demonstrations], tuple[TrainState, Metrics]]:
    """A compiled (state, demonstrations) -> (state, metrics); the old state is given up.

    Args:
      policy: the model.
      optimizer: how its parameters change.
      seed: of the masks.
      ema: decay of the averaged parameters.
      shardings: of the state, which the new state keeps.
    """

    def loss_of(trained: Variables, batch: Demonstrations, masked: Array) -> Array:
        noisy = jnp.where(masked, policy.mask_id, batch.completion)
        logits = policy.completion_logits(trained, batch.prompt, batch.prompt_mask, noisy)
        return denoising_loss(logits, batch.completion, masked)

    def step(state: TrainState, batch: Demonstrations) -> tuple[TrainState, Metrics]:
        row_keys = example_keys(seed, Purpose.CORRUPT, state.step, batch.index)
        masked = stratified_masks(
            step_key(seed, Purpose.CORRUPT, state.step), row_keys, batch.completion.shape[1]
        )
        loss, gradient = jax.value_and_grad(loss_of)(state.trained, batch, masked)
        state, metrics = apply_gradient(state, gradient, loss, optimizer)
        # A young average follows its parameters closely, or it would remember the initial ones.
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        average = optax.incremental_update(state.average, state.trained, decay)
        return state.replace(average=average), metrics | {'loss': (loss, jnp.float32(1))}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _figures(run: Run) -> str:
    loss = run.last_row.get('loss')
    return f'loss {loss:.3f}' if loss is not None else ''


def main(_: list[str]) -> None:
    config = FLAGS.config
    parts = assemble(config)
    if (FLAGS.demonstrations or config.base.checkpoint) and not FLAGS.workdir:
        raise ValueError(
            '--demonstrations or base.checkpoint without --workdir; give one, since base.cache is '
            'for policies trained from scratch by the demonstrator'
        )
    cli.compile_cache()
    mesh = sharding.make_mesh(config.mesh)
    check_mesh(config, parts, mesh)
    check_base(config, parts, demonstrator=not FLAGS.demonstrations)
    records = None
    if FLAGS.demonstrations:
        records = read_demonstrations(FLAGS.demonstrations, parts.task)
    start_from = policy_of_run(Path(config.base.checkpoint)) if config.base.checkpoint else None
    directory = Path(FLAGS.workdir) if FLAGS.workdir else base_directory(config)
    with jax.set_mesh(mesh), Interruption() as interruption:
        if pretrain(config, directory, mesh, interruption, start_from, records):
            print(f'policy    {directory}')
            print(f'evaluate  python -m spg_jax.evaluate --workdir={directory}')


if __name__ == '__main__':
    define_config_flag(complete)
    cli.define_distributed_flag()
    cli.define_path_flag(
        'workdir', '', "Where the policy goes; '' is a folder of base.cache.", saves=True
    )
    cli.define_path_flag(
        'demonstrations',
        '',
        'JSON lines {"example": problem, "completion": text} to imitate in place of the '
        "task's demonstrator.",
    )
    cli.run(main)

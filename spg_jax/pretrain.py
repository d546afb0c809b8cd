"""Trains a base policy: masked-diffusion training from scratch, or supervised fine-tuning of a checkpoint.

    python -m spg_jax.pretrain --config=configs/countdown.py                      # the base policy of that task
    python -m spg_jax.pretrain --config=… --workdir=DIR --demonstrations=FILE     # on given answers
    python -m spg_jax.pretrain --config=… --config.base.checkpoint=POLICY_DIR …   # starting from a policy

The loss is that of LLaDA (arXiv 2502.09992, eq. 3 and 5): a uniformly drawn number k >= 1 of the C completion
tokens is masked, EOS filling included, and their cross-entropy weighs 1/k. The numbers are stratified over
the batch, which lowers the variance. The parameters kept are the decaying average.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import app, flags
from jax import Array
from jax.sharding import Mesh
from ml_collections import config_flags

from spg_jax import checkpoints, data, metrics, optimizers, sharding, tasks
from spg_jax.cli import compile_cache, one_line_errors
from spg_jax.config import digest
from spg_jax.diffusion.bounds import completion_log_probs
from spg_jax.interruption import Interruption
from spg_jax.models.policy import Params, Policy
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.progress import track
from spg_jax.random import Purpose
from spg_jax.rl.learner import Metrics, TrainState, apply_gradient
from spg_jax.tokenizers import Tokenizer, WordTokenizer
from spg_jax.validation import validate

FLAGS = flags.FLAGS


def base_directory(config: ml_collections.ConfigDict) -> Path:
    """Where the base policy of a configuration is or will be: named by everything that makes it."""
    made_of = {
        'task': {name: config.task[name] for name in ('name', 'format', 'prompt_template')},
        'model': config.model.to_dict(),
        'base': {name: value for name, value in config.base.items() if name not in ('checkpoint', 'cache')},
        'length': [config.sampling.prompt_length, config.sampling.length],
    }
    return Path(config.base.cache) / f'{config.task.name}-{digest(made_of)}'


def find_or_make_base(config: ml_collections.ConfigDict, mesh: Mesh) -> Path | None:
    """The directory of the base policy, trained now unless it exists; None if interrupted (and saved).

    Raises:
      ValueError, FileNotFoundError: `base.checkpoint` names something that is no policy.
    """
    if config.base.checkpoint:
        return Path(config.base.checkpoint)
    directory = base_directory(config)
    if not checkpoints.is_policy(directory):
        print(f'base policy: training {directory}', flush=True)
        if not pretrain(config, directory, mesh):
            return None
    return directory


def pretrain(
    config: ml_collections.ConfigDict,
    directory: Path,
    mesh: Mesh,
    start_from: Path | None = None,
    records: list[tuple[Any, str]] | None = None,
) -> bool:
    """Trains through `base.stages` and writes a policy directory; goes on where an earlier call was cut.

    Args:
      start_from: a policy to fine-tune; None starts from random parameters.
      records: (problem, answer) pairs to imitate in every stage, in place of the task's demonstrator.

    Returns:
      Whether it finished. If not, it was interrupted and everything is saved.
    """
    started = time.monotonic()
    task = tasks.get(config.task.name, config.task.format, config.task.prompt_template)
    if start_from:
        policy, tokenizer, params = checkpoints.load_policy(start_from, mesh)
    else:
        tokenizer = WordTokenizer(task.vocabulary)
        policy = checkpoints.make_policy(model_config(config, tokenizer), tokenizer)
        key = jax.random.fold_in(jax.random.key(config.base.seed), Purpose.INIT)
        params = sharding.init_params(Transformer(policy.config), key, mesh)
    total = sum(steps for steps, _ in config.base.stages)
    optimizer = optimizers.for_pretraining(config.base, total)
    state = initial_state(params, optimizer, policy, mesh, average=True)
    step_fn = make_step(policy, optimizer, config)
    run = checkpoints.RunCheckpoints(directory.with_name(directory.name + '.checkpoints'), keep=1)
    iterator_state = None
    if run.latest_step is not None:
        state, record = run.restore(checkpoints.abstract(state))
        iterator_state = record['iterator']
    directory.mkdir(parents=True, exist_ok=True)
    writer = metrics.MetricsWriter(directory, start=int(state.step))

    done, latest = int(state.step), {}
    with Interruption() as interruption:
        first = 0
        for stage, (steps, right_share) in enumerate(config.base.stages):
            last = first + steps
            if done >= last:
                first = last
                continue
            batches = _batches(config, task, tokenizer, records, right_share, stage)
            if iterator_state:
                batches.set_state(iterator_state)
            iterator_state = None
            what = f'base policy, {right_share:.0%} right' if records is None else 'fine-tuning'
            for _ in track(range(done - first, steps), what, lambda: _figures(latest)):
                batch = sharding.put_batch(mesh, next(batches))
                state, pending = step_fn(state, batch)
                done += 1
                if done % 50 == 0 or done == total:
                    latest = metrics.read(pending)
                    writer.write({'step': done, **latest})
                    if latest['skipped_in_a_row'] >= config.train.max_skipped:
                        raise FloatingPointError(
                            f'{directory}: {config.train.max_skipped} non-finite updates in a row at step {done}; '
                            'lower base.learning_rate'
                        )
                if interruption.requested or done % 1000 == 0 and done < total:
                    run.save(done, state, {'iterator': batches.get_state()})
                if interruption.requested:
                    print(f'stopped at step {done} of {total}, saved; run the same command to go on')
                    return False
            first = last
    writer.close()
    run.close()
    notes = {'steps': done, 'seconds': time.monotonic() - started, 'stages': list(map(list, config.base.stages))}
    checkpoints.save_policy(directory, state.average, policy.config, tokenizer, notes)
    return True


def model_config(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> TransformerConfig:
    """The model of a base policy trained here."""
    return TransformerConfig(vocab_size=tokenizer.size, **config.model)


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, policy: Policy, mesh: Mesh, *, average: bool
) -> TrainState:
    """A train state at step 0, every array sharded like its parameter."""
    shardings = sharding.param_shardings(Transformer(policy.config), mesh)
    whole = sharding.replicated(mesh)
    opt_shardings = optimizers.state_shardings(optimizer, params, shardings, whole)
    zero = jax.device_put(jnp.int32(0), whole)
    return TrainState(
        step=zero,
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=opt_shardings)(params),
        average=jax.tree.map(jnp.copy, params) if average else None,
        skipped=jnp.copy(zero),
    )


def make_step(policy: Policy, optimizer: optax.GradientTransformation, config: ml_collections.ConfigDict):
    """A compiled (state, Demonstrations) -> (state, metrics); the old state's memory is given up."""

    def step(state: TrainState, batch: data.Demonstrations) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.base.seed), Purpose.CORRUPT)
        masked = stratified_masks(jax.random.fold_in(key, state.step), *batch.completion.shape)
        loss, gradient = jax.value_and_grad(denoising_loss, argnums=1)(policy, state.params, batch, masked)
        state, applied = apply_gradient(state, gradient, loss, optimizer)
        # A young average follows its parameters closely, or it would remember the initial ones.
        decay = jnp.minimum(config.base.ema, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, state.params)
        return state.replace(average=average), applied | {'loss': (loss, jnp.float32(1))}

    return jax.jit(step, donate_argnums=0)


def stratified_masks(key: Array, rows: int, length: int) -> Array:
    """[rows, length] bool: row r masks ceil(length * t_r) random positions, t_r = mod(u + r/rows, 1).

    One uniform u for the whole batch: every share of masked tokens is equally often in it (MD4's
    low-variance times).
    """
    time_key, position_key = jax.random.split(key)
    times = jnp.mod(jax.random.uniform(time_key) + jnp.arange(rows) / rows, 1.0)
    count = jnp.clip(jnp.ceil(times * length), 1, length)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(position_key, (rows, length)), axis=1), axis=1)
    return rank < count[:, None]


def denoising_loss(policy: Policy, params: Params, batch: data.Demonstrations, masked: Array) -> Array:
    """Mean over rows of the cross-entropy per masked token, in nats; its weight 1/k is C/k per token."""
    noisy = jnp.where(masked, policy.mask_id, batch.completion)
    logits = policy.completion_logits(params, batch.prompt, batch.prompt_mask, noisy)
    logp = jax.vmap(completion_log_probs)(logits, batch.completion)
    return -(jnp.where(masked, logp, 0.0).sum(1) / masked.sum(1)).mean()


def read_demonstrations(path: str) -> list[tuple[Any, str]]:
    """(problem, answer) pairs of a JSON lines file.

    Raises:
      ValueError, FileNotFoundError: naming the file, the line and what was expected.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist; expected JSON lines with "example" and "completion"')
    records = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            records.append((row['example'], row['completion']))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: expected {{"example": …, "completion": …}}, found {line[:60]!r}'
            ) from error
    if not records:
        raise ValueError(f'{path} is empty; expected one demonstration a line')
    return records


def _batches(config, task, tokenizer, records, right_share, stage):
    sizes = dict(
        batch_size=config.base.batch_size,
        prompt_length=config.sampling.prompt_length,
        length=config.sampling.length,
        seed=config.base.seed + stage,
    )
    if records is not None:
        return data.recorded_demonstrations(task, tokenizer, records, **sizes)
    source = task.source('train', config.task.data_dir)
    return data.demonstrations(task, tokenizer, source, right_share=right_share, **sizes)


def _figures(latest: dict[str, float]) -> str:
    return f'loss {latest["loss"]:.3f}' if latest else ''


def main(_: list[str]) -> None:
    config = FLAGS.config
    validate(config)
    compile_cache()
    mesh = sharding.make_mesh(config.mesh)
    records = read_demonstrations(FLAGS.demonstrations) if FLAGS.demonstrations else None
    start_from = Path(config.base.checkpoint) if config.base.checkpoint else None
    directory = Path(FLAGS.workdir) if FLAGS.workdir else base_directory(config)
    if checkpoints.is_policy(directory):
        print(f'{directory}: finished before; evaluate it, or delete it to train again')
        return
    with jax.set_mesh(mesh):
        if pretrain(config, directory, mesh, start_from, records):
            print(f'{directory}: policy written; python -m spg_jax.evaluate --workdir={directory}')


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'configs/TASK.py[:PRESET]; --config.GROUP.KEY=VALUE overrides.')
    flags.DEFINE_string('workdir', '', "Where the policy goes; '' is a folder of base.cache.")
    flags.DEFINE_string(
        'demonstrations', '', 'JSON lines {"example", "completion"} to imitate in place of the task\'s demonstrator.'
    )
    flags.mark_flag_as_required('config')
    app.run(one_line_errors(main))

"""Trains a base policy: masked diffusion from scratch, or supervised fine-tuning of a checkpoint.

    python -m spg_jax.pretrain --config=configs/countdown.py          # that task's base policy
    python -m spg_jax.pretrain --config=… --workdir=DIR --demonstrations=FILE
    python -m spg_jax.pretrain --config=… --workdir=DIR --config.base.checkpoint=POLICY_DIR

The loss is that of LLaDA (arXiv 2502.09992, eq. 3 and 5): a uniformly drawn number k >= 1 of the C
completion tokens is masked, EOS filling included, and their cross-entropy weighs 1/k. The numbers
are stratified over the batch, which lowers the variance. The parameters kept are the average.

With base.kind 'autoregressive' the model is causal and learns to predict the next token;
`spg_jax.convert` starts from it. With lora.rank above 0 the fine-tuning of a checkpoint trains
adapters over frozen parameters, which model.quantize stores in few bits. A policy from scratch has
no adapters.

With base.edit_weight a second loss teaches to edit: an answer without MASK, some of which are wrong
answers of the task and have random tokens, is to be corrected at all C positions (LLaDA2.1, arXiv
2602.08676; ReflectDrive-2, arXiv 2605.04647). With base.keep_weight the first loss counts the
tokens that are not masked, too.
"""

import dataclasses
import shlex
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import jax
import ml_collections
from absl import flags
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.assembly import (
    AUTOREGRESSIVE,
    DIFFUSION,
    Parts,
    assemble,
    check_base,
    check_mesh,
    model_of,
)
from spg_jax.data.demonstrations import Record, read_demonstrations
from spg_jax.data.tokenizers import SPECIALS, Tokenizer, word_tokenizer
from spg_jax.method import complete
from spg_jax.models.number_features import with_number_features
from spg_jax.models.policy import Policy, Variables, check_adapters, with_adapters
from spg_jax.models.transformer import EXECUTION, TransformerConfig
from spg_jax.process import cli
from spg_jax.process.config_flag import define_config_flag
from spg_jax.process.interruption import Interruption
from spg_jax.process.progress import track
from spg_jax.random import Purpose, root_key
from spg_jax.runs import policies
from spg_jax.runs.directory import Settings, digest, policy_of_run
from spg_jax.runs.examples import lessons_of
from spg_jax.runs.identity import FILES, digest_path, digest_start, digest_task
from spg_jax.runs.making import follow_update, make_at, restored_state
from spg_jax.runs.run import Run
from spg_jax.tasks.task import Task
from spg_jax.training import optimizers
from spg_jax.training.supervised import make_step
from spg_jax.training.train_state import TrainState, initial_state, shardings_of

CHECKPOINT_EVERY = 1000  # steps
STUCK = 'lower base.learning_rate (with --workdir, in another one)'
FLAGS = flags.FLAGS


def made_of(config: ml_collections.ConfigDict, task: Task) -> Settings:
    """Everything that makes the base policy of a configuration, wording of the prompt included."""
    # The group of files is there only for a task in a file of the user, so that the directories of
    # base policies keep the names that they had before there were such tasks.
    files = {FILES: digests} if (digests := digest_task(task)) else {}
    # For the same reason settings of the second loss are there only with that loss.
    unread = () if config.base.edit_weight else ('edit_weight', 'wrong_share', 'random_rate')
    unread += () if config.base.keep_weight else ('keep_weight',)
    unread += () if config.base.muon_rate else ('muon_rate',)  # AdamW, as before there was Muon
    return files | {
        'task': {'name': task.name, 'format': task.format, 'template': task.template},
        'model': {name: x for name, x in config.model.items() if name not in EXECUTION},
        'base': {
            name: value
            for name, value in config.base.to_dict().items()
            if name not in ('checkpoint', 'cache', *unread)
        },
        'sampling': {name: config.sampling[name] for name in ('prompt_length', 'length')},
    }


def base_directory(config: ml_collections.ConfigDict) -> Path:
    """Where the base policy of a configuration is or will be: named by everything that makes it."""
    settings = made_of(config, assemble(config).task)
    if config.base.kind == DIFFUSION:  # Directories keep the names from before there were kinds.
        del settings['base']['kind']
    return Path(config.base.cache) / f'{config.task.name}-{digest(settings)}'


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
    imitated = {'checkpoint': str(start_from or ''), 'demonstrations': digest({'records': records})}
    if start_from and parts.lora:
        imitated['adapters'] = f'{parts.lora}, model.quantize {config.model.quantize!r}'
    else:
        imitated['adapters'] = None
    settings = made_of(config, parts.task) | {'given': imitated}
    if start_from:
        # '' stands for no adapter, because a file that is not named now would not be compared.
        adapter = digest_path(parts.adapter) if parts.lora and parts.adapter else ''
        files = digest_start(start_from) | {'lora.adapter': adapter}
        settings[FILES] = settings.get(FILES, {}) | files

    def make(training: Path) -> bool:
        return _pretrain(
            config, parts, directory, training, mesh, interruption, start_from, records
        )

    return make_at(directory, settings, make, interruption if wait else None)


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
    rows = sharding.own_rows(mesh, config.base.batch_size)
    lessons = lessons_of(config, parts, tokenizer, config.base.batch_size, rows, records)
    run = Run(training, keep=2)  # If the newest is damaged, the other is there to go on from.
    total = sum(stage.steps for stage in parts.stages)
    patience = min(config.train.max_skipped, total)
    base = config.base
    optimizer = optimizers.for_pretraining(
        base.learning_rate, base.weight_decay, base.grad_clip, total, base.muon_rate
    )
    state = initial_state(variables, optimizer, policy, mesh, average=True)
    train_step = make_step(
        policy,
        optimizer,
        base.seed,
        base.ema,
        shardings_of(state),
        base.edit_weight,
        base.random_rate,
        base.keep_weight,
    )
    if run.resumes:
        state = restored_state(run, state, _Record, patience, STUCK)
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
            save = partial(_save, run, state, number, demonstrations)
            due = run.step % CHECKPOINT_EVERY == 0
            if follow_update(run, total, due, save, patience, STUCK, interruption):
                return False
        first_step += stage.steps
    run.close()
    notes = {'seconds': run.seconds, 'config': config.to_dict()}
    adapted = policies.base_of(start_from) if start_from and policy.config.lora else None
    average = state.frozen | state.average
    policies.save_policy(directory, average, policy.config, tokenizer, notes, adapted)
    return True


def _save(run: Run, state: TrainState, stage: int, demonstrations: Any) -> None:
    """Writes a checkpoint, without the parameters that do not change."""
    run.save(state.replace(frozen={}), stage=stage, iterator=demonstrations.get_state())


def _starting_point(
    config: ml_collections.ConfigDict, parts: Parts, mesh: Mesh, start_from: Path | None
) -> tuple[Policy, Tokenizer, Variables]:
    """A policy from disk, or a new one for the words of the task's compact format.

    Raises:
      ValueError: the policy has other adapters than the configuration asks for, or is of another
        kind than base.kind.
    """
    if start_from:
        return _checkpoint(config, parts, mesh, start_from)
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


def _checkpoint(
    config: ml_collections.ConfigDict, parts: Parts, mesh: Mesh, start_from: Path
) -> tuple[Policy, Tokenizer, Variables]:
    """A policy to fine-tune, with the adapters of the configuration; raises as `_starting_point`.

    Everything is checked before the weights are read, which may be large.
    """
    if parts.lora is None and policies.base_of(start_from) != start_from:
        raise ValueError(
            f'{start_from} has adapters, but with lora.rank 0 every parameter is trained here; '
            'merge them with spg_jax.export --merge and start from the result, or set lora.rank'
        )
    model = policies.model_of_policy(start_from)
    check_kind(config.base.kind, model, start_from)
    lora, adapter, execution = parts.lora, parts.adapter, parts.execution
    if lora is None:
        # Only frozen parameters are quantised, and only adapters leave any frozen.
        return policies.load_policy(start_from, mesh, **execution | {'quantize': ''})
    lora = lora.for_kernels(model.adapted_kernels)
    dataclasses.replace(model, lora=lora)  # Raises if the model cannot have these adapters.
    check_adapters(policies.check_policy(start_from, mesh, adapter), lora, adapter or start_from)
    policy, tokenizer, variables = policies.load_policy(start_from, mesh, adapter, **execution)
    policy, variables = with_adapters(policy, variables, lora, config.base.seed, mesh)
    return policy, tokenizer, variables


def check_kind(kind: str, model: TransformerConfig, where: Path) -> None:
    """Refuses a training of one kind on a model of the other.

    Raises:
      ValueError: says what to do instead.
    """
    if model.autoregressive and kind == DIFFUSION:
        raise ValueError(
            f'{where} is an autoregressive model, which this training of diffusion models would '
            'not make one; convert it with spg_jax.convert, or set base.kind autoregressive'
        )
    if not model.autoregressive and kind == AUTOREGRESSIVE:
        raise ValueError(
            f'{where} is a diffusion model, but base.kind is {kind!r}; set base.kind diffusion, or '
            'start from an autoregressive model'
        )


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
            print(f'evaluate  python -m spg_jax.evaluate --workdir={shlex.quote(str(directory))}')


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

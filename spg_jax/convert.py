"""Converts an autoregressive model into a masked diffusion model, as LLaDA2.0 was made.

    python -m spg_jax.convert --config=configs/countdown.py    # trains an autoregressive one first
    python -m spg_jax.convert --config=… --config.base.checkpoint=Qwen2.5-7B --workdir=DIR
    python -m spg_jax.convert --config=… --workdir=DIR --demonstrations=FILE
    python -m spg_jax.train --config=… --config.base.checkpoint=DIR

The blocks of `convert.phases` rise from 1, which sees what the autoregressive model saw, to the
whole length, and fall to the blocks in which the model will be decoded (arXiv 2512.15745, section
4). The loss is in `spg_jax.diffusion.block_denoising`; predictions are made at the masked position
itself, not one before it. The result, DIR, is the mean of the best policies of the last phase, an
ordinary policy directory. The same command goes on after a cut; DIR.training has metrics.jsonl and
curves.png. docs/conversion.md says more.
"""

import dataclasses
import shlex
from functools import cache, partial
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import ml_collections
import optax
from absl import flags
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.assembly import (
    AUTOREGRESSIVE,
    Parts,
    assemble,
    check_base,
    check_mesh,
    check_rows,
    conversion_of,
    model_of,
)
from spg_jax.data.demonstrations import Record, read_demonstrations
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.method import complete
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.transformer import TransformerConfig
from spg_jax.pretrain import find_or_make_base, made_of
from spg_jax.process import cli, distributed
from spg_jax.process.config_flag import define_config_flag
from spg_jax.process.interruption import Interruption
from spg_jax.process.progress import track
from spg_jax.rl.collection import decoding_of
from spg_jax.runs import plots, policies
from spg_jax.runs.directory import digest
from spg_jax.runs.examples import Examples
from spg_jax.runs.making import follow_update, make_at, restored_state, training_of
from spg_jax.runs.run import Run
from spg_jax.runs.validation import Validation, loss_name
from spg_jax.training import optimizers
from spg_jax.training.conversion import Update, make_update
from spg_jax.training.merging import mean
from spg_jax.training.optimizers import AdamW
from spg_jax.training.phases import WHOLE, Conversion, Phase
from spg_jax.training.train_state import TrainState, initial_state, shardings_of

CHECKPOINT_EVERY = 500  # updates; there is one after each validation of the last phase as well
STUCK = 'lower convert.learning_rate in another --workdir'
FLAGS = flags.FLAGS


def convert(
    config: ml_collections.ConfigDict,
    directory: Path,
    mesh: Mesh,
    interruption: Interruption,
    start_from: Path,
    records: list[Record] | None = None,
) -> bool:
    """Converts a policy and writes the result as a policy directory, unless it is there already.

    Args:
      config: of the run; its group `convert` says how to convert.
      directory: where the policy goes. What a cut conversion goes on from is beside it.
      mesh: the devices.
      interruption: looked at after every update.
      start_from: the autoregressive policy.
      records: (problem, answer) pairs to learn from instead of the task's demonstrator.

    Returns:
      Whether it finished. If not, it was interrupted and everything is saved.

    Raises:
      ValueError: settings or policy cannot be used; one line, before any long work.
      FloatingPointError: `train.max_skipped` updates in a row were not finite; the state is saved.
    """
    parts, conversion = assemble(config), conversion_of(config)
    check_rows('convert.batch_size', config.convert.batch_size, mesh)
    check_start(start_from, parts, conversion)
    origin = {'checkpoint': str(start_from), 'demonstrations': digest({'records': records})}
    settings = made_of(config, parts.task) | {
        'convert': config.convert.to_dict(),
        # It says how many examples are validated on, and of given ones these are not learned from.
        'evaluation': {'problems': config.evaluation.problems},
        'given': origin,
    }

    def make(training: Path) -> bool:
        return _convert(
            config, parts, conversion, directory, training, mesh, interruption, start_from, records
        )

    return make_at(directory, settings, make)


def check_start(start_from: Path, parts: Parts, conversion: Conversion) -> None:
    """Refuses a policy that cannot be converted, before its weights are read.

    Raises:
      ValueError: it is a diffusion model, has adapters or no room for MASK, or would see other
        blocks than those that the configuration decodes.
      FileNotFoundError: there is no policy.
    """
    model = policies.model_of_policy(start_from)
    if not model.autoregressive:
        raise ValueError(
            f'{start_from} is a diffusion model already, expected an autoregressive one; train '
            'from it as it is, or set base.checkpoint to an autoregressive model'
        )
    if policies.base_of(start_from) != start_from:
        raise ValueError(
            f'{start_from} has adapters, but every parameter is converted; merge them with '
            'spg_jax.export --merge and start from the result'
        )
    policies.load_tokenizer(start_from).with_mask(model.vocab_size)
    check_decodings(model, parts, conversion)


def check_decodings(model: TransformerConfig, parts: Parts, conversion: Conversion) -> None:
    """Raises ValueError if the converted model sees other blocks than those that are decoded."""
    seen = dataclasses.replace(model, visible_block=conversion.final_block)
    try:
        for decoding in (parts.sampling, *parts.evaluation.decodings):
            decoding_of(seen, decoding)
    except ValueError as error:
        raise ValueError(
            f'convert.phases ends with {conversion.phases[-1].words}: {error}'
        ) from None


class _Record(TypedDict):
    """What is read of the record of a checkpoint when a conversion goes on."""

    iterator: dict[str, Any]
    candidates: dict[str, float]
    validated: list[dict[str, Any]]
    seconds: float
    last_row: dict[str, Any]


def _convert(
    config: ml_collections.ConfigDict,
    parts: Parts,
    conversion: Conversion,
    directory: Path,
    training: Path,
    mesh: Mesh,
    interruption: Interruption,
    start_from: Path,
    records: list[Record] | None,
) -> bool:
    """The conversion itself, in a directory that is claimed; arguments and result of `convert`."""
    total = conversion.updates
    examples = Examples(config, parts, conversion, start_from, mesh, records)
    policy, tokenizer, variables = starting_point(start_from, mesh, parts.execution)
    run = Run(training, keep=2)  # If the newest is damaged, the other is there to go on from.
    patience = min(config.train.max_skipped, total)
    optimizer = optimizer_of(config, conversion)
    state = initial_state(variables, optimizer, policy, mesh, average=False)
    size = float(jnp.std(variables['params']['embedding'].astype(jnp.float32)))
    # Phases with blocks of one size share a program.
    update_of = cache(partial(_update, config, policy, optimizer, shardings_of(state), size))
    validation = Validation(config, conversion, run, policy, tokenizer, examples, mesh)
    batches = examples.batches()
    if run.resumes:
        state = restored_state(run, state, _Record, patience, STUCK)
        batches.set_state(run.record['iterator'])
    first_update = 0
    for number, phase in enumerate(conversion.phases):
        noise_updates = config.convert.noise_updates
        update = update_of(phase.block, noise_updates if first_update < noise_updates else 0)
        left = range(run.step - first_update, phase.updates)
        for _ in track(left, f'{phase.words}, updates', partial(_figures, run)):
            state, metrics = update(state, examples.placed(next(batches)))
            run.push(metrics)
            ends = run.step == first_update + phase.updates
            due = run.step % CHECKPOINT_EVERY == 0
            if ends or run.step % config.convert.validate_every == 0:
                validation.look_at(state, number)
                due = due or validation.chooses(number)
            save = partial(_save, run, state, batches, validation)
            if follow_update(run, total, due, save, patience, STUCK, interruption):
                return False
        first_update += phase.updates
    run.close()
    chosen = validation.best()
    if distributed.is_leader():
        plots.curves(training, panels_of(conversion))
    distributed.barrier(f'curves of {training}')
    history = {'validated': run.record['validated'], 'mean_of_updates': chosen}
    notes = {
        'seconds': run.seconds,
        'config': config.to_dict(),
        'conversion': {'from': str(start_from)} | history,
    }
    merged = mean(validation.parameters(step) for step in chosen)
    model = dataclasses.replace(policy.config, visible_block=conversion.final_block)
    policies.save_policy(directory, {'params': merged}, model, tokenizer, notes)
    return True


def optimizer_of(
    config: ml_collections.ConfigDict, conversion: Conversion
) -> optax.GradientTransformation:
    """AdamW with the learning rates of the phases and gradient clipping."""
    settings = AdamW(
        learning_rate=config.convert.learning_rate,
        warmup_fraction=0.0,  # The phases have a rise of their own.
        b1=0.9,
        b2=0.98,
        weight_decay=config.convert.weight_decay,
        grad_clip=config.convert.grad_clip,
    )
    return optimizers.for_rl(settings, conversion.updates, conversion.rate)


def _update(
    config: ml_collections.ConfigDict,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    embedding_size: float,
    block: int,
    noise_updates: int,
) -> Update:
    """The update with blocks of a size, and with noise in the first updates of a conversion."""
    return make_update(
        policy,
        optimizer,
        block,
        shardings,
        seed=config.base.seed,
        complementary=config.convert.complementary,
        cap=config.convert.cap,
        noise=config.convert.noise * embedding_size,
        noise_updates=noise_updates,
    )


def _save(run: Run, state: TrainState, batches: Any, validation: Validation) -> None:
    """Writes a checkpoint, and then deletes the policies that it does not name."""
    run.save(state, iterator=batches.get_state())
    validation.tidy()


def starting_point(
    start_from: Path, mesh: Mesh, execution: dict[str, Any]
) -> tuple[Policy, Tokenizer, Variables]:
    """An autoregressive policy as the diffusion model that its conversion starts from.

    The output at a position predicts the token of that position, which is MASK, where the output at
    the position before it predicted it: as in LLaDA2.0 and unlike Dream. With blocks of 1 a masked
    position then sees exactly what predicted its token before. Every parameter is trained, so that
    none is quantised.
    """
    policy, tokenizer, variables = policies.load_policy(
        start_from, mesh, **execution | {'quantize': ''}
    )
    tokenizer = tokenizer.with_mask(policy.config.vocab_size)
    model = dataclasses.replace(policy.config, visible_block=0, shift_logits=False)
    return policies.make_policy(model, tokenizer), tokenizer, variables


def panels_of(conversion: Conversion) -> plots.Panels:
    """What the curves of a conversion show."""
    validated = {loss_name(block): None for block in (WHOLE, conversion.final_block)}
    return (
        ('nats per token', ('loss',)),
        ('validation, nats per token', tuple(validated)),
        ('gradient norm', ('gradient_norm',)),
        ('block', ('block',)),
    )


def _figures(run: Run) -> str:
    shown = [f'loss {run.last_row["loss"]:.3f}'] if run.last_row.get('loss') is not None else []
    for row in run.record['validated'][-1:]:
        name = loss_name(row['block'])
        shown += [f'validation {row[name]:.3f}'] if name in row else []
    return '  '.join(shown)


def closing_lines(directory: Path) -> str:
    """The last lines on the screen: the loss of each phase, the files, and what to do next."""
    notes = policies.policy_notes(directory)['conversion']
    phases = {row['phase']: row for row in notes['validated']}
    lines = []
    for row in phases.values():
        name = next(name for name in row if name.startswith('validation_loss'))
        kind = name.removeprefix('validation_loss_').replace('_', ' ')
        words = Phase(row['block'], 0, 1.0).words
        lines.append(f'after {words}: validation loss {row[name]:.4f} nats per token ({kind})')
    updates = ', '.join(map(str, notes['mean_of_updates']))
    quoted = shlex.quote(str(directory))
    return '\n'.join(
        [
            *lines,
            f'policy    {directory}, the mean after updates {updates}',
            f'curves    {training_of(directory)}/curves.png',
            f'evaluate  python -m spg_jax.evaluate --workdir={quoted}',
            f'train     python -m spg_jax.train --config=… --config.base.checkpoint={quoted}',
        ]
    )


def main(_: list[str]) -> None:
    config = FLAGS.config
    if not config.base.checkpoint:
        config.base.kind = AUTOREGRESSIVE
    # Fail early: settings that cannot work are refused before any long work.
    parts, conversion = assemble(config), conversion_of(config)
    if not FLAGS.demonstrations:
        parts.task.check_demonstrations([config.convert.right_share])
    mesh = sharding.make_mesh(config.mesh)
    check_mesh(config, parts, mesh)
    check_rows('convert.batch_size', config.convert.batch_size, mesh)
    if not config.base.checkpoint:
        check_decodings(model_of(config, vocab_size=1, platform='cpu'), parts, conversion)
        check_base(config, parts)
    records = (
        read_demonstrations(FLAGS.demonstrations, parts.task) if FLAGS.demonstrations else None
    )
    cli.compile_cache()
    directory = Path(FLAGS.workdir) if FLAGS.workdir else default_directory(config)
    with jax.set_mesh(mesh), Interruption() as interruption:
        start_from = find_or_make_base(config, mesh, interruption)
        if start_from is None:
            return
        if convert(config, directory, mesh, interruption, start_from, records):
            print(closing_lines(directory))


def default_directory(config: ml_collections.ConfigDict) -> Path:
    """runs/TASK-convert-HASH, where the hash is that of all settings."""
    return Path('runs') / f'{config.task.name}-convert-{digest(config)}'


if __name__ == '__main__':
    define_config_flag(complete)
    cli.define_distributed_flag()
    cli.define_path_flag(
        'workdir', '', "Where the policy goes; '' is runs/TASK-convert-HASH.", saves=True
    )
    cli.define_path_flag(
        'demonstrations',
        '',
        'JSON lines {"example": problem, "completion": text} to learn from in place of the '
        "task's demonstrator.",
    )
    cli.run(main)

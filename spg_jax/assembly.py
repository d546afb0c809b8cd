"""The door between settings and code: a configuration becomes the parts of a run.

Above this module code reads an `ml_collections` configuration, below it only typed values exist.
Settings that cannot work fail here, because the part they are for cannot be made: the error names
the key, the value and a value that works.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from jax.sharding import Mesh

from spg_jax import tasks
from spg_jax.data.batches import LONG_PROMPTS
from spg_jax.data.tokenizers import word_tokenizer
from spg_jax.diffusion.corruption import Corruption
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.errors import check_one_of
from spg_jax.limits import MOST_TOKENS, check_settings, check_sizes, setting
from spg_jax.models.attention import resolve
from spg_jax.models.lora import LoRA
from spg_jax.models.transformer import EXECUTION, TransformerConfig, check_heads
from spg_jax.rl.batching import Batching, largest_divisor
from spg_jax.rl.collection import decoding_of
from spg_jax.rl.evaluator import Evaluation
from spg_jax.rl.objectives import Objective, Protocol, find, group_of
from spg_jax.rl.plug_ins import PlugIns, with_plug_ins
from spg_jax.sharding import row_shards
from spg_jax.training.optimizers import AdamW
from spg_jax.training.phases import Conversion, Phase, rounded

DIFFUSION, AUTOREGRESSIVE = KINDS = ('diffusion', 'autoregressive')  # of a base policy


class Stage(NamedTuple):
    """One stage in the training of a base policy."""

    steps: int
    right_share: float  # of the demonstrations, in [0, 1]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that a configuration describes and that needs neither data nor devices."""

    task: tasks.Task  # as rollouts and demonstrations see it
    evaluation_task: tasks.Task  # published formats differ between training and evaluation
    sampling: SamplingConfig  # how rollouts are decoded
    evaluation: Evaluation
    objective: Objective
    batching: Batching
    optimizer: AdamW  # of RL
    lora: LoRA | None  # adapters that RL trains; None trains every parameter
    adapter: Path | None  # saved adapters that RL starts from
    prompt_lengths: tuple[int, ...]  # lengths that prompts are padded to, ascending
    stages: tuple[Stage, ...]  # of the base policy
    execution: dict[str, Any]  # the fields EXECUTION of the model: how it computes


def assemble(config: ml_collections.ConfigDict) -> Parts:
    """Makes the parts of a run; reads no file but a prompt template and starts no device.

    Args:
      config: the settings; paths among them are changed to what they mean, such as ~.

    Raises:
      ValueError: one line that names the setting that cannot work.
    """
    check_settings(config)
    check_one_of('base.kind', config.base.kind, KINDS)
    if config.base.kind == AUTOREGRESSIVE and (config.base.edit_weight or config.base.keep_weight):
        raise ValueError(
            'base.edit_weight and base.keep_weight are for diffusion models, found base.kind '
            f'{AUTOREGRESSIVE}; set both to 0, or base.kind {DIFFUSION}'
        )
    model_of(config, vocab_size=1, platform='cpu')
    lora = _lora(config)
    if config.model.quantize and lora is None:
        raise ValueError(
            f'model.quantize is {config.model.quantize!r} with lora.rank 0, which trains every '
            "parameter; a quantised base is frozen: use lora.rank 1 or more, or model.quantize ''"
        )
    check_one_of('data.long_prompts', config.data.long_prompts, LONG_PROMPTS)
    if config.train.wandb and not importlib.util.find_spec('wandb'):
        raise ValueError(
            f'train.wandb is {config.train.wandb!r} but wandb is not installed; '
            "pip install -e '.[wandb]'"
        )
    batching = Batching(**{field: config.rl[field] for field in _fields(Batching)})
    sampling = _sampling(config)
    objective = _objective(config, sampling, batching)
    batching.check_draws(objective.draws)
    _check_groups(config.rl.objective, objective, batching)
    check_sizes(config, batching)
    return Parts(
        task=_task(config, config.task.format),
        evaluation_task=_evaluation_task(config),
        sampling=_recording(config, sampling, objective),
        evaluation=_evaluation(config),
        objective=objective,
        batching=batching,
        optimizer=AdamW(**{field: config.optimizer[field] for field in _fields(AdamW)}),
        lora=lora,
        adapter=Path(config.lora.adapter) if config.lora.adapter else None,
        prompt_lengths=_prompt_lengths(config),
        stages=_stages(config.base.stages),
        execution={name: config.model[name] for name in EXECUTION},
    )


def fit_to_model(
    config: ml_collections.ConfigDict, parts: Parts, model: TransformerConfig
) -> Parts:
    """The parts of a run of reinforcement learning as the model that it starts from needs them.

    Targets of adapters that the model does not have are left out. If positions of the model see
    blocks, corruptions count their blocks as the model does.

    Raises:
      ValueError: if the model is autoregressive, sees blocks of another length than those that are
        decoded, or gives a row draws that do not split into passes; the message says what to do.
    """
    if model.autoregressive:
        key = 'base.checkpoint' if config.base.checkpoint else 'base.kind'
        raise ValueError(
            f'the model of {key} {setting(config, key)!r} is autoregressive, and this is '
            'reinforcement learning of diffusion models; make it one with spg_jax.convert, and set '
            'base.checkpoint to the result'
        )
    for decoding in (parts.sampling, *parts.evaluation.decodings):
        decoding_of(model, decoding)
    lora, objective = parts.lora, parts.objective
    if lora:
        lora = lora.for_kernels(model.adapted_kernels)
        dataclasses.replace(model, lora=lora)  # Raises if the model cannot have these adapters.
    if model.visible_block:
        objective = _objective(config, parts.sampling, parts.batching, from_prompt=True)
        parts.batching.check_draws(objective.draws)  # A rollout has more steps.
    return dataclasses.replace(parts, lora=lora, objective=objective)


def check_mesh(config: ml_collections.ConfigDict, parts: Parts, mesh: Mesh) -> None:
    """Refuses rows, and heads of a model made here, that do not split evenly over the devices.

    Raises:
      ValueError: one line that names the setting.
    """
    if not config.base.checkpoint:
        check_heads(model_of(config, vocab_size=1, platform='cpu'), mesh)
    for key in ('rl.microbatch', 'rl.generation_batch', 'base.batch_size'):
        check_rows(key, setting(config, key), mesh)
    parts.batching.local_prompts(mesh)


def check_rows(key: str, rows: int, mesh: Mesh) -> None:
    """Raises ValueError unless the rows of a setting split evenly over the devices."""
    shards = row_shards(mesh)
    if rows % shards:
        raise ValueError(
            f'{key} is {rows}, which {shards} shards of rows (mesh.data x mesh.fsdp) do not '
            f'divide; use a multiple of {shards}'
        )


def check_base(config: ml_collections.ConfigDict, parts: Parts, demonstrator: bool = True) -> None:
    """Refuses to train a base policy on a task that lacks a part that this needs.

    Args:
      config: the settings; without base.checkpoint the task needs a vocabulary.
      parts: what the settings describe.
      demonstrator: whether the answers to imitate are those of the task.

    Raises:
      ValueError: one line that names the part.
    """
    if not config.base.checkpoint:
        word_tokenizer(parts.task)
    if demonstrator:
        parts.task.check_demonstrations(stage.right_share for stage in parts.stages if stage.steps)
        if config.base.edit_weight:
            parts.task.check_corrections(config.base.wrong_share)


def model_of(
    config: ml_collections.ConfigDict, vocab_size: int, platform: str
) -> TransformerConfig:
    """The model of a base policy trained here, on devices of a platform; raises as its parts do."""
    attention = resolve(config.model.attention, platform, config.model.dtype)
    fields = config.model.to_dict() | {'attention': attention}
    if config.base.kind == AUTOREGRESSIVE:
        fields |= {'visible_block': 1, 'shift_logits': True}
    return TransformerConfig(vocab_size, **fields)


def conversion_of(config: ml_collections.ConfigDict) -> Conversion:
    """How an autoregressive model is converted.

    Raises:
      ValueError: one line that names the setting that cannot work.
    """
    settings = config.convert
    for phase in settings.phases:
        match phase:
            case (int(block), int(updates), float() | int() as share) if (
                block >= 0 and updates >= 1 and share > 0
            ):
                continue
        raise ValueError(
            f'convert.phases has {phase!r}; use (block, updates, share of the learning rate) such '
            'as (4, 200, 1.0), with a block of 0 for the whole length'
        )
    if not settings.phases:
        raise ValueError('convert.phases is (); use one phase or more, such as ((0, 2000, 1.0),)')
    phases = tuple(Phase(*phase) for phase in settings.phases)
    longest = config.sampling.prompt_length + config.sampling.length
    conversion = Conversion(
        phases=phases,
        examples_length=longest,
        documents=settings.documents,
        length=settings.length or settings.documents * rounded(longest, phases),
    )
    tokens = 4 * settings.batch_size * conversion.length  # with complements and clean copies
    if tokens > MOST_TOKENS:
        raise ValueError(
            f'convert.batch_size is {settings.batch_size}, up to {tokens} tokens with complements '
            f'and clean copies; use at most {MOST_TOKENS} tokens'
        )
    return conversion


def _task(config: ml_collections.ConfigDict, format: str) -> tasks.Task:
    settings = config.task
    return tasks.get(
        settings.name,
        format,
        settings.prompt_template,
        settings.shots,
        settings.rules,
        settings.fields,
    )


def _evaluation_task(config: ml_collections.ConfigDict) -> tasks.Task:
    trained = config.task.format
    return _task(config, 'published_eval' if trained == 'published_train' else trained)


def _sampling(config: ml_collections.ConfigDict) -> SamplingConfig:
    settings = set(_fields(SamplingConfig)) - {'records', 'influence_window'}
    return SamplingConfig(**{field: config.sampling[field] for field in settings})


def _recording(
    config: ml_collections.ConfigDict, sampling: SamplingConfig, objective: Objective
) -> SamplingConfig:
    """The sampler of rollouts, which records what the objective asks for."""
    records = set(objective.records)
    recorded = records - {'influence'} | ({'log_prob'} if objective.needs_law else set())
    if sampling.edits and recorded and not objective.edits:
        raise ValueError(
            f'rl.objective {config.rl.objective!r} reads the {", ".join(sorted(recorded))} of the '
            f'tokens that were drawn, which sampling.{sampling.rule_setting} '
            f'{sampling.rule_name!r} edits; use a sampler that does not, or rl.objective autoedit'
        )
    if sampling.approximate:  # so that its gap to the model is logged (`rl.gap`)
        records.add('log_prob')
    if objective.needs_law:
        records.add('log_prob')
        if not sampling.exact_law:
            raise ValueError(
                f'rl.objective {config.rl.objective!r} needs the law of completions, which '
                f'sampling.{sampling.rule_setting} {sampling.rule_name!r} does not record at '
                f'temperature {sampling.temperature}; use random, left_to_right, entropy or margin'
            )
    return dataclasses.replace(
        sampling, records=tuple(sorted(records)), influence_window=config.corruption.window
    )


def _lora(config: ml_collections.ConfigDict) -> LoRA | None:
    if not config.lora.rank:
        return None
    return LoRA(**{field: config.lora[field] for field in _fields(LoRA)})


def _prompt_lengths(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    lengths = (*config.sampling.prompt_buckets, config.sampling.prompt_length)
    if list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        raise ValueError(
            f'sampling.prompt_buckets is {lengths[:-1]}; use ascending lengths below '
            f'sampling.prompt_length {lengths[-1]}'
        )
    return lengths


def _evaluation(config: ml_collections.ConfigDict) -> Evaluation:
    lengths, steps = config.evaluation.lengths, config.evaluation.steps
    if len(lengths) != len(steps) or not lengths:
        raise ValueError(
            f'evaluation.lengths {tuple(lengths)} and evaluation.steps {tuple(steps)} must pair '
            'up; give one number of steps for each length'
        )
    if len(set(lengths)) < len(lengths):
        raise ValueError(
            f'evaluation.lengths {tuple(lengths)} names a length twice, whose figures would share '
            'a name; give each length once'
        )
    rollouts, sampler = _sampling(config), config.evaluation.sampler
    try:
        # Whatever else the rule reads, such as its thresholds, is that of rollouts.
        decodings = tuple(
            dataclasses.replace(
                rollouts,
                length=length,
                steps=number,
                block_length=config.evaluation.block_length,
                temperature=0.0,
                sampler=sampler,
                # Without a rule of its own an evaluation decodes as published ones do.
                commit=rollouts.commit if sampler else SamplingConfig.commit,
                cache='',
                refresh=SamplingConfig.refresh,
                top_k=0,
                top_p=1.0,
            )
            for length, number in zip(lengths, steps, strict=True)
        )
    except ValueError as error:
        message = str(error).replace('sampling.length', 'evaluation.lengths')
        for name in ('steps', 'block_length', 'sampler'):
            message = message.replace(f'sampling.{name}', f'evaluation.{name}')
        raise ValueError(message) from None
    return Evaluation(
        decodings=decodings,
        trained_length=config.sampling.length,
        temperature=config.sampling.temperature,
        samples=config.evaluation.samples,
        batch=config.evaluation.batch,
        compact=config.evaluation.compact,
        prompt_lengths=_prompt_lengths(config),
        seed=config.train.seed,
    )


def _objective(
    config: ml_collections.ConfigDict,
    sampling: SamplingConfig,
    batching: Batching,
    from_prompt: bool = False,
) -> Objective:
    method = find(config.rl.objective)
    corruption = Corruption(
        kind=config.corruption.kind,
        draws=config.corruption.draws,
        block_length=config.sampling.block_length,
        prompt_rate=config.corruption.prompt_rate,
        block_draw=config.corruption.block_draw,
        times=config.corruption.times,
        informed=config.corruption.informed,
        strength=config.corruption.strength,
        from_prompt=from_prompt,
    )
    settings = method.settings(**config[group_of(config.rl.objective)])
    objective = method.build(settings, Protocol(corruption, sampling, batching))
    if corruption.informed and not set(corruption.records) <= set(objective.records):
        raise ValueError(
            f'corruption.informed is on, but rl.objective {config.rl.objective!r} draws masks of '
            'its own, which informed masking would break; turn it off, or use rl.objective spg'
        )
    plug_ins = PlugIns(
        advantage=config.rl.advantage,
        kl=config.rl.kl,
        kl_estimator=config.rl.kl_estimator,
        clip=config.rl.clip,
        clip_range=config.rl.clip_range,
        complementary=config.corruption.complementary,
    )
    own_kl = config[group_of(config.rl.objective)].get('kl', 0.0)
    return with_plug_ins(objective, plug_ins, config.rl.objective, batching, own_kl)


def _check_groups(name: str, objective: Objective, batching: Batching) -> None:
    """Refuses a group of one where completions are compared, and rows that do not split.

    Raises:
      ValueError: one line that names the setting.
    """
    if objective.compares and batching.group_size < 2:
        raise ValueError(
            f'rl.group_size is {batching.group_size}; {name} compares a completion with its group, '
            'use 2 or more'
        )
    ring = objective.experience
    if ring is None:
        return
    if objective.behaviour:
        raise ValueError(
            f'{name} learns from a ring of rows and wants readouts of the behaviour policy, which '
            'are taken under the draws of the first updates after a rollout; a row of a ring gets '
            'others, so leave out Objective.experience or Objective.behaviour'
        )
    if ring.rows % batching.microbatch:
        raise ValueError(
            f'rl.microbatch {batching.microbatch} does not divide the {ring.rows} rows of an '
            f'update of {name}; use {largest_divisor(ring.rows, batching.microbatch)}'
        )
    if objective.phase and objective.phase.length % ring.every:
        raise ValueError(
            f'a phase of {name} has {objective.phase.length} updates, which its {ring.every} '
            'updates between two refreshes do not divide; change one of them'
        )


def _stages(stages: Sequence[Any]) -> tuple[Stage, ...]:
    for stage in stages:
        match stage:
            case (int(steps), float() | int() as share) if steps >= 0 and 0 <= share <= 1:
                continue
        raise ValueError(
            f'base.stages has {stage!r}; use pairs (steps >= 0, share of right answers in [0, 1]) '
            'such as ((1500, 1.0), (300, 0.3))'
        )
    if not sum(steps for steps, _ in stages):
        raise ValueError(f'base.stages is {tuple(stages)}; use one step or more in all')
    return tuple(Stage(*stage) for stage in stages)


def _fields(part: type) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]

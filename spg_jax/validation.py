"""Refuses settings that cannot work before any long work starts, naming the key, the value and the
fix."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from spg_jax.config import (
    corruption_of,
    evaluation_lengths,
    evaluation_sampling,
    lora_of,
    model_of,
    prompt_buckets,
    sampling_config,
    training_task,
)
from spg_jax.data.batches import LONG_PROMPTS
from spg_jax.diffusion import bounds
from spg_jax.models.transformer import check_heads
from spg_jax.rl.objectives import REGISTRY
from spg_jax.sharding import own_rows, row_shards

POSITIVE = (
    'sampling.prompt_length',
    'rl.prompts',
    'rl.inner_updates',
    'rl.microbatch',
    'train.steps',
    'train.max_skipped',
    'base.batch_size',
    'evaluation.every',
    'evaluation.problems',
    'evaluation.batch',
    'evaluation.samples',
    'checkpoint.every',
    'checkpoint.keep',
)
# Keys, what must hold, how to say it.
RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (POSITIVE, lambda x: x >= 1, 'a positive integer'),
    (
        ('base.learning_rate', 'base.grad_clip', 'optimizer.learning_rate', 'optimizer.grad_clip'),
        lambda x: 0 < x < math.inf,
        'a positive number',
    ),
    (
        ('base.weight_decay', 'optimizer.weight_decay'),
        lambda x: 0 <= x < math.inf,
        'a number of at least 0',
    ),
    (
        ('base.ema', 'optimizer.b1', 'optimizer.b2'),
        lambda x: 0 <= x < 1,
        'a decay of at least 0 and below 1',
    ),
    (('optimizer.warmup_fraction',), lambda x: 0 <= x <= 1, 'a share within [0, 1]'),
    (('sampling.guidance',), math.isfinite, 'a finite number'),
)


def validate(config: ml_collections.ConfigDict) -> None:
    """Stops at impossible settings before any long work, with the value found and the fix.

    Raises:
      ValueError: one line naming the key.
    """
    training_task(config)
    model_of(config, vocab_size=1, platform='cpu')
    lora_of(config)
    if config.model.quantize and not config.lora.rank:
        raise ValueError(
            f'model.quantize is {config.model.quantize!r} with lora.rank 0, which trains every '
            "parameter; a quantised base is frozen: use lora.rank 1 or more, or model.quantize ''"
        )
    sampling_config(config)
    for length, steps in evaluation_lengths(config):
        evaluation_sampling(config, length, steps)
    bounds.check_pairing(config.rl.estimator, corruption_of(config))
    _one_of('data.long_prompts', config.data.long_prompts, LONG_PROMPTS)
    _one_of('rl.objective', config.rl.objective, tuple(REGISTRY))
    REGISTRY[config.rl.objective](config)
    _check_numbers(config)
    _check_stages(config.base.stages)
    _check_rows(config)
    if config.train.wandb and not importlib.util.find_spec('wandb'):
        raise ValueError(
            f'train.wandb is {config.train.wandb!r} but wandb is not installed; '
            "pip install -e '.[wandb]'"
        )


def check_mesh(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Refuses rows, and heads of a model made here, that do not split evenly over the devices.

    Raises:
      ValueError: one line naming the key.
    """
    if not config.base.checkpoint:
        check_heads(model_of(config, vocab_size=1, platform='cpu'), mesh)
    shards = row_shards(mesh)
    for key in ('rl.microbatch', 'rl.generation_batch', 'base.batch_size'):
        rows = _get(config, key)
        if rows % shards:
            raise ValueError(
                f'{key} is {rows}, which {shards} shards of rows (mesh.data x mesh.fsdp) do not '
                f'divide; use a multiple of {shards}'
            )
    group_size = config.rl.group_size
    own = own_rows(mesh, config.rl.prompts * group_size)
    prompts = np.unique(own // group_size)
    if len(own) < len(prompts) * group_size:
        raise ValueError(
            f'{config.rl.prompts} groups of {group_size} rows over {jax.process_count()} processes '
            'would straddle them; use rl.prompts a multiple of that number, or fewer processes'
        )


def _get(config: ml_collections.ConfigDict, key: str) -> Any:
    group, leaf = key.split('.')
    return config[group][leaf]


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    for keys, holds, expected in RANGES:
        for key in keys:
            if not holds(_get(config, key)):  # NaN holds nothing
                raise ValueError(f'{key} is {_get(config, key)}; use {expected}')


def _check_stages(stages: Sequence[Any]) -> None:
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


def _check_rows(config: ml_collections.ConfigDict) -> None:
    rows = config.rl.prompts * config.rl.group_size
    if config.rl.group_size < 2:
        raise ValueError(
            f'rl.group_size is {config.rl.group_size}; a completion is compared with its '
            'group, use 2 or more'
        )
    if rows % config.rl.microbatch:
        raise ValueError(
            f'rl.microbatch {config.rl.microbatch} does not divide the {rows} rows of a rollout '
            f'batch (rl.prompts x rl.group_size); use {math.gcd(rows, config.rl.microbatch)}'
        )
    generated = config.rl.generation_batch
    if generated < 0 or (generated and rows % generated):
        raise ValueError(
            f'rl.generation_batch {generated} does not divide the {rows} rows of a rollout batch '
            f'(rl.prompts x rl.group_size); use {math.gcd(rows, generated)}, or 0 for all at once'
        )
    buckets = prompt_buckets(config)
    if list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(
            f'sampling.prompt_buckets is {buckets[:-1]}; use ascending lengths below '
            f'sampling.prompt_length {buckets[-1]}'
        )
    per_pass, draws = config.rl.draws_per_pass, config.corruption.draws
    if per_pass < 0 or (per_pass and draws % per_pass):
        raise ValueError(
            f'rl.draws_per_pass {per_pass} does not divide corruption.draws {draws}; '
            'use 1, or 0 for all at once'
        )


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f'{key} is {value!r}; use one of {", ".join(known)}')

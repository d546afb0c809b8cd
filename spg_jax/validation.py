"""Refuses settings that cannot work before any long work starts, naming the key, the value and the fix."""

import math

import ml_collections

from spg_jax.config import corruption_of, evaluation_lengths, evaluation_sampling, sampling_config
from spg_jax.diffusion import bounds
from spg_jax.rl.objectives import REGISTRY

NEGATIVES = ('mixture', 'eubo', 'elbo', 'none')
BOUNDS = ('plain', 'strict', 'loose')
POSITIVE = (
    'sampling.prompt_length', 'rl.prompts', 'rl.inner_updates', 'rl.microbatch', 'train.steps',
    'train.max_skipped', 'base.batch_size', 'evaluation.every', 'evaluation.problems',
    'evaluation.batch', 'evaluation.samples', 'checkpoint.every', 'checkpoint.keep',
)


def validate(config: ml_collections.ConfigDict) -> None:
    """Stops at impossible settings before any long work, with the value found and the fix.

    Raises:
      ValueError: one line naming the key.
    """
    sampling_config(config)
    for length, steps in evaluation_lengths(config):
        evaluation_sampling(config, length, steps)
    bounds.check_pairing(
        config.rl.estimator, config.corruption.kind, corruption_of(config).perturb_completion
    )
    _one_of('rl.negative', config.rl.negative, NEGATIVES)
    _one_of('rl.bound', config.rl.bound, BOUNDS)
    _one_of('rl.objective', config.rl.objective, tuple(REGISTRY))
    rows = config.rl.prompts * config.rl.group_size
    for key in POSITIVE:
        group, leaf = key.split('.')
        if config[group][leaf] < 1:
            raise ValueError(f'{key} is {config[group][leaf]}; use a positive integer')
    if config.rl.group_size < 2:
        raise ValueError(
            f'rl.group_size is {config.rl.group_size}; a completion is compared with its group, use 2 or more'
        )
    if rows % config.rl.microbatch:
        raise ValueError(
            f'rl.microbatch {config.rl.microbatch} does not divide the {rows} rows of a rollout batch '
            f'(rl.prompts x rl.group_size); use {math.gcd(rows, config.rl.microbatch)}'
        )
    per_pass, draws = config.rl.draws_per_pass, config.corruption.draws
    if per_pass < 0 or (per_pass and draws % per_pass):
        raise ValueError(
            f'rl.draws_per_pass {per_pass} does not divide corruption.draws {draws}; use 1, or 0 for all at once'
        )
    if config.rl.beta < 1:
        raise ValueError(f'rl.beta is {config.rl.beta}; the Renyi order of the EUBO is at least 1')
    if not 0 <= config.rl.omega <= 1:
        raise ValueError(f'rl.omega is {config.rl.omega}; a share lies within [0, 1]')
    for index, (steps, right_share) in enumerate(config.base.stages):
        if steps < 0 or not 0 <= right_share <= 1:
            raise ValueError(
                f'base.stages[{index}] is {(steps, right_share)}; use (steps >= 0, share of right answers in [0, 1])'
            )


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f'{key} is {value!r}; use one of {", ".join(known)}')

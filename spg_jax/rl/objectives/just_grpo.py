"""JustGRPO (LeapLabTHU/JustGRPO @ eebe50e, grpo.py): exact likelihoods, from left to right.

Completions are sampled from left to right, one token a step, at temperature 1. Draw i is then what
the sampler saw when it chose token i: the prompt and the tokens before i, and MASK from i on. The
log-probabilities l_i = log pi(x_i | prompt, x_<i) of all C draws are those of an autoregressive
model, and their sum is the exact log-likelihood of the completion. For the G completions of a group

    loss = -sum_j A_j sum_{i <= C} r_ji / (C (#{j: A_j != 0} + 1e-5)),
    A = (R - mean) / (standard deviation + 1e-4)

with G - 1 in the variance; several groups are averaged. Tokens after the EOS count as well, as far
as the sampler chose them: what it filled in after an early stop is left out, while C stays the
divisor. (The released code never stops early: `sampling.stop_early=False`.)

The released code makes one update a rollout, with r_i = exp(l_i - stop_gradient(l_i)). This ratio
is 1, and its clip at 0.2 never acts; this is `epsilon=0`, the default. The paper's loss, with the
ratio to the behaviour policy and a clip, is a positive `epsilon`.

A row takes C forward passes over the whole sequence. `rl.draws_per_pass` says how many of them are
in memory at once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.rl.advantages import standardised
from spg_jax.rl.objectives.objective import (
    Batch,
    Metrics,
    Moment,
    Objective,
    Protocol,
    over_groups,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.ratios import token_losses
from spg_jax.rl.rollout import Rollout

NO_RATIOS = 'just_grpo.epsilon is 0, which leaves out its ratios; set a clip range there'
RECIPE = {
    'rl.group_size': 16,
    'rl.inner_updates': 1,
    'optimizer.learning_rate': 5e-6,
    'optimizer.schedule': 'constant',
    'optimizer.b1': 0.9,
    'optimizer.b2': 0.999,
    'optimizer.weight_decay': 0.0,
    'optimizer.grad_clip': 1.0,
    'sampling.temperature': 1.0,
    'sampling.commit': 'left_to_right',
    'sampling.stop_early': False,
    'train.steps': 125,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of JustGRPO."""

    epsilon: float = setting(0.0, 'clip range of ratios to the behaviour policy; 0: no ratios')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if the sampler does not go from left to right, one token a step.
    """
    check_order(protocol.sampling)
    length = protocol.sampling.length

    def corruption(row: Rollout, moment: Moment) -> Draws:
        position = jnp.arange(length)
        masked = position[None, :] >= position[:, None]  # [draw i, C]
        target = jnp.eye(length, dtype=bool) & (row.commit_step >= 0)[None, :]
        prompt = jnp.zeros((length, len(row.prompt)), bool)
        return Draws(masked=jnp.concatenate([prompt, masked], axis=1), target=target)

    def loss_of_group(logp: Array, batch: Batch) -> tuple[Array, Metrics]:
        """logp: [G, C, C]."""
        if settings.epsilon:
            losses, metrics = token_losses(logp, batch, settings.epsilon, kl=0.0)
        else:
            log_ratio = jnp.where(batch.target, logp - jax.lax.stop_gradient(logp), 0.0)
            surrogate = jnp.exp(log_ratio) * batch.advantage[:, None, None]
            losses = -jnp.where(batch.target, surrogate, 0.0)
            metrics = {}
        rows = (batch.advantage != 0).sum().astype(jnp.float32)
        likelihood = jnp.where(batch.target, logp, 0.0).sum()
        metrics['token_log_prob'] = (likelihood, batch.target.sum().astype(jnp.float32))
        return losses.sum() / (length * (rows + 1e-5)), metrics

    return Objective(
        corruption=corruption,
        draws=length,
        loss=over_groups(loss_of_group, protocol.batching.group_size),
        couples='group',
        advantage=standardised,
        behaviour=bool(settings.epsilon),
        clips=bool(settings.epsilon),
        refuses={} if settings.epsilon else {'rl.clip': NO_RATIOS},
        idle=without_advantage,
    )


def check_order(sampling: SamplingConfig) -> None:
    """Refuses a sampler that does not go from left to right, one token a step.

    Raises:
      ValueError: one line that names the setting.
    """
    if sampling.rule_name != 'left_to_right' and sampling.block_length > 1:
        raise ValueError(
            f'sampling.{sampling.rule_setting} is {sampling.rule_name!r} in blocks of '
            f'{sampling.block_length}, but '
            "just_grpo scores tokens from left to right; use sampling.commit 'left_to_right'"
        )
    if sampling.steps != sampling.length:
        raise ValueError(
            f'sampling.steps is {sampling.steps} for {sampling.length} tokens, but just_grpo '
            f'scores one token a step; use sampling.steps {sampling.length}'
        )
    if sampling.schedule != 'even':
        raise ValueError(
            f'sampling.schedule is {sampling.schedule!r}, with steps that commit several tokens or '
            "none, but just_grpo scores one token a step; use sampling.schedule 'even'"
        )

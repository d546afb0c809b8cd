"""Plug-ins: options that change any method that admits them; each makes an Objective of another.

They are applied where an objective is assembled, so that a user's own method gets them as well. A
plug-in at its neutral value leaves the objective as it is. One that has no meaning for a method is
refused with the reason: `Objective.refuses` holds what only the file of the method can say, and the
functions here find the rest.

- `rl.advantage` puts another baseline in the place of the method's own.
- `rl.kl` adds a divergence from the initial policy to the loss, see `with_kl`.
- `rl.clip` clips ratios to the policy that sampled, see `with_clip`.
- `corruption.complementary` draws masks in pairs, see `ComplementaryPairs`.

Letters of axes: `b` rows, `M` draws, `C` positions of a completion, `P` of a prompt, `L` = P + C.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import INFORMED_KINDS, Corruption, Draws
from spg_jax.errors import check_one_of
from spg_jax.rl.advantages import group_advantages, leave_one_out, raw, standardised
from spg_jax.rl.batching import Batching
from spg_jax.rl.objectives import group_of
from spg_jax.rl.objectives.objective import (
    BEHAVIOUR,
    PPO,
    REFERENCE,
    UNCONDITIONAL,
    Batch,
    Configured,
    LogProbs,
    Loss,
    Moment,
    Objective,
    never,
    over_units,
    token_log_probs,
)
from spg_jax.rl.objectives.ratios import k2, k3
from spg_jax.rl.rollout import Rollout

METHOD = 'method'  # the method's own
ADVANTAGES = {
    'centred': group_advantages,
    'leave_one_out': leave_one_out,
    'standardised': standardised,
    'raw': raw,
}
ESTIMATORS = {'k2': k2, 'k3': k3}
CLIPS = (PPO, UNCONDITIONAL)


@dataclasses.dataclass(frozen=True)
class PlugIns:
    """The settings of all plug-ins; the defaults are neutral.

    Attributes:
      advantage: 'method', or a name of ADVANTAGES.
      kl: weight of the divergence from the initial policy.
      kl_estimator: a name of ESTIMATORS.
      clip: 'method', 'ppo' or 'unconditional'.
      clip_range: ratios are clipped to 1 - clip_range and 1 + clip_range, where the method has no
        range of its own.
      complementary: whether draws come in pairs that cover each position once.

    Raises:
      ValueError: on an unknown name or a number out of range.
    """

    advantage: str = METHOD
    kl: float = 0.0
    kl_estimator: str = 'k3'
    clip: str = METHOD
    clip_range: float = 0.2
    complementary: bool = False

    def __post_init__(self) -> None:
        check_one_of('rl.advantage', self.advantage, (METHOD, *ADVANTAGES))
        check_one_of('rl.kl_estimator', self.kl_estimator, ESTIMATORS)
        check_one_of('rl.clip', self.clip, (METHOD, *CLIPS))
        if not 0.0 <= self.kl < math.inf:
            raise ValueError(f'rl.kl is {self.kl}; use a weight of at least 0')
        if not 0.0 < self.clip_range < 1.0:
            raise ValueError(f'rl.clip_range is {self.clip_range}; use a number between 0 and 1')


def with_plug_ins(
    objective: Objective, plug_ins: PlugIns, name: str, batching: Batching, own_kl: float = 0.0
) -> Objective:
    """The objective with all plug-ins.

    Args:
      objective: of a method.
      plug_ins: which ones.
      name: of the method, for messages.
      batching: the rows of groups and updates.
      own_kl: the weight of the method's own divergence, if it has one.

    Raises:
      ValueError: a plug-in has no meaning for the method; one line names both, with the reason.
    """
    values = {
        'rl.advantage': plug_ins.advantage,
        'rl.kl': plug_ins.kl,
        'rl.clip': plug_ins.clip,
        'corruption.complementary': plug_ins.complementary,
    }
    neutral = {'rl.advantage': METHOD, 'rl.clip': METHOD}
    for key, value in values.items():
        if value == neutral.get(key, 0):
            continue
        reason = (
            objective.refuses.get(key)
            or objective.refuses.get(f'{key}={value}')
            or _reason(key, value, objective, name, batching, own_kl)
        )
        if reason:
            raise ValueError(
                f'{key} is {value!r}, which has no meaning for rl.objective {name!r}: {reason}'
            )
    if plug_ins.advantage != METHOD:
        objective = dataclasses.replace(objective, advantage=ADVANTAGES[plug_ins.advantage])
    if plug_ins.complementary:
        pairs = ComplementaryPairs(objective.corruption.corruption)
        objective = dataclasses.replace(objective, corruption=pairs)
    if plug_ins.clip != METHOD:
        objective = with_clip(objective, plug_ins.clip, plug_ins.clip_range)
    if plug_ins.kl:
        objective = with_kl(objective, plug_ins.kl, plug_ins.kl_estimator, batching.group_size)
    return objective


def _reason(
    key: str, value: Any, objective: Objective, name: str, batching: Batching, own_kl: float
) -> str:
    """Why a plug-in has no meaning for an objective, as far as its fields show it; '' if not."""
    reads_log_probs = objective.readout is token_log_probs or isinstance(
        objective.readout, LogProbs
    )
    if key in ('rl.kl', 'rl.clip') and not reads_log_probs:
        return 'its readouts are not log-probabilities of tokens alone'
    if key == 'rl.advantage' and value != 'raw' and batching.group_size < 2:
        return f'rl.group_size is {batching.group_size}, and a baseline needs 2 or more'
    if key == 'rl.kl' and own_kl:
        own = f'{group_of(name)}.kl'
        return f'it has a divergence of its own, {own} {own_kl}; change that, or set it to 0 first'
    if key == 'rl.clip':
        return _reason_against_clip(value, objective, batching)
    if key == 'corruption.complementary':
        return _reason_against_pairs(objective)
    return ''


def _reason_against_clip(clip: str, objective: Objective, batching: Batching) -> str:
    if objective.clips:
        return ''
    if objective.behaviour:
        return (
            'it looks at the policy that sampled in a way of its own; clip there, with '
            'spg_jax.rl.objectives.ratios, and set Objective.clips'
        )
    if objective.experience:
        return 'it learns from a ring, whose rows have other masks than when they were sampled'
    if batching.inner_updates == 1:
        return 'rl.inner_updates is 1, with which every ratio is 1'
    return ''


def _reason_against_pairs(objective: Objective) -> str:
    if not isinstance(objective.corruption, Configured):
        return 'it draws masks of its own, not those of the group corruption'
    corruption = objective.corruption.corruption
    if corruption.kind not in INFORMED_KINDS:
        return (
            f'it masks all of its region (corruption {corruption.kind!r}), so that a complement is '
            f'empty; use {" or ".join(INFORMED_KINDS)} where corruption.kind is read'
        )
    if corruption.informed:
        return (
            'corruption.informed chooses which positions are masked, and a complement would mask '
            'those that it avoids; turn one of them off'
        )
    if corruption.draws % 2:
        return (
            f'corruption.draws is {corruption.draws}, which makes no pairs; use '
            f'{corruption.draws + 1}'
        )
    return ''


# --- complementary masks --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ComplementaryPairs:
    """A `Corrupt` whose draws come in pairs; a pair masks each position of its region once.

    The region is all scored positions under uniform corruption, and the scored positions of the
    chosen block under block corruption. The first draw of a pair is a draw of the corruption. The
    second is its neighbour, and masks the rest of the region. Everything else is the same in both:
    the chosen block, masked tokens of the prompt and of earlier blocks, and all later blocks.

    A first draw that masks the whole region leaves nothing to the second, which estimators leave
    out. So the estimate of one pair has the expectation of independent draws; with several pairs
    the whole region counts a little less, because its pair has one draw only. Stratified times are
    spread over the first draws of the pairs.

    Attributes:
      corruption: of M draws, of which it makes M / 2.
    """

    corruption: Corruption

    def __call__(self, row: Rollout, moment: Moment) -> Draws:
        half = dataclasses.replace(self.corruption, draws=self.corruption.draws // 2)
        first = half(moment.row, row.prompt_mask, row.scored)
        region = jnp.broadcast_to(row.scored, (half.draws, row.scored.size))  # [M / 2, C]
        if half.kind == 'block':
            position = jnp.arange(row.scored.size)[None, :]
            if first.offset is not None:
                position = position + first.offset[:, None]  # [M / 2, C]
            region &= position // half.block_length == first.block[:, None]
        prompt = jnp.zeros((half.draws, row.prompt_mask.size), bool)
        rest = first.masked ^ jnp.concatenate([prompt, region], axis=1)  # [M / 2, L]
        return Draws(
            masked=jnp.stack([first.masked, rest], axis=1).reshape(2 * half.draws, -1),
            block=jnp.repeat(first.block, 2),
            offset=None if first.offset is None else jnp.repeat(first.offset, 2),
        )


# --- clipping -------------------------------------------------------------------------------------


def with_clip(objective: Objective, clip: str, clip_range: float) -> Objective:
    """The objective with clipped ratios.

    A method that clips ratios itself does it in this way from now on, in its own range. The loss of
    any other sees, in the place of a log-probability l at a position that it scores,

        l_old + clip(r, 1 - e, 1 + e) - 1,    r = exp(l - l_old)

    where l_old is that of the policy that sampled under the same draws. To first order in l - l_old
    this is l. A loss -A l becomes PPO's -A clip(r) up to a constant. With clip='ppo' a ratio is
    limited only from above where the loss would raise the log-probability, and only from below
    where it would lower it; a loss -A l then is -min(r A, clip(r) A).

    Args:
      objective: its readouts are log-probabilities.
      clip: 'ppo' or 'unconditional'.
      clip_range: e.
    """
    if objective.clips:
        if clip == PPO:  # which is what its functions do by themselves
            return objective

        def clipped_itself(readouts: Array, batch: Batch) -> Loss:
            return objective.loss(readouts, batch.replace(clip=clip))

        return dataclasses.replace(objective, loss=clipped_itself)

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C]."""
        old, target = batch.others[BEHAVIOUR], batch.target
        change = jnp.expm1(jnp.where(target, logp - old, 0.0))  # r - 1
        limited = jnp.clip(change, -clip_range, clip_range)
        if clip == PPO:
            # Of a push only the sign counts, which is that of d loss / d log-probability.
            push = jax.grad(lambda x: objective.loss(x, batch).total)(
                jax.lax.stop_gradient(jnp.where(target, old + change, logp))
            )
            raised = jnp.where(push < 0, jnp.minimum(change, clip_range), change)
            limited = jnp.where(push > 0, jnp.maximum(change, -clip_range), raised)
        result = objective.loss(jnp.where(target, old + limited, logp), batch)
        # Idle rows are not read out: their changes are NaN, which differs from everything.
        stopped = target & (limited != change) & ~jnp.isnan(change)
        stopped = stopped.sum().astype(jnp.float32)
        share = (stopped, target.sum().astype(jnp.float32))
        return result.replace(metrics=result.metrics | {'clip_share': share})

    return dataclasses.replace(objective, loss=loss, behaviour=True)


# --- divergence from the initial policy -----------------------------------------------------------


def with_kl(objective: Objective, weight: float, estimator: str, group_size: int) -> Objective:
    """The objective with a divergence from the initial policy in its loss.

        loss + weight * sum_u w_u mean_i k(log pi_ref - log pi)_i / sum_u w_u

    over the units u that the loss couples, a row or a group, with the weights w_u that they have in
    the loss, and the positions i that the draws of a unit score. So the divergence is a mean per
    token, in nats, and d1 without a divergence of its own gets the one that it publishes.

    Args:
      objective: its readouts are log-probabilities.
      weight: of the divergence.
      estimator: 'k2' or 'k3', see `ratios`.
      group_size: G.
    """
    divergence = ESTIMATORS[estimator]

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C]."""
        size = {'row': 1, 'group': group_size, 'batch': len(logp)}[objective.couples]
        weights = over_units(lambda logp, batch: objective.loss(logp, batch).weight, size)(
            jax.lax.stop_gradient(logp), batch
        )  # [units]
        target = batch.target
        per_token = divergence(jnp.where(target, batch.others[REFERENCE] - logp, 0.0))
        tokens = target.reshape(len(weights), -1).sum(-1)  # [units]
        mean = per_token.reshape(len(weights), -1).sum(-1) / jnp.maximum(tokens, 1)
        result = objective.loss(logp, batch)
        figure = (per_token.sum(), tokens.sum().astype(jnp.float32))
        return result.replace(
            total=result.total + weight * (weights * mean).sum(),
            metrics=result.metrics | {'kl_to_reference': figure},
        )

    return dataclasses.replace(
        objective,
        loss=loss,
        looks_at=tuple(dict.fromkeys((*objective.looks_at, REFERENCE))),
        kept={REFERENCE: never} | dict(objective.kept),
        idle=None,  # every row can move the divergence
    )

"""RSPO (arXiv 2605.10218, eq. 3.3): regression of a log-ratio on the advantage.

    s = mean_k mean_{i in S_k} l_{k,i},    d = s - s_ref,    d^ = d - sg(mean of d over the group)
    loss = -mean_j sg(A_j - lambda d^_j) d^_j

has the gradient of (lambda / 2) mean_j (d^_j - A_j / lambda)^2, so that it is stationary where d^_j
= A_j / lambda. A score is a mean per token, not nats of a sequence; the reference is the initial
policy under the same masks. There is no ratio to a behaviour policy and no clip.

The equation was read in a third party's notes; no code of the authors was found. These choices are
ours or the port's: d is centred within the group (the port: within the microbatch), and there are
four draws. The notes draw t uniformly from [0, 1], then mask each of the n tokens with probability
t, and draw both again if no token is masked. The number of masked tokens is then uniform over 1 to
n, and it is drawn here in this way. Tokens after the EOS are replaced by the EOS and never masked.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.advantages import standardised
from spg_jax.rl.objectives.objective import (
    Batch,
    Metrics,
    Moment,
    Objective,
    Protocol,
    never,
    over_groups,
    setting,
)
from spg_jax.rl.objectives.sequences import (
    after_clean_prompt,
    draw_scores,
    random_masks,
)
from spg_jax.rl.rollout import Rollout

RECIPE = {}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of RSPO."""

    strength: float = setting(0.01, 'lambda; the log-ratio is drawn to the advantage over lambda')
    draws: int = setting(4, 'masks of each sequence')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if lambda is not positive.
    """
    if not settings.strength > 0:
        raise ValueError(
            f'rspo.strength is {settings.strength}; the advantage is divided by it, use a number '
            'above 0'
        )

    def corruption(row: Rollout, moment: Moment) -> Draws:
        size_key, mask_key = jax.random.split(moment.row)
        length = row.scored.sum()
        counts = jax.random.randint(size_key, (settings.draws,), 1, length + 1)
        masked = random_masks(mask_key, row.scored, counts)
        # Only the EOS can be followed by a tail, so that the last scored token is the EOS there.
        clean_tail = jnp.where(row.scored, row.completion, row.completion[length - 1])
        tokens = jnp.tile(jnp.concatenate([row.prompt, clean_tail]), (settings.draws, 1))
        weight = 1.0 / (settings.draws * counts)
        return after_clean_prompt(row, masked, tokens=tokens, weight=weight)

    def loss_of_group(logp: Array, batch: Batch) -> tuple[Array, Metrics]:
        """logp: [G, M, C]."""
        change = draw_scores(logp - batch.others['reference'], batch).sum(-1)  # [G] d
        centred = change - jax.lax.stop_gradient(change.mean())  # [G] d^
        weight = jax.lax.stop_gradient(batch.advantage - settings.strength * centred)
        rows = jnp.float32(len(change))
        return -(weight * centred).mean(), {'log_ratio': (change.sum(), rows)}

    return Objective(
        corruption=corruption,
        draws=settings.draws,
        loss=over_groups(loss_of_group, protocol.batching.group_size),
        couples='group',
        advantage=standardised,
        looks_at=('reference',),
        kept={'reference': never},
        refuses={
            'rl.clip': 'it draws log-likelihood ratios to the advantages, and has no surrogate',
            'rl.advantage=raw': 'it draws log-ratios that are centred in their group to the '
            'advantages, whose sum over a group must be zero too',
        },
    )

"""BGPO: a linear lower bound of the ratio for better completions, an upper one for worse ones.

    d_k = (l^_k - l^_k,old) / C,   l^_k = (n / |S_k|) sum_{i in S_k} l_{k,i}
    loss = -sum_j n_j mean_k A_j r_jk / sum_j n_j,   r_jk = 1 + d_k if A_j > 0, else e^(d_k)

Each draw enters the loss by itself, which lets a program take one draw at a time. The port divides
d by C also where n is the length of the completion.

The port (yjyddq/DARE @ 83ae8a3; THU-KEG/BGPO was not read) clips: r is at most 1 + e for A > 0, and
between 1 - e and `cap` for A < 0. Its advantages are divided by their standard deviation (plus
1e-6, which is how its framework does it). For LLaDA it masks and scores all C tokens, after the EOS
too, so that n = C; `tokens='eos'` ends sequences at their EOS as for its other models. Tokens that
`sampling.stop_early` did not sample are scored as well.

The masks of a row are drawn once for all updates on a rollout, and their numbers of masked tokens
lie evenly spread over 1 to n, as in vrpo.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.errors import check_one_of
from spg_jax.rl.advantages import standardised
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Moment,
    Objective,
    Protocol,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.sequences import (
    after_clean_prompt,
    cut_at_eos,
    draw_scores,
    spread_masks,
)
from spg_jax.rl.rollout import Rollout

TOKENS = ('all', 'eos')
RECIPE = {
    'rl.group_size': 8,
    'optimizer.learning_rate': 5e-7,
    'optimizer.schedule': 'constant',
    'sampling.temperature': 0.6,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of BGPO."""

    epsilon: float = setting(0.2, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    cap: float = setting(3.0, 'the largest ratio for worse completions')
    draws: int = setting(16, 'masks of each sequence')
    tokens: str = setting('all', 'which tokens are scored: all, or those through the EOS: eos')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if a setting has no meaning.
    """
    check_one_of('bgpo.tokens', settings.tokens, TOKENS)
    if settings.cap < 1:
        raise ValueError(f'bgpo.cap is {settings.cap}; ratios lie around 1, use 1 or more')

    def scored(rollout: Rollout) -> Array:
        """[..., C] bool, the n tokens that are scored."""
        return rollout.scored | (settings.tokens == 'all')

    def corruption(row: Rollout, moment: Moment) -> Draws:
        eligible = scored(row)
        masked, counts = spread_masks(moment.row_at_rollout, eligible, settings.draws)
        valid = cut_at_eos(row.replace(scored=eligible), settings.draws)
        weight = eligible.sum() / counts
        return after_clean_prompt(row, masked, target=masked, valid=valid, weight=weight)

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C]."""
        change = draw_scores(logp - batch.others['behaviour'], batch) / logp.shape[-1]  # [b, M] d
        advantage = batch.advantage[:, None]
        better = advantage > 0
        ratio = jnp.where(better, 1.0 + change, jnp.exp(change))
        low, high = 1.0 - settings.epsilon, 1.0 + settings.epsilon
        limited = jnp.where(better, jnp.minimum(ratio, high), jnp.clip(ratio, low, settings.cap))
        length = scored(batch.rows).sum(-1).astype(jnp.float32)  # [b] n
        tokens = length.sum()
        stopped = ((ratio != limited) & (advantage != 0)).mean(-1)  # [b], the share of draws
        return Loss(
            total=-(length * (advantage * limited).mean(-1)).sum(),
            weight=tokens,
            metrics={'clip_share': ((length * stopped).sum(), tokens)},
        )

    return Objective(
        corruption=corruption,
        draws=settings.draws,
        loss=loss,
        advantage=partial(standardised, epsilon=1e-6),
        behaviour=True,
        refuses={'rl.clip': 'it clips its bounds of the ratio already, by bgpo.epsilon'},
        idle=without_advantage,
    )

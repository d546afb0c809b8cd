"""GDPO: the ELBO at fixed times, by a Gauss-Legendre rule over the rate of masking.

    s = sum_q (w_q / t_q) sum_{i in S_q} l_{q,i},    |S_q| = max(1, floor(t_q n))

with the nodes t_q and weights w_q of the rule on [0, 1], and one random mask S_q of the n tokens at
each node. Sequences end at their EOS. The ratio was read in two ways, `ratio`:

    'token':    loss = -mean_j min(r_j A_j, clip(r_j) A_j),        r_j = exp((s_j - s_j,old) / n_j)
    'sequence': loss = -mean_j min(r_j A_j, clip(r_j) A_j) / n_j,  r_j = exp(s_j - s_j,old)

The first is the loss of NVIDIA's port (NVIDIA-NeMo/RL @ d6d94dd, elbo.py; @ 7ea279a,
loss_functions.py), and the default; the second is how another port (BioM3) reads equation 6. The
second is clipped as soon as s moves by a few tenths of a nat. The authors' code was not read. The
clip range of 0.5 is a report; a divergence from the base policy has weight 0 and is left out.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.errors import check_one_of
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
    clipped_rows,
    cut_at_eos,
    draw_scores,
    random_masks,
)
from spg_jax.rl.rollout import Rollout

RATIOS = ('token', 'sequence')
RECIPE = {
    'rl.inner_updates': 12,
    'optimizer.learning_rate': 3e-7,
    'optimizer.schedule': 'constant',
    'sampling.temperature': 1.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of GDPO."""

    epsilon: float = setting(0.5, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    points: int = setting(3, 'nodes of the Gauss-Legendre rule, with one mask each')
    ratio: str = setting('token', 'ratio of the mean likelihood of a token, or of the sequence')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if a setting has no meaning.
    """
    check_one_of('gdpo.ratio', settings.ratio, RATIOS)
    if settings.points < 1:
        raise ValueError(f'gdpo.points is {settings.points}; the rule needs 1 node or more')
    nodes, weights = np.polynomial.legendre.leggauss(settings.points)  # on [-1, 1]
    times = np.float32((1 + nodes) / 2)
    weight = np.float32(weights / 2 / times)

    def corruption(row: Rollout, moment: Moment) -> Draws:
        counts = jnp.maximum(jnp.floor(times * row.scored.sum()), 1).astype(jnp.int32)
        masked = random_masks(moment.row, row.scored, counts)
        valid = cut_at_eos(row, settings.points)
        return after_clean_prompt(row, masked, valid=valid, weight=jnp.asarray(weight))

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C]."""
        change = draw_scores(logp - batch.others['behaviour'], batch).sum(-1)  # [b] nats
        length = batch.scored.sum(-1)  # [b] n
        by_token = settings.ratio == 'token'
        losses, metrics = clipped_rows(
            change / length if by_token else change, batch, settings.epsilon
        )
        total = losses.sum() if by_token else (losses / length).sum()
        return Loss(total=total, weight=jnp.float32(len(losses)), metrics=metrics)

    return Objective(
        corruption=corruption,
        draws=settings.points,
        loss=loss,
        behaviour=True,
        idle=without_advantage,
        clips=True,
    )

"""VRPO (the method of LLaDA 1.5): preference optimisation with ELBOs of little variance.

    s = mean_k (n / |S_k|) sum_{i in S_k} l_{k,i}
    loss = -mean over pairs of log sigmoid(beta [(s+ - s+_ref) - (s- - s-_ref)])

The policy and the reference, which is the initial policy, are read out under the same draws. One
row has M of them with one mask each, whose numbers of masked tokens lie evenly spread over 1 to n:
x_i = ((round(k + i n / M) - 1) mod n) + 1 with k uniform over 1 to n. Sequences end at their EOS.

The published method learns from preferences that are there before. Here the best and the worst
completion of a group are a pair, the first ones where several are equal; a group whose rewards are
all equal has none. The other completions of a group are read out in vain. The authors' code is
closed. beta, the learning rate and 8 draws are the paper's; `score='token'` divides s by C, as a
port does (yjyddq/DARE @ 83ae8a3, with 4 draws), which divides beta by C. The paper adds 0.05 times
the loss of supervised fine-tuning on the preferred completion, which is left out because its scale
is not known. Draws are fresh at each update.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.errors import check_one_of
from spg_jax.rl.advantages import groups_with_signal
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
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
    cut_at_eos,
    draw_scores,
    spread_masks,
)
from spg_jax.rl.rollout import Rollout

SCORES = ('sequence', 'token')
RECIPE = {'optimizer.learning_rate': 5e-7, 'optimizer.schedule': 'cosine'}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of VRPO."""

    beta: float = setting(0.2, 'the larger, the less the policy may depart from the base policy')
    draws: int = setting(8, 'masks of each sequence')
    score: str = setting('sequence', 'nats of the sequence, or divided by C: sequence or token')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if a score has another name.
    """
    check_one_of('vrpo.score', settings.score, SCORES)
    group_size = protocol.batching.group_size

    def corruption(row: Rollout, moment: Moment) -> Draws:
        masked, counts = spread_masks(moment.row, row.scored, settings.draws)
        weight = row.scored.sum() / (settings.draws * counts)
        valid = cut_at_eos(row, settings.draws)
        return after_clean_prompt(row, masked, valid=valid, weight=weight)

    def loss_of_group(logp: Array, batch: Batch) -> tuple[Array, Metrics]:
        """logp: [G, M, C]."""
        change = draw_scores(logp - batch.others['reference'], batch).sum(-1)  # [G] s - s_ref
        reward = batch.rows.reward
        margin = change[jnp.argmax(reward)] - change[jnp.argmin(reward)]
        if settings.score == 'token':
            margin /= logp.shape[-1]
        pair = (reward.max() > reward.min()).astype(jnp.float32)  # 0 without one
        metrics = {
            'margin': (pair * margin, pair),
            'in_order': (pair * (margin > 0), pair),
            'groups_with_pair': (pair, jnp.ones_like(pair)),
        }
        return -pair * jax.nn.log_sigmoid(settings.beta * margin), metrics

    def loss(logp: Array, batch: Batch) -> Loss:
        """The mean over pairs instead of groups."""
        of_groups = over_groups(loss_of_group, group_size)(logp, batch)
        return of_groups.replace(weight=of_groups.metrics['groups_with_pair'][0])

    def idle(batch: Batch) -> Array:
        """[B] bool, True for rows of groups without a pair."""
        return jnp.repeat(~groups_with_signal(batch.rows.reward, group_size), group_size)

    return Objective(
        corruption=corruption,
        draws=settings.draws,
        loss=loss,
        couples='group',
        looks_at=('reference',),
        kept={'reference': never},
        refuses={
            'rl.advantage': 'it compares the best and the worst of a group by their rewards',
            'rl.clip': 'its margin is made of whole log-likelihood ratios to the reference',
        },
        idle=idle,
    )

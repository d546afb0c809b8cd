"""d1, diffu-GRPO (arXiv 2504.12216; dllm-reasoning/d1 @ 837888f): one-step log-probabilities.

Every completion token is masked, after the EOS too, and each prompt token with probability 0.15,
afresh at every update. One forward pass gives l_i = log pi(x_i | corrupted prompt), and

    loss = sum_i ( -min(r_i A, clip(r_i, 1 - e, 1 + e) A) + b k3_i ) / sum_i 1,
    r_i = exp(l_i - l_i of the behaviour policy)

over the scored tokens i of a group; several groups are averaged. Both policies are read out under
the same prompt mask. (In the released code the two masks differ by a slip, and the refresh of the
reference does nothing with adapters, so that here it stays the base policy.)
"""

import dataclasses

from jax import Array

from spg_jax.diffusion.corruption import Corruption
from spg_jax.rl.objectives.objective import (
    Batch,
    Metrics,
    Objective,
    Protocol,
    configured,
    never,
    over_groups,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.ratios import token_losses

RECIPE = {
    'rl.group_size': 6,
    'rl.inner_updates': 12,
    'optimizer.learning_rate': 3e-6,
    'optimizer.schedule': 'constant',
    'sampling.temperature': 0.9,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of d1."""

    epsilon: float = setting(0.5, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    kl: float = setting(0.04, 'weight of the k3 estimate of the divergence from the base policy')
    prompt_rate: float = setting(0.15, 'probability that a token of the prompt is masked')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective."""

    def loss_of_group(logp: Array, batch: Batch) -> tuple[Array, Metrics]:
        """logp: [G, 1, C]."""
        losses, metrics = token_losses(logp, batch, settings.epsilon, settings.kl)
        return losses.sum() / batch.target.sum(), metrics

    one_step = Corruption('full', draws=1, block_length=1, prompt_rate=settings.prompt_rate)
    return Objective(
        corruption=configured(one_step),
        draws=1,
        loss=over_groups(loss_of_group, protocol.batching.group_size),
        couples='group',
        behaviour=True,
        clips=True,
        looks_at=('reference',) if settings.kl else (),
        kept={'reference': never} if settings.kl else {},
        idle=None if settings.kl else without_advantage,
    )

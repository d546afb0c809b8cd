"""TraceRL (Gen-Verse/dLLM-RL @ 10b4fd1, train/rl_llada.py): states of the rollout itself.

The steps of a rollout are merged in runs of `shrink`. A state is the completion as the sampler had
it before such a run, after a clean prompt: tokens committed in the run or later are masked. Scored
are the tokens committed in the run, through the first EOS. (The released code leaves out padding
with end-of-text tokens, which is what stands after the EOS.)

    loss = mean_states [ mean_i -min(r_i A, clip(r_i, 1 - e, 1 + e) A) + b sum_i k3_i ],
    r_i = exp(l_i - l_i of the behaviour policy)

with k3 the divergence from the behaviour policy, which is not divided by the number of tokens. A is
the z-score of the reward in its group, by the standard deviation of a population, and 0 where all
rewards are equal.

Prompts whose accuracy, the mean reward of the group, lies outside [0.2, 0.8] are dropped: their
states weigh nothing, so that the mean is taken over the states of the others, and without others
there is no gradient. Rewards then should lie in [0, 1], as the released ones do, which are right or
wrong. States without a scored token are not counted either.

Left out: the released code takes a completion for wrong that fills its length, which here is the
task's to say, and it takes one pass over the states in several updates, while here each update has
all states of the rollout.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.rl.advantages import groups_with_signal, standardised
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Moment,
    Objective,
    Protocol,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.ratios import state_losses
from spg_jax.rl.objectives.trajectory import replay
from spg_jax.rl.rollout import Rollout

RECIPE = {
    'rl.group_size': 8,
    'rl.prompts': 32,
    'optimizer.learning_rate': 1e-6,
    'optimizer.schedule': 'constant',
    'sampling.temperature': 0.8,
}
KEPT = 'kept'  # extras: [B] bool, whether the accuracy of the prompt lies in the range


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of TraceRL."""

    shrink: int = setting(8, 'steps of the rollout that are merged into one state')
    epsilon: float = setting(0.2, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    kl: float = setting(0.01, 'weight of the k3 divergence from the behaviour policy')
    lowest: float = setting(0.2, 'prompts of lower accuracy are dropped')
    highest: float = setting(0.8, 'prompts of higher accuracy are dropped')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if no step is merged, or no accuracy would be in the range.
    """
    if settings.shrink < 1:
        raise ValueError(f'tracerl.shrink is {settings.shrink}; use 1 or more steps')
    if settings.lowest > settings.highest:
        raise ValueError(
            f'tracerl.lowest {settings.lowest} exceeds tracerl.highest {settings.highest}, which '
            'would drop every prompt; use 0 and 1 to keep all'
        )
    group_size = protocol.batching.group_size
    states = -(-protocol.rollout_steps // settings.shrink)

    def corruption(row: Rollout, moment: Moment) -> Draws:
        starts = settings.shrink * jnp.arange(states)  # [M]
        masked, target = replay(row.commit_step, starts, starts + settings.shrink)
        prompt = jnp.zeros((states, len(row.prompt)), bool)
        return Draws(
            masked=jnp.concatenate([prompt, masked], axis=1),
            target=target & row.scored[None, :],
        )

    def advantage(reward: Array, group_size: int) -> Array:
        differs = jnp.repeat(groups_with_signal(reward, group_size), group_size)
        score = standardised(reward, group_size, unbiased=False, epsilon=0.0)
        return jnp.where(differs, score, 0.0)

    def at_rollout(read, rollout: Rollout, moments: Moment) -> dict[str, Array]:
        accuracy = rollout.reward.reshape(-1, group_size).mean(axis=1)  # [B / G]
        # The slack keeps an accuracy of 1 in 5 within the range, whatever its last bit.
        kept = (accuracy >= settings.lowest - 1e-6) & (accuracy <= settings.highest + 1e-6)
        return {KEPT: jnp.repeat(kept, group_size)}

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M, C]."""
        kept = batch.rows.extras[KEPT]  # [b]
        target = batch.target & kept[:, None, None]
        of_kept = batch.replace(draws=batch.draws.replace(target=target))
        loss = state_losses(logp, of_kept, settings.epsilon, settings.kl)
        share = (kept.sum().astype(jnp.float32), jnp.float32(len(kept)))
        return loss.replace(metrics=loss.metrics | {'kept_rows': share})

    def idle(batch: Batch) -> Array:
        """[B] bool. A row that is kept has a divergence, whatever its advantage."""
        dropped = ~batch.rows.extras[KEPT]
        return dropped if settings.kl else dropped | without_advantage(batch)

    return Objective(
        corruption=corruption,
        draws=states,
        loss=loss,
        advantage=advantage,
        behaviour=True,
        clips=True,
        at_rollout=at_rollout,
        idle=idle,
    )

"""UniGRPO of MMaDA, by the schedule of its paper; by the authors' later code for text as a setting.

`masking='schedule'` is the paper's algorithm, whose code was not released. One mask ratio for the
batch rises over the mu updates on a rollout, from a random one to 1:

    t_1 = floor(r T), r ~ U(0, 1);    t_n = floor((n - 1) / (mu - 1) (T - t_1)) + t_1

Each of the C completion tokens, after the EOS too, is masked with probability t_n / T; the prompt
is clean. With l_i = log pi(x_i | corrupted completion) at the masked tokens of the batch,

    loss = mean_i ( -min(r_i A, clip(r_i, 1 - e, 1 + e) A) + b k3_i ),
    r_i = exp(l_i - l_i of the behaviour policy)

and k3 the divergence from the initial policy. The last update masks everything; the example in the
text of the paper (100, 300, ..., 900 of T = 1000) does not. An update that masks nothing, as a
small t_1 may, learns nothing. Open in the paper: whether t_1 is drawn for each rollout (Algorithm
1, and here), prompt or response (eq. 5); what happens after the EOS (here as in the port,
facebookresearch/igpo @ e85eaea); e and b, which are those of the later code.

`masking='random'` and 'coupled' are Gen-Verse/dLLM-RL @ 10b4fd1, train/rl_llada.py: `masks` draws
of t ~ U(0.1, 0.9) a row, each token masked with probability t, and with 'coupled' the complement of
each draw as well. Tokens after the first EOS are masked in the input and not in the loss, which is
`ratios.state_losses`, with k3 to the behaviour policy. (That code takes one pass over the draws, in
several updates; here every update has fresh draws of all rows.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.errors import check_one_of
from spg_jax.rl.objectives.objective import (
    Batch,
    Loss,
    Moment,
    Objective,
    Protocol,
    never,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.ratios import state_losses, token_losses
from spg_jax.rl.rollout import Rollout

MASKINGS = ('schedule', 'random', 'coupled')
RECIPE = {'optimizer.learning_rate': 5e-5, 'optimizer.schedule': 'cosine'}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of UniGRPO."""

    masking: str = setting('schedule', 'the paper: schedule; the later code: random or coupled')
    epsilon: float = setting(0.2, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    kl: float = setting(0.01, 'weight of the k3 estimate of the divergence')
    times: int = setting(1000, 'T, the time at which everything is masked; of the schedule only')
    masks: int = setting(35, 'masks of a row, before complements; of random and coupled only')
    lowest: float = setting(0.1, 'the least mask ratio; of random and coupled only')
    highest: float = setting(0.9, 'the largest mask ratio; of random and coupled only')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: if the masking is not known, or a number has no meaning.
    """
    check_one_of('unigrpo.masking', settings.masking, MASKINGS)
    if not 0 <= settings.lowest <= settings.highest <= 1:
        raise ValueError(
            f'unigrpo.lowest {settings.lowest} and unigrpo.highest {settings.highest} are not '
            'shares in ascending order; use 0 <= lowest <= highest <= 1'
        )
    for name in ('times', 'masks'):
        if getattr(settings, name) < 1:
            raise ValueError(f'unigrpo.{name} is {getattr(settings, name)}; use 1 or more')
    if settings.masking == 'schedule':
        return _paper(settings, protocol.batching.inner_updates)
    return _later(settings, coupled=settings.masking == 'coupled')


def mask_time(first: Array, turn: Array, updates: int, times: int) -> Array:
    """t_n of the update n = turn + 1, [] int32.

    Args:
      first: [] int32, t_1.
      turn: [] int32, updates since the rollout arrived.
      updates: mu; with one update it is the one with t_1.
      times: T.
    """
    return turn * (times - first) // max(updates - 1, 1) + first


def _paper(settings: Settings, updates: int) -> Objective:
    def corruption(row: Rollout, moment: Moment) -> Draws:
        first = jax.random.randint(moment.shared_at_rollout, (), 0, settings.times)
        ratio = mask_time(first, moment.turn, updates, settings.times) / settings.times
        noise = jax.random.uniform(moment.row, (1, len(row.completion)))
        return _on_a_clean_prompt(row, noise < ratio, noise < ratio)

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, 1, C]."""
        losses, metrics = token_losses(logp, batch, settings.epsilon, settings.kl)
        return Loss(losses.sum(), batch.target.sum().astype(jnp.float32), metrics)

    return Objective(
        corruption=corruption,
        draws=1,
        loss=loss,
        behaviour=True,
        clips=True,
        looks_at=('reference',) if settings.kl else (),
        kept={'reference': never} if settings.kl else {},
        idle=None if settings.kl else without_advantage,
    )


def _later(settings: Settings, coupled: bool) -> Objective:
    def corruption(row: Rollout, moment: Moment) -> Draws:
        key_of_ratio, key = jax.random.split(moment.row)
        low, high = settings.lowest, settings.highest
        ratio = jax.random.uniform(key_of_ratio, (settings.masks, 1), minval=low, maxval=high)
        masked = jax.random.uniform(key, (settings.masks, len(row.completion))) < ratio
        if coupled:
            masked = jnp.concatenate([masked, ~masked])
        scored = row.scored[None, :]
        return _on_a_clean_prompt(row, masked | ~scored, masked & scored)

    return Objective(
        corruption=corruption,
        draws=settings.masks * (2 if coupled else 1),
        loss=lambda logp, batch: state_losses(logp, batch, settings.epsilon, settings.kl),
        behaviour=True,
        clips=True,
        idle=None if settings.kl else without_advantage,
    )


def _on_a_clean_prompt(row: Rollout, masked: Array, target: Array) -> Draws:
    """Draws that mask no token of the prompt; both arguments are [M, C] bool."""
    prompt = jnp.zeros((len(masked), len(row.prompt)), bool)
    return Draws(masked=jnp.concatenate([prompt, masked], axis=1), target=target)

"""AGRPO (probablyabot/agrpo @ 98f1182): policy gradient through sampled states of the rollout.

A state of a rollout is what the sampler saw at one of its steps. K steps of each completion are
drawn; the tokens committed at step s are read out of the state before it, by l_i = log-softmax of
logits / T over the ids that top-k and top-p left to the sampler there. With the advantage A of the
completion and the log-probability that the sampler recorded,

    loss = -1 / (K G) sum_k w_k sum_{i committed at s_k} min(r_i A, clip(r_i, 1 - e, 1 + e) A),
    r_i = exp(l_i - l_i recorded),    w_k = 1 / ((last + 1) p(s_k))

over a group; several groups are averaged. It is a sum over tokens, and not their mean. `last` is
the last step that committed a token other than EOS; no later step is drawn. p is proportional to
the entropy of the step, which is the sum over its tokens, or uniform. A step is p's inverse
distribution function at u = (pi + U) / (B K), with a random permutation pi of the B K draws, so
that the draws are stratified over the batch, though not within a row. Repeats are kept.

The ids, log-probabilities and entropies are those that the sampler recorded, as in the released
code. The sampler's law is exact only for some rules of commitment (`SamplingConfig.exact_law`); the
published rule is 'random', and the released code takes others too, as this does. Left out are the
released option of a divergence, which is off, and a double weight of the last draw, a slip. After
an early stop the tail is masked in every state, as it was for the sampler. Where the only EOS is
the last token, that token counts as any other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.corruption import Draws
from spg_jax.diffusion.token_law import kept_log_probs
from spg_jax.errors import check_one_of
from spg_jax.rl.objectives.objective import (
    Batch,
    LogProbs,
    Loss,
    Moment,
    Objective,
    Protocol,
    View,
    setting,
    without_advantage,
)
from spg_jax.rl.objectives.ratios import token_losses
from spg_jax.rl.rollout import Rollout

IMPORTANCE = ('entropy', 'uniform')
RECIPE = {
    'rl.group_size': 8,
    'rl.inner_updates': 1,
    'optimizer.learning_rate': 5e-6,
    'optimizer.schedule': 'cosine',
    'optimizer.final_share': 0.0,
    'optimizer.warmup_fraction': 0.01,
    'sampling.temperature': 0.6,
    'sampling.commit': 'random',
    'sampling.top_k': 150,
    'sampling.top_p': 0.99,
    'lora.rank': 64,
    'lora.alpha': 64.0,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of AGRPO."""

    states: int = setting(24, 'K, how many states of each completion are drawn in an update')
    epsilon: float = setting(0.2, 'ratios are clipped to 1 - epsilon and 1 + epsilon')
    importance: str = setting('entropy', 'what makes a step likely to be drawn: entropy or uniform')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: a setting has no meaning, or rollouts are sampled without noise.
    """
    check_one_of('agrpo.importance', settings.importance, IMPORTANCE)
    if settings.states < 1:
        raise ValueError(f'agrpo.states is {settings.states}; a completion needs at least 1')
    temperature, rows = protocol.sampling.temperature, protocol.batching.rows
    if temperature <= 0.0:
        raise ValueError(
            f'sampling.temperature is {temperature}, at which no token has a probability that '
            "rl.objective 'agrpo' could change; use one above 0"
        )

    if protocol.sampling.guidance or protocol.sampling.rule.takes_back:
        raise ValueError(
            f'sampling.guidance is {protocol.sampling.guidance} and '
            f'sampling.{protocol.sampling.rule_setting} {protocol.sampling.rule_name!r}; '
            "rl.objective 'agrpo' divides by the probabilities that the sampler recorded, which "
            'the policy has to give in the same states: use guidance 0 and a sampler that takes no '
            'token back'
        )

    def corruption(row: Rollout, moment: Moment) -> Draws:
        law = step_law(row, protocol.rollout_steps, settings.importance)  # [steps]
        order = jax.random.permutation(moment.shared, rows * settings.states)
        own = jax.lax.dynamic_slice_in_dim(order, moment.rank * settings.states, settings.states)
        noise = jax.random.uniform(moment.row, own.shape)
        return states_at(row, law, (own + noise) / len(order))

    def loss(logp: Array, batch: Batch) -> Loss:
        recorded = jnp.broadcast_to(batch.rows.extras['log_prob'][:, None], logp.shape)
        batch = batch.replace(others=batch.others | {'behaviour': recorded})
        losses, metrics = token_losses(logp, batch, settings.epsilon, kl=0.0)
        total = (batch.draws.weight[:, :, None] * losses).sum()
        return Loss(total=total, weight=jnp.float32(logp.shape[0] * logp.shape[1]), metrics=metrics)

    return Objective(
        corruption=corruption,
        draws=settings.states,
        loss=loss,
        readout=RecordedLaw(temperature),
        records=('log_prob', 'entropy', 'kept'),
        clips=True,
        idle=without_advantage,
    )


@dataclasses.dataclass(frozen=True)
class RecordedLaw(LogProbs):
    """The readout: log-probabilities [M, C] of tokens under the law that the sampler drew from."""

    temperature: float

    def __call__(self, logits: Array, view: View) -> Array:
        kept = view.row.extras['kept']
        return kept_log_probs(logits, kept, view.row.completion, self.temperature)


def last_step(row: Rollout) -> Array:
    """The last step that committed a token other than EOS, [] int32; 0 if there is none."""
    length = row.scored.sum()
    # The end-of-sequence token itself is not known here, but a completion that ends shows it.
    is_eos = (length < row.scored.size) & (row.completion == row.completion[length - 1])
    return jnp.maximum(jnp.where(is_eos, -1, row.commit_step).max(), 0)


def step_law(row: Rollout, steps: int, importance: str) -> Array:
    """The probability with which each step is drawn, [steps], 0 after `last_step`."""
    weight = jnp.ones(steps)
    if importance == 'entropy':
        # Tokens that were not committed, after an early stop, go to a step that is cut off.
        step = jnp.where(row.commit_step < 0, steps, row.commit_step)
        # The addend, as released, lets every step be drawn.
        weight = jax.ops.segment_sum(row.extras['entropy'], step, steps + 1)[:steps] + 1e-8
    weight = jnp.where(jnp.arange(steps) <= last_step(row), weight, 0.0)
    return weight / weight.sum()


def states_at(row: Rollout, law: Array, u: Array) -> Draws:
    """The states before the steps at u, with the tokens committed then as targets.

    Args:
      row: one row.
      law: [steps], of `step_law`.
      u: [K] in [0, 1].
    """
    last = last_step(row)
    step = (jnp.cumsum(law)[None, :] < u[:, None]).sum(-1)  # [K]
    step = jnp.minimum(step, last)  # Rounding must not lead past the last step.
    commit_step = row.commit_step[None, :]  # [1, C]
    masked = (commit_step >= step[:, None]) | (commit_step < 0)
    prompt = jnp.zeros((len(step), row.prompt.size), bool)
    return Draws(
        masked=jnp.concatenate([prompt, masked], axis=1),
        target=commit_step == step[:, None],
        weight=1.0 / ((last + 1) * law[step]),
    )

"""How far what a sampler recorded is from what scoring gives: the metric `sampling_gap`.

A sampler records the log-probability of each token in the law that it was drawn from. Scoring
computes it again, with the whole model, in the state that the token was committed in: earlier
tokens are there, and all others are masked. The two differ where the sampler is approximate, guided
or takes tokens back, and by rounding elsewhere.

Letters of axes: `B` rows, `C` positions of a completion, `V` vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion import token_law
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.models.policy import Policy, Variables
from spg_jax.random import Purpose, Seeded, example_keys
from spg_jax.rl.batching import Batching
from spg_jax.rl.packing import split_parts
from spg_jax.rl.rollout import Rollout
from spg_jax.training.train_state import Metrics

GAP = 'sampling_gap'


def make_gap(
    policy: Policy, decoding: SamplingConfig, batching: Batching, seed: int
) -> Callable[[Variables, Rollout, int], Metrics] | None:
    """A compiled (variables, rollout, step) -> metrics; None where there is nothing to compare.

    The metric is the mean of |recorded - scored| in nats, over the tokens of one step of each row.
    The step is that of a random scored token, so that one pass over the rollout is enough. Without
    noise every token has the log-probability 0, and nothing is compared. Nor is it where tokens are
    edited, as states are not replayed here.

    Args:
      policy: the model.
      decoding: how the rollout was sampled, and what was recorded.
      batching: its microbatch is the number of rows that are read at once.
      seed: the root of the run's random numbers.
    """
    if 'log_prob' not in decoding.records or decoding.temperature == 0.0 or decoding.edits:
        return None

    def gap(seed: Array, variables: Variables, rollout: Rollout, step: Array) -> Metrics:
        keys = example_keys(seed, Purpose.GAP, step, rollout.example_id)
        parts = len(rollout.reward) // batching.microbatch

        def of_part(part: tuple[Rollout, Array]) -> tuple[Array, Array]:
            rows, keys = part
            noisy, is_new = jax.vmap(_state, (0, 0, None))(rows, keys, policy.mask_id)
            logits = policy.completion_logits(variables, rows.prompt, rows.prompt_mask, noisy)
            scored = log_probs(logits, rows.completion, jnp.asarray(policy.allowed), decoding)
            distance = jnp.abs(scored - rows.extras['log_prob'])  # [b, C]
            return jnp.where(is_new, distance, 0.0).sum(), is_new.sum().astype(jnp.float32)

        pieces = jax.tree.map(lambda x: split_parts(x, parts), (rollout, keys))
        total, count = jax.lax.map(of_part, pieces)
        return {GAP: (total.sum(), count.sum())}

    return Seeded(gap, seed)


def log_probs(logits: Array, token: Array, allowed: Array, decoding: SamplingConfig) -> Array:
    """The log-probability [B, C] of tokens in the law that `decoding` draws from.

    Args:
      logits: [B, C, V] of the model.
      token: [B, C] int32. A token that top-k or top-p leaves out here is kept, so that the result
        is finite.
      allowed: [V] bool, ids that may be chosen.
      decoding: its temperature, top-k and top-p.
    """
    drawable = jnp.where(allowed[None, None, :], logits, -jnp.inf)
    if decoding.top_k or decoding.top_p < 1.0:
        kept = token_law.kept_ids(drawable, decoding.temperature, decoding.top_k, decoding.top_p)
        kept |= jnp.arange(logits.shape[-1])[None, None, :] == token[..., None]
        drawable = jnp.where(kept, drawable, -jnp.inf)
    return token_law.record(('log_prob',), drawable, token, decoding.temperature)['log_prob']


def _state(row: Rollout, key: Array, mask_id: int) -> tuple[Array, Array]:
    """A state of a row, [C] tokens before a step, and the positions [C] that the step committed."""
    place = jax.random.randint(key, (), 0, row.scored.sum())  # Scored tokens come first.
    step = row.commit_step[place]
    is_there = (row.commit_step >= 0) & (row.commit_step < step)
    return jnp.where(is_there, row.completion, mask_id), row.commit_step == step

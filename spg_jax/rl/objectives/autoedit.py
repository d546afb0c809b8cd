"""AutoEdit: a policy that drafts and rewrites, rewarded for the answer after its last edit.

The sampler 'autoedit' finishes a draft x and writes it anew in K rounds (`samplers.editing`). The
law of the two is p(x) prod_k prod_{i in E_k} p(y_ki | x_k), where x_k is the completion before
round k and y_ki the token that round k wrote at position i. The likelihood of the draft is bounded
as in SPG (`spg`); those of edits are exact, as their positions follow from the state. With A the
reward of the edited answer minus the mean of its group,

    loss = -sum_j A_j (L_j + c sum_k sum_{i in E_jk} l_jki) / sum_j n_j

L_j is SPG's bound of the draft, n_j its length through its first EOS, l the log-probability of an
edit in the law that it is drawn from: softmax(logits / T) over the ids that are drawn, after top-k
and top-p. c is 1, or 0 with `credit='draft'`, which leaves the edits without credit (an ablation).

ReflectDrive-2 (arXiv 2605.04647; no code is published) sums the policy gradient over the tokens of
both phases with one advantage, as here; it gives each token of the draft the probability of its
step (as `d2` does), where this has SPG's bounds. The advantage is not divided by a deviation there
either. There is no ratio and no clipping, as in SPG; `rl.clip` adds one.

The draft of 'llada21' has no law of its own, since tokens are edited before others are there, so
that sampler is refused.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion import token_law
from spg_jax.diffusion.bounds import completion_log_probs
from spg_jax.diffusion.corruption import Draws
from spg_jax.diffusion.samplers.editing import DRAFT, EDITS, replay_edits
from spg_jax.diffusion.sampling import SamplingConfig
from spg_jax.errors import check_one_of
from spg_jax.rl.objectives import spg
from spg_jax.rl.objectives.objective import (
    Batch,
    LogProbs,
    Loss,
    Moment,
    Objective,
    Protocol,
    View,
    setting,
)
from spg_jax.rl.rollout import DRAFT_SCORED, Rollout

CREDITS = ('both', 'draft')
RECIPE = {'sampling.sampler': 'autoedit', 'sampling.edit_rounds': 3}


@dataclasses.dataclass(frozen=True)
class Settings(spg.Settings):
    """SPG's numbers for the draft, and who gets credit for the edited answer."""

    credit: str = setting('both', 'what the reward of the answer teaches: both or draft')


def build(settings: Settings, protocol: Protocol) -> Objective:
    """Makes the objective.

    Raises:
      ValueError: a setting has no meaning, or rollouts have no edits with a law.
    """
    check_one_of('autoedit.credit', settings.credit, CREDITS)
    sampling = protocol.sampling
    if not (sampling.edits and sampling.rule.edits_after):
        raise ValueError(
            f"rl.objective 'autoedit' learns from edits of finished drafts, which "
            f'sampling.{sampling.rule_setting} {sampling.rule_name!r} does not make; use '
            'sampling.sampler autoedit'
        )
    if sampling.temperature <= 0.0 or sampling.guidance:
        raise ValueError(
            f'sampling.temperature is {sampling.temperature} and sampling.guidance '
            f"{sampling.guidance}; rl.objective 'autoedit' needs edits that the policy draws by "
            'itself: use a temperature above 0 and guidance 0'
        )
    try:
        of_draft = spg.build(settings, protocol)
    except ValueError as error:
        raise ValueError(str(error).replace('spg.', 'autoedit.')) from None
    masked = of_draft.draws  # M: the draws of the draft come first
    rounds = sampling.edit_rounds if settings.credit == 'both' else 0

    def corruption(row: Rollout, moment: Moment) -> Draws:
        row = with_draft(row)
        draws = of_draft.corruption(row, moment)
        return with_edits(row, draws) if rounds else on_draft(row, draws)

    def loss(logp: Array, batch: Batch) -> Loss:
        """logp: [b, M + K, C]."""
        draft = batch.replace(
            rows=with_draft(batch.rows),
            draws=jax.tree.map(lambda x: x[:, :masked], batch.draws),
            others={name: x[:, :masked] for name, x in batch.others.items()},
        )
        result = of_draft.loss(logp[:, :masked], draft)
        if not rounds:
            return result
        written = batch.draws.target[:, masked:]  # [b, K, C]
        per_row = jnp.where(written, logp[:, masked:], 0.0).sum((1, 2))  # [b]
        count = written.sum().astype(jnp.float32)
        return result.replace(
            total=result.total - (batch.advantage * per_row).sum(),
            metrics=result.metrics | {'edit_log_prob': (per_row.sum(), count)},
        )

    return dataclasses.replace(
        of_draft,
        corruption=corruption,
        draws=masked + rounds,
        loss=loss,
        readout=DraftAndEdits(sampling),
        edits=True,
    )


def with_draft(rows: Rollout) -> Rollout:
    """Rows whose completion is the draft."""
    return rows.replace(completion=rows.extras[DRAFT], scored=rows.extras[DRAFT_SCORED])


def on_draft(row: Rollout, draws: Draws) -> Draws:
    """The draws of ONE row, whose completion is the draft, with that said."""
    count, prompt = len(draws.masked), len(row.prompt)
    sequence = jnp.concatenate([row.prompt, row.completion])
    return draws.replace(
        tokens=jnp.broadcast_to(sequence, (count, sequence.size)),
        label=jnp.broadcast_to(row.completion, (count, row.completion.size)),
        target=draws.masked[:, prompt:] & row.scored[None, :],
    )


def with_edits(row: Rollout, draws: Draws) -> Draws:
    """The draws of ONE draft, and after them the states before each round of its edits."""
    draws = on_draft(row, draws)
    states = replay_edits(row.completion, row.extras[EDITS])
    rounds = len(states.tokens)
    prompt = jnp.broadcast_to(row.prompt, (rounds, row.prompt.size))
    edits = Draws(
        masked=jnp.zeros((rounds, draws.masked.shape[1]), bool),
        tokens=jnp.concatenate([prompt, states.tokens], axis=1),
        label=states.written,
        target=states.target,
    )

    def joined(name: str) -> Array | None:
        """A field of the draws, and of the states, where those of one row agree about it."""
        first, then = getattr(draws, name), getattr(edits, name)
        if first is None:
            return None
        if then is None:
            then = jnp.broadcast_to(first[:1], (rounds, *first.shape[1:]))
        return jnp.concatenate([first, then])

    return Draws(**{field.name: joined(field.name) for field in dataclasses.fields(Draws)})


@dataclasses.dataclass(frozen=True)
class DraftAndEdits(LogProbs):
    """The readout [M, C]: log-probabilities of masked tokens, or of edits where nothing is masked.

    Tokens of a draft are read among all ids at temperature 1, as all bounds are, and edits in the
    law that they were drawn from.
    """

    sampling: SamplingConfig

    def __call__(self, logits: Array, view: View) -> Array:
        length = view.row.completion.size
        is_edit = ~view.draws.masked[:, -length:].any(-1)  # [M]
        logits = logits.astype(jnp.float32)
        of_edits = drawn_log_probs(logits, view.draws.label, view.allowed, self.sampling)
        return jnp.where(is_edit[:, None], of_edits, completion_log_probs(logits, view.draws.label))


def drawn_log_probs(
    logits: Array, token: Array, allowed: Array | None, sampling: SamplingConfig
) -> Array:
    """Log-probabilities of tokens in the law that a sampler draws from, in nats, [M, C].

    Args:
      logits: [M, C, V] float32.
      token: [M, C] int32. A token that top-k or top-p leaves out by now is kept, so that the result
        is finite.
      allowed: [V] bool, ids that are drawn; None takes all.
      sampling: its temperature, top-k and top-p.
    """
    drawable = logits
    if allowed is not None:
        drawable = jnp.where(allowed[None, None, :], logits, -jnp.inf)
    if sampling.top_k or sampling.top_p < 1.0:
        kept = token_law.kept_ids(drawable, sampling.temperature, sampling.top_k, sampling.top_p)
        kept |= jnp.arange(logits.shape[-1])[None, None, :] == token[..., None]
        drawable = jnp.where(kept, drawable, -jnp.inf)
    # The floor is finite, so that gradients are finite.
    floor = jnp.finfo(jnp.float32).min
    scaled = jnp.where(jnp.isneginf(drawable), floor, drawable / sampling.temperature)
    chosen = jnp.take_along_axis(scaled, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)

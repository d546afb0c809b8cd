"""The rules by which a denoising step commits tokens, each a function of one row.

A rule gives each position of the block a score, and the step commits the masked positions of
highest score: as many as the schedule asks for (`View.count`), and all that the rule is sure
of. So every rule ends within `sampling.steps`, and a rule that is sure of more ends sooner.

Shapes: `b` positions of the current block, `V` vocabulary; `[]` is a scalar.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from spg_jax.diffusion.token_law import likeliest


@struct.dataclass
class View:
    """What a rule sees of one row at one step."""

    logits: Array  # [b, V] float32 of the model, all ids
    choosable: Array  # [b, V] float32, the same with -inf for ids that are never chosen
    token: Array  # [b] int32, the tokens drawn at this step
    masked: Array  # [b] bool, False where a token is committed already
    count: Array  # [] int32, how many tokens this step commits so that all steps share the work
    # [] int32, how many tokens the schedule has for this step of a block, whatever was committed
    scheduled: Array
    key: Array  # [] a key of this row and step, for rules that draw random numbers

    @property
    def log_z(self) -> Array:
        """The log-normaliser [b] of the distribution over all ids at temperature 1."""
        return jax.nn.logsumexp(self.logits, axis=-1)

    @property
    def log_confidence(self) -> Array:
        """The log-probability [b] of each token drawn, over all ids at temperature 1 and no noise.

        It says what the model believes and not how the token was drawn.
        """
        chosen = jnp.take_along_axis(self.logits, self.token[:, None], axis=-1)[:, 0]  # [b]
        return chosen - self.log_z

    @property
    def largest(self) -> Array:
        """The largest probability [b] of an id that may be chosen, whichever token was drawn."""
        return jnp.exp(self.choosable.max(-1) - self.log_z)

    @property
    def negative_entropy(self) -> Array:
        """Minus the entropy [b] of the distribution over all ids at temperature 1, in nats."""
        log_prob = self.logits - self.log_z[:, None]  # [b, V]
        prob = jnp.exp(log_prob)  # [b, V]
        return jnp.where(prob > 0.0, prob * log_prob, 0.0).sum(-1)


# (View, SamplingConfig) -> score [b], or (score [b], sure [b] bool).
Rule = Callable[[View, Any], Array | tuple[Array, Array]]
# (View, tokens [b] that stand there, SamplingConfig) -> [b] bool, the positions to write anew.
EditRule = Callable[[View, Array, Any], Array]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A rule of commitment, and what is true of it.

    Attributes:
      rule: (View, SamplingConfig) -> score [b], by which positions are committed, highest first; or
        a pair of it and sure [b] bool, the positions that are committed whatever the schedule says.
      looks_at_tokens: whether the choice of positions depends on the tokens drawn there. If not,
        the product of the recorded probabilities is the law of the completion.
      even: whether the rule is never sure, so that each step commits what the schedule says.
      takes_back: whether sure tokens stay and others may be masked again (`least_sure`).
      edit: which positions that hold a token are written anew, with a token drawn there; None edits
        nothing. The rule must not look at the tokens drawn, so that the law of an edit is exact.
      edits_after: whether edits begin when the completion is there, in `edit_rounds` rounds over
        all of it, or go along with the commitments in a block. Then `rule` is that of `commit`.
    """

    rule: Rule
    looks_at_tokens: bool = True
    even: bool = False
    takes_back: bool = False
    edit: EditRule | None = None
    edits_after: bool = False


def low_confidence(view: View, config: Any) -> Array:
    """The tokens drawn that are most probable. The published name is that of what stays masked.

    The log-probability orders tokens as the probability does, without ties near 0 and 1.
    """
    return view.log_confidence


def random(view: View, config: Any) -> Array:
    """Random positions."""
    return jax.random.uniform(view.key, view.token.shape)


def entropy(view: View, config: Any) -> Array:
    """The positions whose distribution has the lowest entropy."""
    return view.negative_entropy


def margin(view: View, config: Any) -> Array:
    """The positions whose two likeliest allowed tokens differ most in probability."""
    best_id = likeliest(view.choosable)[:, None]  # [b, 1]
    ids = jnp.arange(view.logits.shape[-1])[None, :]  # [1, V]
    second = jnp.where(ids == best_id, -jnp.inf, view.choosable).max(-1)  # [b]
    return jnp.exp(view.choosable.max(-1) - view.log_z) - jnp.exp(second - view.log_z)


def left_to_right(view: View, config: Any) -> Array:
    """The first positions."""
    return -jnp.arange(len(view.token), dtype=view.logits.dtype)


def threshold(view: View, config: Any) -> tuple[Array, Array]:
    """Every position whose largest probability exceeds `threshold` (Fast-dLLM, arXiv 2505.22618).

    The released code compares the probability of the token drawn, which is the same at temperature
    0. Here the largest probability counts at any temperature, so that the choice of positions does
    not depend on the draw.
    """
    return view.largest, view.largest > config.threshold


def llada2(view: View, config: Any) -> tuple[Array, Array]:
    """The tokens drawn that are more probable than `threshold`, and at least as many of the most
    probable ones as the schedule has for the step (LLaDA2, arXiv 2512.15745)."""
    score = view.log_confidence
    return score, (score > math.log(config.threshold)) | (rank(score, view.masked) < view.scheduled)


def factor(view: View, config: Any) -> tuple[Array, Array]:
    """The n surest positions, for the largest n with (n + 1)(1 - c_n) < `factor`.

    c_n is the n-th highest of the largest probabilities (Fast-dLLM, arXiv 2505.22618, section 3.3).
    The left side grows with n, so that each position can be asked by its own rank.
    """
    number = rank(view.largest, view.masked) + 1  # [b] n
    return view.largest, (number + 1) * (1.0 - view.largest) < config.factor


def entropy_bounded(view: View, config: Any) -> tuple[Array, Array]:
    """The positions of lowest entropy, while their entropies without the largest sum to at most
    `entropy_bound` (EB-sampler, arXiv 2505.24857).

    The sum bounds how far tokens that are drawn apart can be from their joint distribution, in
    nats.
    """
    score = view.negative_entropy
    place = rank(score, view.masked)  # [b]
    is_before = (place[None, :] < place[:, None]) & view.masked[None, :]  # [position i, position j]
    return score, jnp.where(is_before, -score[None, :], 0.0).sum(-1) <= config.entropy_bound


def rank(score: Array, masked: Array) -> Array:
    """The rank [b] int32 of each masked position by its score, 0 for the highest.

    Of equal scores, the earlier position comes first. Other positions rank behind all masked ones.

    Args:
      score: [b] float32.
      masked: [b] bool.
    """
    lowest = jnp.finfo(score.dtype).min
    # A masked position with score NaN or -inf must still rank before those that are not masked;
    # otherwise it might never be committed.
    score = jnp.where(masked, jnp.nan_to_num(score, nan=lowest, neginf=lowest), -jnp.inf)
    # Comparing all pairs of positions costs less than sorting, and decides every tie.
    position = jnp.arange(len(score))
    j_is_earlier = position[None, :] < position[:, None]  # [position i, position j]
    score_i, score_j = score[:, None], score[None, :]
    return ((score_j > score_i) | ((score_j == score_i) & j_is_earlier)).sum(-1)


def commitment(sampler: Sampler, view: View, config: Any) -> Array:
    """The positions [b] bool of one row that a step commits."""
    choice = sampler.rule(view, config)
    score, sure = choice if isinstance(choice, tuple) else (choice, jnp.zeros_like(view.masked))
    return view.masked & ((rank(score, view.masked) < view.count) | sure)


def least_sure(confidence: Array, committed: Array, left: Array, config: Any) -> Array:
    """The position [b] bool that a step masks again: the least sure of those committed before.

    At most one position is True, and none if all are sure, which is a probability above
    `threshold`, or if the budget of the block is spent. The last step of a block takes nothing
    back, and the schedule commits what was taken back in the steps that are left. So a block ends
    with its last step, whatever is taken back.

    Args:
      confidence: [b] float32, of each token when it was committed.
      committed: [b] bool, positions committed before this step.
      left: [] int32, how many tokens of the block may still be taken back; 0 in the last step.
      config: its `threshold` is the confidence from which a token stays.
    """
    doubtful = committed & (confidence <= config.threshold)
    return doubtful & (rank(-confidence, doubtful) == 0) & (left > 0)


def surer_token(view: View, tokens: Array, config: Any) -> Array:
    """Where another token is the likeliest, and more probable than `edit_threshold` (LLaDA2.1)."""
    return (likeliest(view.choosable) != tokens) & (view.largest > config.edit_threshold)


def doubtful_token(view: View, tokens: Array, config: Any) -> Array:
    """Where the token has a probability below `keep_threshold`, or another is `surer_token`.

    Without noise a doubtful token that is still the likeliest stays, as writing it changes nothing.
    """
    present = jnp.take_along_axis(view.logits, tokens[:, None], axis=-1)[:, 0] - view.log_z
    doubtful = jnp.exp(present) < config.keep_threshold
    if config.temperature == 0.0:
        doubtful &= likeliest(view.choosable) != tokens
    return doubtful | surer_token(view, tokens, config)


REGISTRY: dict[str, Sampler] = {
    'low_confidence': Sampler(low_confidence, even=True),
    'random': Sampler(random, looks_at_tokens=False, even=True),
    'entropy': Sampler(entropy, looks_at_tokens=False, even=True),
    'margin': Sampler(margin, looks_at_tokens=False, even=True),
    'left_to_right': Sampler(left_to_right, looks_at_tokens=False, even=True),
    'threshold': Sampler(threshold, looks_at_tokens=False),
    'llada2': Sampler(llada2),
    'factor': Sampler(factor, looks_at_tokens=False),
    'entropy_bounded': Sampler(entropy_bounded, looks_at_tokens=False),
    'remask': Sampler(low_confidence, takes_back=True),
    'llada21': Sampler(threshold, looks_at_tokens=False, edit=surer_token),
    'autoedit': Sampler(low_confidence, edit=doubtful_token, edits_after=True),
}

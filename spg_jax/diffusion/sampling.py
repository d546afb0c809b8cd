"""Sampling: denoise a fully masked completion, block after block, committing a few tokens a step.

Nothing here depends on a model class. Callers pass two functions, one from tokens to hidden states
and one from hidden states to logits, so that only positions of the current block are unembedded.

A comment such as `# [B, b, V]` after an assignment is the shape of the value: `B` sequences, `L`
tokens of prompt (`P`) and completion (`C`), `b` positions of a block, `V` vocabulary, `D` width;
`[]` is a scalar.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from spg_jax.diffusion import informed, token_law
from spg_jax.errors import check_one_of

COMMITS = ('low_confidence', 'random', 'entropy', 'margin', 'left_to_right')
SCHEDULES = ('even', 'timesteps')
RECORDS = ('log_prob', 'entropy', 'kept', 'influence')


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are decoded (LLaDA, arXiv 2502.09992, algorithms 4 and 5).

    Attributes:
      length: C, the number of completion positions.
      steps: denoising steps over the whole completion, spread evenly over its blocks.
      block_length: b, the positions in a block; a block is finished before the next one starts.
        `block_length == length` decodes the whole completion at once.
      temperature: of the Gumbel-max choice of tokens; 0 takes the most likely token.
      commit: which predicted tokens a step keeps. 'low_confidence' keeps the most probable ones;
        its published name says that tokens of low confidence are masked again. 'random' keeps
        random ones, 'entropy' those whose distribution has the lowest entropy, 'margin' those
        whose two likeliest allowed tokens differ most in probability, and 'left_to_right' the
        first ones.
      guidance: s of classifier-free guidance, logits_u + (1 + s)(logits_c - logits_u); 0 is off.
      stop_early: whether a completion ends with the block that holds its first EOS.
      top_k: tokens are drawn among that many likeliest ids only; 0 is off.
      top_p: tokens are drawn among the fewest likeliest ids that have this probability; 1 is off.
      threshold: with 'low_confidence', a step keeps every token of a higher probability if there
        are at least as many as it would keep otherwise, and a block ends when all of its tokens are
        kept (LLaDA2, arXiv 2512.15745); 0 is off.
      schedule: how many tokens each step of a block keeps. 'even' spreads them evenly; 'timesteps'
        keeps the share of the masked tokens that a linear noise schedule removes (Dream, arXiv
        2508.15487).
      records: what is recorded of each token when it is committed, names of RECORDS: 'log_prob',
        'entropy' and 'kept' of the law that it was drawn from (`token_law.record`), and its
        'influence' on masked positions (`informed`). An objective asks for them, not a user.
      influence_window: how far from a token its influence is measured.

    Raises:
      ValueError: for settings that cannot be decoded with; the message names the fix.
    """

    length: int
    steps: int
    block_length: int
    temperature: float
    commit: str = 'low_confidence'
    guidance: float = 0.0
    stop_early: bool = True
    top_k: int = 0
    top_p: float = 1.0
    threshold: float = 0.0
    schedule: str = 'even'
    records: tuple[str, ...] = ()
    influence_window: int = informed.WINDOW

    def __post_init__(self) -> None:
        for name in ('length', 'steps', 'block_length'):
            if getattr(self, name) < 1:
                raise ValueError(f'sampling.{name} is {getattr(self, name)}; use at least 1')
        if self.length % self.block_length:
            nearest = -(-self.length // self.block_length) * self.block_length
            raise ValueError(
                f'sampling.length {self.length} is not a multiple of sampling.block_length '
                f'{self.block_length}; use length {nearest} or a block_length that divides '
                f'{self.length}'
            )
        if self.steps % self.blocks:
            nearest = -(-self.steps // self.blocks) * self.blocks
            raise ValueError(
                f'sampling.steps {self.steps} do not spread evenly over {self.blocks} blocks; '
                f'use steps {nearest}'
            )
        if self.steps > self.length:
            raise ValueError(
                f'sampling.steps {self.steps} exceeds sampling.length {self.length}, so some steps '
                f'would commit nothing; use at most {self.length} steps'
            )
        if not 0.0 <= self.temperature < float('inf'):
            raise ValueError(f'sampling.temperature is {self.temperature}; use 0 or more')
        if self.top_k < 0:
            raise ValueError(f'sampling.top_k is {self.top_k}; use 1 or more, or 0 for all ids')
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f'sampling.top_p is {self.top_p}; use a share above 0 and at most 1')
        check_one_of('sampling.commit', self.commit, COMMITS)
        check_one_of('sampling.schedule', self.schedule, SCHEDULES)
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(
                f'sampling.threshold is {self.threshold}; use a probability within [0, 1], 0 is off'
            )
        if self.threshold and self.commit != 'low_confidence':
            raise ValueError(
                f'sampling.threshold is {self.threshold} with sampling.commit {self.commit!r}, '
                'which looks at no probability; use commit low_confidence, or threshold 0'
            )
        for name in self.records:
            check_one_of('a record of the sampler', name, RECORDS)

    @property
    def blocks(self) -> int:
        return self.length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.blocks

    @property
    def positions_read(self) -> int:
        """How many positions a step unembeds: those of a block, and all that it may influence."""
        if 'influence' not in self.records:
            return self.block_length
        return min(self.block_length + self.influence_window, self.length)

    @property
    def exact_law(self) -> bool:
        """Whether the product of the recorded probabilities is the law of the completion.

        It is where positions are chosen without a look at the tokens drawn there: the law of the
        tokens, given the positions, is then the product. (Random positions are drawn apart.)

        'low_confidence' ranks positions by the probability of the token that was *drawn*. Take two
        positions with probabilities (.7, .3) and (.6, .4), and one commit. The first position is
        committed exactly when it drew its likelier token. Given that it was chosen, its token is
        certain, while .7 is recorded. The second is committed with its likelier token with
        probability .3 x .6, while .6 is recorded: the .3 depends on the policy too, and is recorded
        nowhere. Without noise, or where a step commits all that is left, nothing is chosen.
        """
        chooses = self.temperature > 0.0 and self.steps_per_block > 1
        return self.commit != 'low_confidence' or not chooses


@struct.dataclass
class Completion:
    """Completions of a batch of prompts."""

    tokens: Array  # [B, C] int32, EOS in the blocks after an early stop
    commit_step: Array  # [B, C] int32, step that committed each token, -1 after an early stop
    # `SamplingConfig.records` by name, [B, C], but 'kept' [B, C, V / 8]; 0 after an early stop
    extras: dict[str, Array] = struct.field(default_factory=dict)


def record_shapes(
    config: SamplingConfig, rows: int, vocab_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """`Completion.extras` of `rows` completions, B, over V = `vocab_size` ids."""
    shape = (rows, config.length)
    number = jax.ShapeDtypeStruct(shape, jnp.float32)
    bits = jax.ShapeDtypeStruct((*shape, -(-vocab_size // 8)), jnp.uint8)
    return {name: bits if name == 'kept' else number for name in config.records}


@struct.dataclass
class _Carry:
    """What one denoising step hands to the next."""

    step: Array  # [] int32, the next denoising step, counted over the whole completion
    tokens: Array  # [B, L] int32, prompt and completion, MASK where not yet committed
    commit_step: Array  # [B, C] int32
    extras: dict[str, Array]  # as in `Completion`
    # [B, C] float32, top-1 probabilities of the step before, where they were read; or None
    confidence: Array | None


def generate(
    hidden_fn: Callable[[Array, Array], Array],
    unembed_fn: Callable[[Array], Array],
    prompt: Array,
    prompt_mask: Array,
    keys: Array,
    config: SamplingConfig,
    mask_id: int,
    eos_id: int,
    allowed: Array,
    opening: Array | None = None,
) -> Completion:
    """Completes a batch of prompts. The function is pure, and callers jit it.

    The tokens of a row depend on its prompt and key alone: its noise is a function of (row key,
    step, position). With `stop_early` the loop ends once every row has an EOS in a finished block.

    Args:
      hidden_fn: (tokens [B, L] int32, valid [B, L] bool) -> hidden states [B, L, D].
      unembed_fn: hidden states [B, b, D] -> logits [B, b, V] float32.
      prompt: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool, False on padding.
      keys: [B] typed PRNG keys, one for each row.
      config: how to decode.
      mask_id: the MASK token, never chosen, but part of the softmax that gives confidence.
      eos_id: the end-of-sequence token.
      allowed: [V] bool, True for ids that may be chosen.
      opening: [B, C] int32, the completion as it begins: MASK where tokens are generated, and given
        tokens, which stay and count as part of the prompt. None generates all.

    Raises:
      ValueError: if the shapes do not agree or MASK and EOS are the same token.
    """
    if prompt.shape != prompt_mask.shape or keys.shape != prompt.shape[:1]:
        raise ValueError(
            f'prompt {prompt.shape}, prompt_mask {prompt_mask.shape} and keys {keys.shape} do not '
            'agree; expected [B, P], [B, P] and [B]'
        )
    if mask_id == eos_id:
        raise ValueError(f'mask_id and eos_id are both {mask_id}; they must be different tokens')
    shape = (len(prompt), config.length)
    decoder = _Decoder(
        hidden_fn=hidden_fn,
        unembed_fn=unembed_fn,
        valid=jnp.concatenate([prompt_mask, jnp.ones(shape, bool)], axis=1),
        keys=keys,
        config=config,
        prompt_length=prompt.shape[1],
        mask_id=mask_id,
        eos_id=eos_id,
        allowed=allowed & (jnp.arange(allowed.size) != mask_id),
        generated=None if opening is None else opening == mask_id,
    )
    if opening is None:
        opening = jnp.full(shape, mask_id, jnp.int32)
    initial = _Carry(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.concatenate([prompt.astype(jnp.int32), opening], axis=1),
        commit_step=jnp.full(shape, -1, jnp.int32),
        extras={
            name: jnp.zeros(record.shape, record.dtype)
            for name, record in record_shapes(config, len(prompt), allowed.size).items()
        },
        confidence=jnp.zeros(shape) if 'influence' in config.records else None,
    )
    final = jax.lax.while_loop(decoder.unfinished, decoder.denoise, initial)
    completion = Completion(final.tokens[:, prompt.shape[1] :], final.commit_step, final.extras)
    if not config.stop_early:
        return completion
    return _end_at_eos(completion, decoder.is_eos(completion.tokens), eos_id, config)


@dataclasses.dataclass(frozen=True, eq=False)
class _Decoder:
    """The loop of `generate`: its methods are the step, its fields do not change between steps."""

    hidden_fn: Callable[[Array, Array], Array]
    unembed_fn: Callable[[Array], Array]
    valid: Array  # [B, L] bool
    keys: Array  # [B]
    config: SamplingConfig
    prompt_length: int
    mask_id: int
    eos_id: int
    allowed: Array  # [V] bool, without MASK
    generated: Array | None  # [B, C] bool, False on given tokens of the completion; None is all

    def is_eos(self, completion: Array) -> Array:
        """Where a completion has an EOS that was generated: [B, C] -> [B, C] bool."""
        is_eos = completion == self.eos_id
        return is_eos if self.generated is None else is_eos & self.generated

    def unfinished(self, carry: _Carry) -> Array:
        """Whether a step is left and, with `stop_early`, some row has not ended; [] bool."""
        step_left = carry.step < self.config.steps
        if not self.config.stop_early:
            return step_left
        between_blocks = carry.step % self.config.steps_per_block == 0
        all_ended = self.is_eos(carry.tokens[:, self.prompt_length :]).any(-1).all()
        return step_left & ~(between_blocks & all_ended)

    def denoise(self, carry: _Carry) -> _Carry:
        """Predicts the masked positions of the current block and commits some of them."""
        config = self.config
        start = carry.step // config.steps_per_block * config.block_length  # []
        tokens = _block(carry.tokens, self.prompt_length + start, config.block_length)  # [B, b]
        carry, logits = self.look_around(carry, start)  # logits [B, b, V]
        prediction, score, records = _predict(logits, self.keys, carry.step, self.allowed, config)
        is_masked = tokens == self.mask_id  # [B, b]
        quota = _commits(config)[carry.step % config.steps_per_block]  # []
        commit = _most_confident(score, is_masked, quota)  # [B, b]
        if config.threshold:
            is_sure = is_masked & (score > math.log(config.threshold))  # [B, b]
            commit = jnp.where(is_sure.sum(-1, keepdims=True) >= quota, is_sure, commit)
        tokens = jnp.where(commit, prediction, tokens)
        commit_step = _block(carry.commit_step, start, config.block_length)  # [B, b]
        commit_step = jnp.where(commit, carry.step, commit_step)
        put = jax.lax.dynamic_update_slice_in_dim
        extras = dict(carry.extras)
        for name, value in records.items():
            before = _block(extras[name], start, config.block_length)  # [B, b, ...]
            is_new = commit.reshape(commit.shape + (1,) * (value.ndim - 2))
            extras[name] = put(extras[name], jnp.where(is_new, value, before), start, axis=1)
        step = carry.step + 1
        if config.threshold:
            # The other steps of a block have nothing to do once all rows have finished it.
            next_block = (carry.step // config.steps_per_block + 1) * config.steps_per_block
            step = jnp.where((tokens == self.mask_id).any(), step, next_block)
        return carry.replace(
            step=step,
            tokens=put(carry.tokens, tokens, self.prompt_length + start, axis=1),
            commit_step=put(carry.commit_step, commit_step, start, axis=1),
            extras=extras,
        )

    def look_around(self, carry: _Carry, start: Array) -> tuple[_Carry, Array]:
        """The logits [B, b, V] of the block at `start`, after noting what changed around it.

        To measure influence, the pass also reads the positions of the next blocks that are near
        enough to be influenced, and gives the tokens of the step before their influence.
        """
        size, window = self.config.block_length, self.config.positions_read  # b, W
        if carry.confidence is None:
            return carry, self.logits(carry.tokens, start, size)
        first = jnp.minimum(start, self.config.length - window)  # []
        logits = self.logits(carry.tokens, first, window)  # [B, W, V]
        best = jnp.where(self.allowed[None, None, :], logits, -jnp.inf).max(-1)  # [B, W]
        confidence = jax.lax.dynamic_update_slice_in_dim(
            carry.confidence, jnp.exp(best - jax.nn.logsumexp(logits, axis=-1)), first, axis=1
        )
        change = informed.change_around(
            carry.confidence,
            confidence,
            carry.tokens[:, self.prompt_length :] == self.mask_id,
            self.config.influence_window,
        )
        is_latest = (carry.commit_step == carry.step - 1) & (carry.commit_step >= 0)
        influence = jnp.where(is_latest, change, carry.extras['influence'])
        extras = carry.extras | {'influence': influence}
        return carry.replace(extras=extras, confidence=confidence), _block(
            logits, start - first, size
        )

    def logits(self, tokens: Array, start: Array, size: int) -> Array:
        """The logits, with guidance, of `size` completion positions from `start`, [B, size, V]."""
        conditional = self._unguided(tokens, start, size)
        if self.config.guidance == 0.0:
            return conditional
        promptless = tokens.at[:, : self.prompt_length].set(self.mask_id)
        if self.generated is not None:
            completion = promptless[:, self.prompt_length :]
            completion = jnp.where(self.generated, completion, self.mask_id)
            promptless = promptless.at[:, self.prompt_length :].set(completion)
        unconditional = self._unguided(promptless, start, size)
        return unconditional + (1.0 + self.config.guidance) * (conditional - unconditional)

    def _unguided(self, tokens: Array, start: Array, size: int) -> Array:
        """The logits [B, size, V] of the model itself."""
        hidden = self.hidden_fn(tokens, self.valid)  # [B, L, D]
        return self.unembed_fn(_block(hidden, self.prompt_length + start, size))


def _block(x: Array, start: Array, size: int) -> Array:
    """`size` positions of x from `start`: [B, L, ...] -> [B, size, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _commits(config: SamplingConfig) -> Array:
    """How many tokens each step of a block commits, [steps_per_block].

    Where the block does not divide evenly, the first steps of an even schedule commit one token
    more.
    """
    if config.schedule == 'timesteps':
        return jnp.asarray(timestep_commits(config.block_length, config.steps_per_block))
    share, remainder = divmod(config.block_length, config.steps_per_block)
    return share + (jnp.arange(config.steps_per_block) < remainder)


def timestep_commits(masked: int, steps: int) -> np.ndarray:
    """How many of the masked tokens each step commits in Dream's schedule, [steps] int32.

    A step from time t to s commits the share 1 - s/t of the tokens that are masked, rounded down,
    and the last step all. The published times end at 1e-3, in float32, which rounds down once more:
    12 tokens in 6 steps give 1, 2, 2, 2, 2, 3.
    """
    times = np.linspace(1, 1e-3, steps + 1, dtype=np.float32)
    commits = []
    for step in range(steps):
        share = np.float32(1) - times[step + 1] / times[step]
        commits.append(masked if step == steps - 1 else int(np.float32(masked) * share))
        masked -= commits[-1]
    return np.array(commits, np.int32)


def _predict(
    logits: Array, keys: Array, step: Array, allowed: Array, config: SamplingConfig
) -> tuple[Array, Array, dict[str, Array]]:
    """Predicts a token for each position of the block, with a score for committing it.

    Args:
      logits: [B, b, V] float32.
      keys: [B] keys of the rows.
      step: [] int32.
      allowed: [V] bool.

    Returns:
      token [B, b] int32 and score [B, b] float32, of which a step commits those of highest score,
      and what is recorded of the law that the tokens were drawn from, by name.
    """

    def draw(sampler: Callable, purpose: int, shape: tuple[int, ...]) -> Array:
        """Noise [B, *shape], which depends on the key of the row, the step and the purpose."""
        return jax.vmap(lambda key: sampler(jax.random.fold_in(key, 2 * step + purpose), shape))(
            keys
        )

    # Where the model gives -inf to all allowed ids, the finite floor keeps them ahead of the ids
    # that are not allowed.
    floored = jnp.maximum(logits, jnp.finfo(logits.dtype).min)  # [B, b, V]
    choosable = jnp.where(allowed[None, None, :], floored, -jnp.inf)  # [B, b, V]
    noisy = drawable = choosable
    if config.temperature > 0.0:
        if config.top_k or config.top_p < 1.0:
            kept = token_law.kept_ids(choosable, config.temperature, config.top_k, config.top_p)
            drawable = jnp.where(kept, choosable, -jnp.inf)
        noisy = drawable + config.temperature * draw(jax.random.gumbel, 0, logits.shape[1:])
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)  # [B, b]
    records = token_law.record(config.records, drawable, token, config.temperature)
    return token, _score(logits, choosable, token, draw, config), records


def _score(
    logits: Array, choosable: Array, token: Array, draw: Callable, config: SamplingConfig
) -> Array:
    """The score [B, b] by which tokens are committed; the arguments are those of `_predict`."""
    if config.commit == 'random':
        return draw(jax.random.uniform, 1, logits.shape[1:2])
    if config.commit == 'left_to_right':
        positions = jnp.arange(logits.shape[1], dtype=logits.dtype)
        return jnp.broadcast_to(-positions, logits.shape[:2])
    # Scores come from the distribution over all ids at temperature 1 without noise: they express
    # what the model believes and not how the token was sampled.
    log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, b]
    if config.commit == 'entropy':
        log_prob = logits - log_z[..., None]  # [B, b, V]
        prob = jnp.exp(log_prob)  # [B, b, V]
        return jnp.where(prob > 0.0, prob * log_prob, 0.0).sum(-1)
    if config.commit == 'margin':
        best_id = jnp.argmax(choosable, axis=-1)[..., None]  # [B, b, 1]
        ids = jnp.arange(logits.shape[-1])[None, None, :]  # [1, 1, V]
        best = choosable.max(-1)  # [B, b]
        second = jnp.where(ids == best_id, -jnp.inf, choosable).max(-1)  # [B, b]
        return jnp.exp(best - log_z) - jnp.exp(second - log_z)
    # The log-probability orders tokens as the probability does, without ties near 0 and 1.
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]  # [B, b]
    return chosen - log_z


def _most_confident(score: Array, eligible: Array, count: Array) -> Array:
    """The `count` eligible positions of highest score; of equal scores, the earlier position.

    Args:
      score: [B, b] float32.
      eligible: [B, b] bool.
      count: [] int32.

    Returns:
      [B, b] bool.
    """
    lowest = jnp.finfo(score.dtype).min
    # An eligible position with score NaN or -inf must still rank before those not eligible;
    # otherwise it might never be committed.
    score = jnp.where(eligible, jnp.nan_to_num(score, nan=lowest, neginf=lowest), -jnp.inf)
    # Comparing all pairs of positions costs less than sorting, and decides every tie. The axes of
    # a comparison are [B, position i, position j].
    position = jnp.arange(score.shape[-1])  # [b]
    j_is_earlier = position[None, None, :] < position[None, :, None]  # [1, b, b]
    score_j, score_i = score[:, None, :], score[:, :, None]  # [B, 1, b], [B, b, 1]
    rank = ((score_j > score_i) | ((score_j == score_i) & j_is_earlier)).sum(-1)  # [B, b]
    return eligible & (rank < count)


def _end_at_eos(
    completion: Completion, is_eos: Array, eos_id: int, config: SamplingConfig
) -> Completion:
    """Writes EOS, commit_step -1 and extras 0 into the blocks after that of a row's first EOS.

    These include the blocks that the loop did not reach: it stops early only when every row has an
    EOS. The step that ends a row is its last one, after which no influence is measured, whether
    other rows go on or not. `is_eos` is [B, C] bool.
    """
    first = jnp.where(is_eos.any(-1), jnp.argmax(is_eos, axis=-1), config.length)  # [B]
    block_of_position = jnp.arange(config.length) // config.block_length  # [C]
    after = block_of_position[None, :] > (first // config.block_length)[:, None]  # [B, C]
    extras = {
        name: jnp.where(after.reshape(after.shape + (1,) * (x.ndim - 2)), jnp.zeros_like(x), x)
        for name, x in completion.extras.items()
    }
    if 'influence' in extras:
        last_step = (first // config.block_length + 1) * config.steps_per_block - 1  # [B]
        ends = completion.commit_step == last_step[:, None]  # [B, C]
        extras['influence'] = jnp.where(ends, 0.0, extras['influence'])
    return Completion(
        tokens=jnp.where(after, eos_id, completion.tokens),
        commit_step=jnp.where(after, -1, completion.commit_step),
        extras=extras,
    )

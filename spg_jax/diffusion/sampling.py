"""Sampling: denoise a fully masked completion, block after block, committing a few tokens a step.

Independent of any model class: it needs a function from tokens to hidden states and one from hidden
states to logits, so that only the positions of the current block are ever unembedded.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

COMMITS = ('low_confidence', 'random', 'entropy', 'margin')


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are decoded (LLaDA, arXiv 2502.09992, algorithms 4 and 5).

    Attributes:
      length: C, the completion positions.
      steps: denoising steps over the whole completion, spread evenly over its blocks.
      block_length: positions a block; a block is finished before the next one starts.
        `block_length == length` decodes the whole completion at once.
      temperature: of the Gumbel-max choice of tokens; 0 takes the most likely.
      commit: which predicted tokens a step keeps: 'low_confidence' the most probable (the published
        name: those of low confidence are masked again), 'random', 'entropy' those whose
        distribution has the lowest entropy, 'margin' those whose two likeliest allowed tokens
        differ most in probability.
      guidance: s of classifier-free guidance, logits_u + (1 + s)(logits_c - logits_u); 0 is off.
      stop_early: a completion ends with the block that holds its first EOS.

    Raises:
      ValueError: on a combination that cannot be decoded, with the fix.
    """

    length: int
    steps: int
    block_length: int
    temperature: float
    commit: str = 'low_confidence'
    guidance: float = 0.0
    stop_early: bool = True

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
        if self.commit not in COMMITS:
            raise ValueError(f'sampling.commit is {self.commit!r}; use one of {", ".join(COMMITS)}')

    @property
    def blocks(self) -> int:
        return self.length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.steps // self.blocks


@struct.dataclass
class Completion:
    """Completions of a batch of prompts."""

    tokens: Array  # [B, C] int32, EOS in the blocks after an early stop
    commit_step: Array  # [B, C] int32, step at which each token was fixed, -1 after a stop


@struct.dataclass
class _Carry:
    step: Array  # [] int32, the next denoising step, counted over the whole completion
    tokens: Array  # [B, L] int32, prompt and completion, MASK where not yet committed
    commit_step: Array  # [B, C] int32


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
) -> Completion:
    """Completes a batch of prompts. Pure, to be jitted by the caller: one program, one loop.

    A row's tokens depend on its own prompt and key alone, not on the batch it is in: its noise is a
    function of (row key, step, position). The program stops once every row has an EOS in a block
    that is complete.

    Args:
      hidden_fn: (tokens [B, L] int32, valid [B, L] bool) -> [B, L, D].
      unembed_fn: [B, block_length, D] -> logits [B, block_length, V] float32.
      prompt: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool, False on padding.
      keys: [B] typed PRNG keys, one a row.
      config: how to decode.
      mask_id: the MASK token; never chosen, but part of the softmax that gives confidence.
      eos_id: the end-of-sequence token.
      allowed: [V] bool, ids that may be chosen.

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
    )
    begin = _Carry(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.concatenate(
            [prompt.astype(jnp.int32), jnp.full(shape, mask_id, jnp.int32)], axis=1
        ),
        commit_step=jnp.full(shape, -1, jnp.int32),
    )
    end = jax.lax.while_loop(decoder.unfinished, decoder.denoise, begin)
    completion = Completion(end.tokens[:, prompt.shape[1] :], end.commit_step)
    return _end_at_eos(completion, eos_id, config) if config.stop_early else completion


@dataclasses.dataclass(frozen=True, eq=False)
class _Decoder:
    """The loop of `generate`: what does not change from step to step, and the step."""

    hidden_fn: Callable[[Array, Array], Array]
    unembed_fn: Callable[[Array], Array]
    valid: Array  # [B, L] bool
    keys: Array  # [B]
    config: SamplingConfig
    prompt_length: int
    mask_id: int
    eos_id: int
    allowed: Array  # [V] bool, without MASK

    def unfinished(self, carry: _Carry) -> Array:
        """Whether there is a step left, and a row that has not ended."""
        more = carry.step < self.config.steps
        if not self.config.stop_early:
            return more
        between_blocks = carry.step % self.config.steps_per_block == 0
        ended = (carry.tokens[:, self.prompt_length :] == self.eos_id).any(-1).all()
        return more & ~(between_blocks & ended)

    def denoise(self, carry: _Carry) -> _Carry:
        """Predicts the masked positions of the current block and commits some of them."""
        config = self.config
        start = carry.step // config.steps_per_block * config.block_length
        current = _block(carry.tokens, self.prompt_length + start, config.block_length)
        logits = self.logits(carry.tokens, start)
        token, score = _predict(logits, self.keys, carry.step, self.allowed, config)
        commit = _most_confident(
            score, current == self.mask_id, _commits(config)[carry.step % config.steps_per_block]
        )
        tokens = jnp.where(commit, token, current)
        commit_step = _block(carry.commit_step, start, config.block_length)
        commit_step = jnp.where(commit, carry.step, commit_step)
        put = jax.lax.dynamic_update_slice_in_dim
        return _Carry(
            step=carry.step + 1,
            tokens=put(carry.tokens, tokens, self.prompt_length + start, axis=1),
            commit_step=put(carry.commit_step, commit_step, start, axis=1),
        )

    def logits(self, tokens: Array, start: Array) -> Array:
        """Logits [B, b, V] of the block that begins at completion position `start`."""
        conditional = self._unguided(tokens, start)
        if self.config.guidance == 0.0:
            return conditional
        promptless = tokens.at[:, : self.prompt_length].set(self.mask_id)
        unconditional = self._unguided(promptless, start)
        return unconditional + (1.0 + self.config.guidance) * (conditional - unconditional)

    def _unguided(self, tokens: Array, start: Array) -> Array:
        hidden = self.hidden_fn(tokens, self.valid)
        return self.unembed_fn(_block(hidden, self.prompt_length + start, self.config.block_length))


def _block(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _commits(config: SamplingConfig) -> Array:
    """Tokens to commit at each step of a block, [steps_per_block]; the remainder comes first."""
    even, remainder = divmod(config.block_length, config.steps_per_block)
    return even + (jnp.arange(config.steps_per_block) < remainder)


def _predict(
    logits: Array, keys: Array, step: Array, allowed: Array, config: SamplingConfig
) -> tuple[Array, Array]:
    """A token for every position of the block and how strongly it asks to be committed.

    Args:
      logits: [B, b, V] float32.
      keys: [B] keys of the rows.
      step: [] int32.
      allowed: [V] bool.

    Returns:
      token [B, b] int32 and score [B, b] float32, higher committed first.
    """

    def draw(sampler: Callable, purpose: int, shape: tuple[int, ...]) -> Array:
        return jax.vmap(lambda key: sampler(jax.random.fold_in(key, 2 * step + purpose), shape))(
            keys
        )

    # The floor keeps an allowed id ahead of the others even where the model rules out all of them.
    floor = jnp.maximum(logits, jnp.finfo(logits.dtype).min)
    choosable = jnp.where(allowed[None, None, :], floor, -jnp.inf)
    noisy = choosable
    if config.temperature > 0.0:
        noisy = choosable + config.temperature * draw(jax.random.gumbel, 0, logits.shape[1:])
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    if config.commit == 'random':
        return token, draw(jax.random.uniform, 1, logits.shape[1:2])
    # Untempered and noise-free, over all ids: what the model believes, not how it was sampled.
    log_z = jax.nn.logsumexp(logits, axis=-1)
    if config.commit == 'entropy':
        log_prob = logits - log_z[..., None]
        prob = jnp.exp(log_prob)
        return token, jnp.where(prob > 0.0, prob * log_prob, 0.0).sum(-1)
    if config.commit == 'margin':
        best = jnp.argmax(choosable, axis=-1)[..., None]
        ids = jnp.arange(logits.shape[-1])[None, None, :]
        first = choosable.max(-1)
        second = jnp.where(ids == best, -jnp.inf, choosable).max(-1)
        return token, jnp.exp(first - log_z) - jnp.exp(second - log_z)
    # The logarithm of the probability orders as the probability does, without ties near 0 and 1.
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - log_z


def _most_confident(score: Array, eligible: Array, count: Array) -> Array:
    """The `count` eligible positions of highest score, the earlier on a tie; [B, b] bool."""
    lowest = jnp.finfo(score.dtype).min
    # A score of NaN or -inf must not keep an eligible position from ever being committed.
    score = jnp.where(eligible, jnp.nan_to_num(score, nan=lowest, neginf=lowest), -jnp.inf)
    # Comparing all pairs of a block costs less than sorting it, and leaves no tie undecided.
    position = jnp.arange(score.shape[-1])
    earlier = position[None, None, :] < position[None, :, None]
    other, own = score[:, None, :], score[:, :, None]
    rank = ((other > own) | ((other == own) & earlier)).sum(-1)
    return eligible & (rank < count)


def _end_at_eos(completion: Completion, eos_id: int, config: SamplingConfig) -> Completion:
    """EOS and commit_step -1 in every block after the one that holds a row's first EOS."""
    is_eos = completion.tokens == eos_id
    first = jnp.where(is_eos.any(-1), jnp.argmax(is_eos, axis=-1), config.length)
    position_block = jnp.arange(config.length) // config.block_length
    after = position_block[None, :] > (first // config.block_length)[:, None]
    # Also covers blocks the loop never reached: it stops only when every row has its EOS.
    return Completion(
        tokens=jnp.where(after, eos_id, completion.tokens),
        commit_step=jnp.where(after, -1, completion.commit_step),
    )

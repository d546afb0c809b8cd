"""Sampling: denoise a fully masked completion, block after block, committing a few tokens a step.

Nothing here depends on a model class. Callers pass two functions, one from tokens to hidden states
of the current block and one from hidden states to logits.

A comment such as `# [B, b, V]` after an assignment is the shape of the value: `B` sequences, `L`
tokens of prompt (`P`) and completion (`C`), `b` positions of a block, `V` vocabulary, `D` width;
`[]` is a scalar.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from spg_jax.diffusion.samplers import editing
from spg_jax.diffusion.samplers.decoder import (
    CachedModel,
    Carry,
    Decoder,
    Steps,
    compacted_sizes,
    is_generated_eos,
)
from spg_jax.diffusion.samplers.settings import RECORDS, SamplingConfig
from spg_jax.models.windows import Window

__all__ = [
    'RECORDS',
    'CachedModel',
    'Carry',
    'Completion',
    'SamplingConfig',
    'Steps',
    'begin',
    'compacted_sizes',
    'completion_of',
    'decoder_of',
    'finish',
    'generate',
    'record_shapes',
]


@struct.dataclass
class Completion:
    """Completions of a batch of prompts."""

    tokens: Array  # [B, C] int32, EOS in the blocks after an early stop
    commit_step: Array  # [B, C] int32, step that committed each token, -1 after an early stop
    # `SamplingConfig.records` by name, [B, C], but 'kept' [B, C, V / 8]; 0 after an early stop.
    # A sampler that edits adds those of `samplers.editing`.
    extras: dict[str, Array] = struct.field(default_factory=dict)


def record_shapes(
    config: SamplingConfig, rows: int, vocab_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """`Completion.extras` of `rows` completions, B, over V = `vocab_size` ids."""
    shape = (rows, config.length)
    number = jax.ShapeDtypeStruct(shape, jnp.float32)
    bits = jax.ShapeDtypeStruct((*shape, -(-vocab_size // 8)), jnp.uint8)
    records = {name: bits if name == 'kept' else number for name in config.records}
    return records | editing.record_shapes(config, rows)


def generate(
    hidden_fn: Callable[[Array, Array, Window], Array],
    unembed_fn: Callable[[Array], Array],
    prompt: Array,
    prompt_mask: Array,
    keys: Array,
    config: SamplingConfig,
    mask_id: int,
    eos_id: int,
    allowed: Array,
    cached: CachedModel | None = None,
    opening: Array | None = None,
) -> Completion:
    """Completes a batch of prompts. The function is pure, and callers jit it.

    The tokens of a row depend on its prompt and key alone: its noise is a function of (row key,
    step, position). With `stop_early` the loop ends once every row has an EOS in a finished block.

    Args:
      hidden_fn: (tokens [B, L] int32, valid [B, L] bool, window) -> hidden states [B, b, D] of the
        window, b of the L positions.
      unembed_fn: hidden states [B, b, D] -> logits [B, b, V] float32.
      prompt: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool, False on padding.
      keys: [B] typed PRNG keys, one for each row.
      config: how to decode.
      mask_id: the MASK token, never chosen, but part of the softmax that gives confidence.
      eos_id: the end-of-sequence token.
      allowed: [V] bool, True for ids that may be chosen.
      cached: the model with a cache, which `config.cache` asks for.
      opening: [B, C] int32, the completion as it begins: MASK where tokens are generated, and given
        tokens, which stay and count as part of the prompt. None generates all.

    Raises:
      ValueError: if the shapes do not agree, MASK and EOS are the same token, or there is no cache.
    """
    decoder = decoder_of(
        hidden_fn, unembed_fn, prompt_mask, keys, config, mask_id, eos_id, allowed, cached
    )
    carry = begin(prompt, prompt_mask, keys, config, mask_id, allowed.size)
    if opening is not None:
        decoder = dataclasses.replace(decoder, generated=opening == mask_id)
        carry = carry.replace(tokens=jnp.concatenate([prompt, opening], axis=1).astype(jnp.int32))
    final = jax.lax.while_loop(decoder.unfinished, decoder.advance, carry)
    return finish(decoder, final)


def finish(decoder: Decoder, carry: Carry) -> Completion:
    """The completions of rows that have ended, edited where the sampler edits finished drafts."""
    completion = completion_of(carry, decoder.eos_id, decoder.config, decoder.generated)
    if not (decoder.config.edits and decoder.config.rule.edits_after):
        return completion
    prompt = carry.tokens[:, : decoder.prompt_length]
    tokens, records = editing.edit_draft(decoder, prompt, completion.tokens)
    return completion.replace(tokens=tokens, extras=completion.extras | records)


def decoder_of(
    hidden_fn: Callable[[Array, Array, Window], Array],
    unembed_fn: Callable[[Array], Array],
    prompt_mask: Array,
    keys: Array,
    config: SamplingConfig,
    mask_id: int,
    eos_id: int,
    allowed: Array,
    cached: CachedModel | None = None,
    compact: bool = False,
) -> Decoder:
    """The steps of `generate`, whose arguments these are; raises as it does.

    `compact` is that of `Decoder`, for rows that no mesh splits.
    """
    if mask_id == eos_id:
        raise ValueError(f'mask_id and eos_id are both {mask_id}; they must be different tokens')
    if config.cache and cached is None:
        raise ValueError(
            f"sampling.cache is {config.cache!r}, but this model has none; use sampling.cache ''"
        )
    shape = (len(prompt_mask), config.length)
    return Decoder(
        hidden_fn=hidden_fn,
        unembed_fn=unembed_fn,
        valid=jnp.concatenate([prompt_mask, jnp.ones(shape, bool)], axis=1),
        keys=keys,
        config=config,
        prompt_length=prompt_mask.shape[1],
        mask_id=mask_id,
        eos_id=eos_id,
        allowed=allowed & (jnp.arange(allowed.size) != mask_id),
        cached=cached if config.cache else None,
        compact=compact,
    )


def begin(
    prompt: Array,
    prompt_mask: Array,
    keys: Array,
    config: SamplingConfig,
    mask_id: int,
    vocab_size: int,
    block: Array | None = None,
) -> Carry:
    """What the first block of `generate` starts from.

    Args:
      prompt, prompt_mask, keys, config, mask_id: as in `generate`.
      vocab_size: V.
      block: [] or [B] int32, the first block of each row; None is block 0 for all.
    """
    if prompt.shape != prompt_mask.shape or keys.shape != prompt.shape[:1]:
        raise ValueError(
            f'prompt {prompt.shape}, prompt_mask {prompt_mask.shape} and keys {keys.shape} do not '
            'agree; expected [B, P], [B, P] and [B]'
        )
    shape = (len(prompt), config.length)
    records = record_shapes(config, len(prompt), vocab_size)
    if not config.edits_in_blocks:
        records = {name: records[name] for name in config.records}
    if config.rule.takes_back:  # which the confidence of committed tokens decides
        records['confidence'] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Carry(
        block=jnp.zeros((), jnp.int32) if block is None else block,
        tokens=jnp.concatenate(
            [prompt.astype(jnp.int32), jnp.full(shape, mask_id, jnp.int32)], axis=1
        ),
        commit_step=jnp.full(shape, -1, jnp.int32),
        extras={
            name: jnp.full(record.shape, editing.EMPTY.get(name, 0), record.dtype)
            for name, record in records.items()
        },
        confidence=jnp.zeros(shape) if 'influence' in config.records else None,
    )


def completion_of(
    carry: Carry, eos_id: int, config: SamplingConfig, generated: Array | None = None
) -> Completion:
    """The drafts of rows that have ended; `generated` as in `Decoder`.

    They are the completions, unless the sampler edits finished drafts (`finish`).
    """
    names = (*config.records, *(editing.NAMES if config.edits_in_blocks else ()))
    completion = Completion(
        tokens=carry.tokens[:, -config.length :],
        commit_step=carry.commit_step,
        extras={name: carry.extras[name] for name in names},
    )
    if not config.stop_early:
        return completion
    is_eos = is_generated_eos(completion.tokens, eos_id, generated)
    return _end_at_eos(completion, is_eos, eos_id, config)


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
    empty = editing.EMPTY | {'draft': eos_id}
    extras = {
        name: jnp.where(
            after.reshape(after.shape + (1,) * (x.ndim - 2)),
            jnp.full_like(x, empty.get(name, 0)),
            x,
        )
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

"""Sampling from models whose blocks are counted from the first token of the prompt (LLaDA2).

The first block that is generated may hold the end of the prompt. Each row is moved to the left
until its blocks begin where the columns' blocks do, so that the sampler decodes the same columns of
all rows.

A comment such as `# [B, L]` after an assignment is the shape of the value: `B` sequences, `P` and
`C` tokens of prompt and completion, `b` positions of a block, `V` vocabulary, `D` width; `L` is
here P rounded up to whole blocks, and C.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from spg_jax.diffusion.sampling import CachedModel, Completion, SamplingConfig, generate
from spg_jax.models.windows import Window


def on_prompt_grid(config: SamplingConfig) -> SamplingConfig:
    """How completions of `config` are decoded on the grid: with a block more, and its steps."""
    return dataclasses.replace(
        config,
        length=config.length + config.block_length,
        steps=config.steps + config.steps_per_block,
    )


def generate_on_prompt_grid(
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
) -> Completion:
    """Completes a batch of prompts block by block, with blocks counted from the prompt.

    Arguments and errors are those of `sampling.generate`. As in the published sampler, the last
    block is generated whole, and what lies beyond the completion is cut off. Steps are counted from
    the block that holds the last token of the longest possible prompt.
    """
    length, size = config.length, config.block_length  # C, b
    width = prompt.shape[1]  # P
    wide = -(-width // size) * size  # P rounded up
    gap = -prompt_mask.sum(-1) % size  # [B], positions of the prompt's last block that are free
    free = jnp.full((len(prompt), length + size), mask_id, jnp.int32)
    row = jnp.concatenate([prompt.astype(jnp.int32), free], axis=1)
    exists = jnp.concatenate([prompt_mask, jnp.ones(free.shape, bool)], axis=1)
    source = jnp.arange(wide + length)[None, :] - (wide - width) + gap[:, None]  # [B, L]
    place = jnp.maximum(source, 0)
    tokens = jnp.take_along_axis(row, place, axis=1)  # [B, L]
    valid = jnp.take_along_axis(exists, place, axis=1) & (source >= 0)  # [B, L]
    first = wide - size  # the first column that can hold a token of a completion
    completion = generate(
        hidden_fn,
        unembed_fn,
        tokens[:, :first],
        valid[:, :first],
        keys,
        on_prompt_grid(config),
        mask_id,
        eos_id,
        allowed,
        cached,
        opening=tokens[:, first:],
    )
    back = jnp.arange(length)[None, :] + (size - gap)[:, None]  # [B, C]

    def cut(x: Array) -> Array:
        return jnp.take_along_axis(x, back.reshape(back.shape + (1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(cut, completion)

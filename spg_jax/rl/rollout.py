"""The rollout: completions of a batch of prompts with their rewards; its fields are said once.

Letters of axes: `B` rows, `P` tokens of a prompt, `C` positions of a completion.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh

from spg_jax.diffusion.samplers.editing import DRAFT, EDITS
from spg_jax.rl.advantages import groups_with_signal
from spg_jax.sharding import batch_sharding, own_rows, put_batch


def _per_row(dtype: Any, axes: str = '') -> Any:
    """A field with one entry a row; `axes` has a letter for each further axis."""
    return struct.field(metadata={'dtype': dtype, 'axes': axes})


@struct.dataclass
class Rollout:
    """Completions with their rewards and advantages. A row is a sequence.

    Corruptions see one row at a time: then the leading axis B is gone from every field.
    """

    prompt: Array = _per_row(jnp.int32, 'P')  # [B, P] left-padded
    prompt_mask: Array = _per_row(jnp.bool_, 'P')  # [B, P] False on padding
    completion: Array = _per_row(jnp.int32, 'C')  # [B, C]
    scored: Array = _per_row(jnp.bool_, 'C')  # [B, C] True through the first EOS
    # [B, C] the denoising step that fixed each token; -1 after a stop
    commit_step: Array = _per_row(jnp.int32, 'C')
    reward: Array = _per_row(jnp.float32)  # [B]
    advantage: Array = _per_row(jnp.float32)  # [B]
    example_id: Array = _per_row(jnp.uint32)  # [B] prompt index * G + member, the row's identity
    # What an objective asks for beside these, by name, [B, ...]: a sampler recorded it, or it was
    # read out of policies when the rollout arrived.
    extras: dict[str, Array] = struct.field(default_factory=dict)


def rollout_shapes(rows: int, prompt_length: int, length: int, sharding: Any = None) -> Rollout:
    """A rollout without extras as `jax.ShapeDtypeStruct`.

    Args:
      rows: B.
      prompt_length: P.
      length: C.
      sharding: of every field.
    """
    sizes = {'P': prompt_length, 'C': length}
    return Rollout(
        **{
            field.name: jax.ShapeDtypeStruct(
                (rows, *(sizes[axis] for axis in field.metadata['axes'])),
                field.metadata['dtype'],
                sharding=sharding,
            )
            for field in dataclasses.fields(Rollout)
            if field.name != 'extras'
        }
    )


# What is known of a draft that was edited: its reward [B], and its tokens through its first EOS
# [B, C]. They are extras beside what the sampler recorded (`samplers.editing`).
DRAFT_REWARD, DRAFT_SCORED = 'draft_reward', 'draft_scored'


def draft_shapes(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The extras that a rollout has of edited drafts, for B = `rows` and C = `length`."""
    return {
        DRAFT_REWARD: jax.ShapeDtypeStruct((rows,), jnp.float32),
        DRAFT_SCORED: jax.ShapeDtypeStruct((rows, length), jnp.bool_),
    }


def zeros_like(shapes: Any, mesh: Mesh) -> Any:
    """A pytree of rows that are all zero, such as a saved rollout is restored into.

    Args:
      shapes: `rollout_shapes`, or another pytree of shapes [B, ...].
      mesh: where the arrays live.
    """
    return put_batch(
        mesh,
        jax.tree.map(
            lambda x: np.zeros((len(own_rows(mesh, x.shape[0])), *x.shape[1:]), x.dtype), shapes
        ),
    )


def empty_rollout(rows: int, prompt_length: int, length: int, mesh: Mesh) -> Rollout:
    """A rollout of zeros without extras; the arguments are those of `rollout_shapes`."""
    return zeros_like(rollout_shapes(rows, prompt_length, length, batch_sharding(mesh)), mesh)


def rollout_metrics(
    rollout: Rollout, group_size: int, eos_id: int, vocab_size: int
) -> dict[str, tuple[Array, Array]]:
    """Figures that describe a rollout, each as (sum, weight).

    `commonest_token` is the share of the most frequent token among all tokens through the first
    EOS, and `repeats` the share of those tokens that equal the one before them. Both rise where a
    policy collapses into few tokens.
    """
    rows = jnp.float32(len(rollout.reward))
    scored = rollout.scored
    ones = scored.reshape(-1).astype(jnp.int32)
    counts = jnp.bincount(rollout.completion.reshape(-1), ones, length=vocab_size)  # [V]
    repeats = (rollout.completion[:, 1:] == rollout.completion[:, :-1]) & scored[:, 1:]
    groups = rollout.completion.reshape(-1, group_size, rollout.completion.shape[1])
    same = jnp.all(groups[:, :, None, :] == groups[:, None, :, :], axis=-1)  # [B/G, G, G]
    # A completion counts as distinct if no earlier member of its group equals it.
    is_distinct = ~jnp.any(jnp.tril(same, k=-1), axis=-1)  # [B/G, G]
    signal = groups_with_signal(rollout.reward, group_size)
    ended = jnp.any((rollout.completion == eos_id) & rollout.scored, axis=1)
    of_edits = edit_metrics(rollout) if EDITS in rollout.extras else {}
    return of_edits | {
        'reward': (rollout.reward.sum(), rows),
        'reward_max_of_group': (
            rollout.reward.reshape(-1, group_size).max(1).sum(),
            jnp.float32(len(groups)),
        ),
        'groups_with_signal': (_float(signal.sum()), jnp.float32(len(groups))),
        'distinct_completions': (_float(is_distinct.sum()), rows),
        'length': (_float(scored.sum()), rows),
        'eos_rate': (_float(ended.sum()), rows),
        'commonest_token': (_float(counts.max()), _float(scored.sum())),
        'repeats': (_float(repeats.sum()), _float(scored[:, 1:].sum())),
    }


def edit_metrics(rollout: Rollout) -> dict[str, tuple[Array, Array]]:
    """Figures of edited drafts, each as (sum, weight).

    `draft_reward` is the reward before editing, `improved` and `worsened` the shares of rows whose
    reward editing raised and lowered, `edited` the share of the tokens through the first EOS, of
    draft or answer, that are not those of the draft, and `writes` the tokens written in a row.
    """
    extras, rows = rollout.extras, jnp.float32(len(rollout.reward))
    before = extras[DRAFT_REWARD]
    counted = rollout.scored | extras[DRAFT_SCORED]
    changed = counted & (rollout.completion != extras[DRAFT])
    return {
        DRAFT_REWARD: (before.sum(), rows),
        'improved': (_float((rollout.reward > before).sum()), rows),
        'worsened': (_float((rollout.reward < before).sum()), rows),
        'edited': (_float(changed.sum()), _float(counted.sum())),
        'writes': (_float((extras[EDITS] >= 0).sum()), rows),
    }


def _float(count: Array) -> Array:
    return count.astype(jnp.float32)

"""Editing: tokens that are there are written anew, and every write is recorded.

Two samplers edit. 'llada21' (LLaDA2.1, arXiv 2602.08676) edits in the rounds of a block, beside the
commitments, and in at most `post_steps` rounds more. 'autoedit' (ReflectDrive-2, arXiv 2605.04647)
first finishes a draft by the rule of `commit`, and then writes it anew in `edit_rounds` rounds,
each of which reads the completion without a MASK. A row that would change nothing stops; given
tokens never change; MASK is never written.

Which positions a round writes depends on the state before it, and not on the tokens that it draws,
so that the law of a draft and its edits is the product of the probabilities of all tokens that were
written (`SamplingConfig.exact_law` says whether that of the draft is). A token may be drawn again
where it stands; it counts as written, as its probability is a factor of that law.

Departures from the published `generate` of LLaDA2.1, which is greedy and takes one row at a time:

- It writes a predicted MASK like any token and then may loop for ever. Here MASK is not among the
  ids that are drawn, so that a block takes at most `rounds_per_block` rounds.
- Its `steps` does nothing, and a round commits at least one token. Here a round commits at least
  what the steps that are left require, which with as many steps as tokens is one.
- Without its early stop it generates all blocks and cuts the answer. The answer is the same here.
- One copy of it passes a mask of zeros and ones to a model that adds masks, so that every position
  sees every other. Here the model sees blocks as it was trained.
- Above temperature 0 a draw decides there whether a token is replaced, and here the likeliest one.

What is recorded of each position, by name:

- 'draft' [B, C] int32, the token that was written first. Its round is `commit_step`.
- 'edits' [B, C, R] int32, the token that each round wrote over another, or -1 where it wrote none.
  Rounds of 'llada21' count from the beginning of the block of the position.
- 'edit_log_prob' [B, C, R] float32, the log-probability of that token in the law that it was drawn
  from, in nats; 0 where none was written.

Letters of axes: `B` sequences, `P` and `C` tokens of prompt and completion, `b` positions of a
block, `R` rounds of editing, `V` vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from spg_jax.diffusion import token_law
from spg_jax.diffusion.samplers.decoder import Decoder
from spg_jax.diffusion.samplers.prediction import draw
from spg_jax.diffusion.samplers.settings import SamplingConfig
from spg_jax.models.windows import cut

DRAFT, EDITS, LOG_PROB = NAMES = ('draft', 'edits', 'edit_log_prob')
NOTHING = -1
EMPTY = {EDITS: NOTHING}  # what a record holds where nothing was written, if that is not 0


def record_shapes(config: SamplingConfig, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The records of `rows` completions, by name; {} for a sampler that does not edit."""
    if not config.edits:
        return {}
    each = rows, config.length, config.edits_recorded
    return {
        DRAFT: jax.ShapeDtypeStruct(each[:2], jnp.int32),
        EDITS: jax.ShapeDtypeStruct(each, jnp.int32),
        LOG_PROB: jax.ShapeDtypeStruct(each, jnp.float32),
    }


@struct.dataclass
class _Rounds:
    """What one round of editing hands to the next."""

    number: Array  # [] int32
    tokens: Array  # [B, C] int32
    edits: Array  # [B, C, R] int32
    log_prob: Array  # [B, C, R] float32
    is_open: Array  # [B] bool, whether the round before wrote something


def edit_draft(decoder: Decoder, prompt: Array, draft: Array) -> tuple[Array, dict[str, Array]]:
    """Writes finished drafts anew, in `edit_rounds` rounds at most.

    A round computes the hidden states of the whole sequence once, and the logits of one block after
    the other.

    Args:
      decoder: reads the model.
      prompt: [B, P] int32.
      draft: [B, C] int32, without MASK.

    Returns:
      tokens [B, C] int32, and the records by name.
    """
    config, size, rows = decoder.config, decoder.config.block_length, len(draft)

    def write(rounds: _Rounds) -> _Rounds:
        tokens = jnp.concatenate([prompt, rounds.tokens], axis=1)
        hidden = decoder.hidden_of(tokens, 0, config.length)  # [B, C, D] each

        def of_block(block: Array) -> tuple[Array, Array, Array]:
            start = block * size
            # Steps of the draft have the numbers before these.
            step = config.steps + rounds.number * config.blocks + block
            logits = decoder.logits_of(tuple(cut(x, start, size) for x in hidden))  # [B, b, V]
            tokens = jax.lax.dynamic_slice_in_dim(rounds.tokens, start, size, axis=1)  # [B, b]
            no_mask = jnp.zeros(tokens.shape, bool)
            view, drawable = draw(logits, no_mask, decoder.keys, step, decoder.allowed, config)
            chosen = jax.vmap(config.rule.edit, (0, 0, None))(view, tokens, config)
            law = token_law.record(('log_prob',), drawable, view.token, config.temperature)
            return chosen, view.token, law['log_prob']

        blocks = jax.lax.map(of_block, jnp.arange(config.blocks))  # [blocks, B, b] each
        chosen, token, log_prob = (jnp.moveaxis(x, 0, 1).reshape(rows, -1) for x in blocks)
        chosen &= rounds.is_open[:, None]
        if decoder.generated is not None:
            chosen &= decoder.generated
        is_now = jnp.arange(config.edit_rounds)[None, None, :] == rounds.number
        is_now = is_now & chosen[:, :, None]  # [B, C, R]
        return _Rounds(
            number=rounds.number + 1,
            tokens=jnp.where(chosen, token, rounds.tokens),
            edits=jnp.where(is_now, token[:, :, None], rounds.edits),
            log_prob=jnp.where(is_now, log_prob[:, :, None], rounds.log_prob),
            is_open=chosen.any(-1),
        )

    def goes_on(rounds: _Rounds) -> Array:
        # The first limit is known to the compiler, and `planning.collectives` reads it.
        return (rounds.number < config.edit_rounds) & rounds.is_open.any()

    shapes = record_shapes(config, rows)
    start = _Rounds(
        number=jnp.zeros((), jnp.int32),
        tokens=draft,
        edits=jnp.full(shapes[EDITS].shape, NOTHING, jnp.int32),
        log_prob=jnp.zeros(shapes[LOG_PROB].shape),
        is_open=jnp.ones(rows, bool),
    )
    end = jax.lax.while_loop(goes_on, write, start)
    return end.tokens, {DRAFT: draft, EDITS: end.edits, LOG_PROB: end.log_prob}


class States(NamedTuple):
    """The completion of ONE row before each of R rounds, and what the round wrote into it."""

    tokens: Array  # [R, C] int32
    written: Array  # [R, C] int32, the token written, or what is there already
    target: Array  # [R, C] bool, the positions that were written


def replay_edits(draft: Array, edits: Array) -> States:
    """The states of a finished draft of one row, from the record of its edits.

    Args:
      draft: [C] int32.
      edits: [C, R] int32.
    """

    def write(tokens: Array, edit: Array) -> tuple[Array, States]:
        target = edit >= 0
        after = jnp.where(target, edit, tokens)
        return after, States(tokens, after, target)

    return jax.lax.scan(write, draft, edits.T)[1]


def state_in_block(
    draft: Array, edits: Array, commit_step: Array, block: Any, turn: Any, config: Any, mask_id: int
) -> Array:
    """The completion [C] of ONE row of 'llada21' before a round of a block.

    Args:
      draft: [C] int32.
      edits: [C, R] int32.
      commit_step: [C] int32.
      block: [] the block.
      turn: [] the round, counted from the beginning of the block.
      config: how the row was decoded.
      mask_id: the MASK token.
    """
    place = jnp.arange(config.length) // config.block_length  # [C] block of each position
    is_before = (jnp.arange(edits.shape[1])[None, :] < turn) | (place < block)[:, None]  # [C, R]
    latest = jnp.where((edits >= 0) & is_before, 1 + jnp.arange(edits.shape[1])[None, :], 0).max(-1)
    edited = jnp.take_along_axis(edits, jnp.maximum(latest - 1, 0)[:, None], axis=1)[:, 0]
    tokens = jnp.where(latest > 0, edited, draft)
    # After an early stop a position was never written; the sampler saw MASK in all states.
    step = block * config.steps_per_block + jnp.minimum(turn, config.steps_per_block)
    is_there = (commit_step >= 0) & (commit_step < step)
    return jnp.where(is_there, tokens, mask_id)

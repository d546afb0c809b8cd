"""Demonstrations as rows of one length, from their first token on, for training in blocks."""

from typing import NamedTuple

import numpy as np

from spg_jax.data.demonstrations import Demonstrations


class Sequences(NamedTuple):
    """Rows of N tokens, each of one or several examples."""

    tokens: np.ndarray  # [B, N] int32
    maskable: np.ndarray  # [B, N] bool, True on answers and the EOS after them
    valid: np.ndarray  # [B, N] bool, False on padding
    document: np.ndarray | None  # [B, N] int32, the example of each token; None is one a row
    index: np.ndarray  # [B] uint32, the place of the first example of each row in its data set


def pack(batch: Demonstrations, documents: int, length: int, block: int, eos_id: int) -> Sequences:
    """Demonstrations in rows of `length` tokens.

    An example begins where its part of the row begins, so that blocks are counted from its first
    token, as models with blocks count them. It has its prompt and C tokens of completion, and EOS
    up to the end of the last block; the rest of its part is padding.

    Args:
      batch: B x documents examples.
      documents: examples in a row.
      length: N, a multiple of `documents` with room for P + C tokens in each part.
      block: tokens of a block of the converted model; 1 if it has none.
      eos_id: the end-of-sequence token.
    """
    part = length // documents
    examples, room = batch.prompt.shape
    prompt_lengths = batch.prompt_mask.sum(1)[:, None]  # [B documents, 1]
    column = np.arange(part)[None, :]
    filling = np.full((examples, part), eos_id, np.int32)
    whole = np.concatenate([batch.prompt, batch.completion, filling], axis=1)
    tokens = np.take_along_axis(whole, column + room - prompt_lengths, axis=1)
    ends = -(-(prompt_lengths + batch.completion.shape[1]) // block) * block
    valid = column < ends
    document = None
    if documents > 1:
        places = np.repeat(np.arange(documents, dtype=np.int32), part)
        document = np.tile(places, (examples // documents, 1))

    def rows(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, length)

    return Sequences(
        tokens=rows(np.where(valid, tokens, eos_id).astype(np.int32)),
        maskable=rows(valid & (column >= prompt_lengths)),
        valid=rows(valid),
        document=document,
        index=batch.index[::documents],
    )

"""Which keys each query of attention sees, in one small description.

A plain array `valid` [B, L] says that every query sees every valid key, which is the case of LLaDA
and the fastest. A `Visibility` says more: blocks, documents, and the two halves of block-diffusion
training. Each implementation of attention translates the description or refuses it.

A comment such as `# [B, L]` after an assignment is the shape of the value: `B` sequences, `L`
length, of the keys `L'`; `N` = L / 2 is the length of one half.
"""

import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class Visibility:
    """Which keys each query sees.

    A key is seen if it is valid, belongs to the document of the query, and its block is not later
    than that of the query. Block `position // block_length` holds `block_length` positions, so that
    length 1 is causal attention.

    With `halves` the sequence is a noisy one of N tokens followed by its clean copy, both with
    positions from 0 (block diffusion, arXiv 2503.09573). A noisy query sees the noisy keys of its
    own block and the clean keys of earlier blocks; a clean query sees the clean keys of its own and
    of earlier blocks.
    """

    valid: Array  # [B, L] bool, False on padding
    position: Array | None = None  # [B, L] int32; None counts columns, in each half from 0
    document: Array | None = None  # [B, L] int32; None is one document
    block_length: int = struct.field(pytree_node=False, default=0)  # 0: all see all
    halves: bool = struct.field(pytree_node=False, default=False)

    def __post_init__(self) -> None:
        if self.block_length < 0 or (self.halves and not self.block_length):
            raise ValueError(
                f'block_length is {self.block_length}; use a positive number'
                f'{"" if self.halves else ", or 0 for attention to every position"}'
            )
        length = getattr(self.valid, 'shape', (0, 0))[-1]
        if self.halves and length % 2:
            raise ValueError(f'a noisy and a clean half have {length} tokens; use an even number')

    @property
    def positions(self) -> Array:
        """Position of each token, [B, L] int32, or [1, L] where all rows are alike."""
        if self.position is not None:
            return self.position
        length = self.valid.shape[-1]
        return jnp.arange(length)[None, :] % (length // 2 if self.halves else length)

    def mask(self) -> Array:
        """Whether a query sees a key, [B, L, L'] bool."""
        visible = self.valid[:, None, :]  # [B, 1, L']
        if self.document is not None:
            visible &= self.document[:, :, None] == self.document[:, None, :]
        if self.block_length:
            block = self.positions // self.block_length  # [B, L] or [1, L]
            visible &= block_rule(block[:, :, None], block[:, None, :], self.halves, jnp)
        return jnp.broadcast_to(visible, (*self.valid.shape, self.valid.shape[-1]))


def block_rule(query: Array, key: Array, halves: bool, xp) -> Array:
    """Whether the blocks of queries [..., L, 1] and keys [..., 1, L'] allow attention.

    Args:
      query: the block of each query.
      key: the block of each key.
      halves: whether the sequence is a noisy half and its clean copy.
      xp: `jax.numpy`, or `numpy` for a mask that is known before the program runs.
    """
    if not halves:
        return key <= query
    length = query.shape[-2]
    noisy_query = xp.arange(length).reshape((1,) * (query.ndim - 2) + (length, 1)) < length // 2
    noisy_key = noisy_query.swapaxes(-1, -2)
    same_noisy_block = noisy_query & noisy_key & (key == query)
    earlier_clean_block = noisy_query & ~noisy_key & (key < query)
    among_clean = ~noisy_query & ~noisy_key & (key <= query)
    return same_noisy_block | earlier_clean_block | among_clean

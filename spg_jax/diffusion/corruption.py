"""Corruption: which tokens of a sequence become MASK, one example with all its M draws at a time.

A corruption maps (key, one example) to the masks of all M draws together, so that draws can share
something (blocks without replacement, complementary pairs, ...). Callers `vmap` it over the batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

KINDS = ('full', 'uniform', 'block', 'block_full')
BLOCK_KINDS = ('block', 'block_full')
BLOCK_DRAWS = ('balanced', 'released')


@struct.dataclass
class Draws:
    """The M corruptions of one sequence of L = P + C tokens."""

    masked: Array  # [M, L] bool, True where the token is replaced by MASK; never on prompt padding
    block: Array  # [M] int32, the chosen block; 0 where the corruption has no blocks


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Draws masks for one example (SPG's block-wise masking and its ablations).

    Completion tokens: `full` masks all of them; `uniform` a uniformly drawn number, at least one,
    of the scored positions; `block` a uniformly drawn number, at least one, of the scored positions
    of a random block among those the completion reaches, and every later block; `block_full` that
    block and every later one. Positions after the first EOS are masked under every kind.

    Prompt tokens are masked with probability `prompt_rate`, and so are, as released, completion
    tokens of blocks before the chosen one, unless `perturb_completion` is off (the block estimator
    bounds a likelihood only when earlier blocks are seen clean). The chosen block's unmasked tokens
    are never perturbed.

    Attributes:
      kind: one of KINDS.
      draws: M, the number of draws a sequence.
      block_length: completion positions a block; read by the block kinds only.
      prompt_rate: probability that a real prompt token is masked, within [0, 1].
      block_draw: 'balanced' goes through a fresh permutation of the blocks reached and starts it
        again when M exceeds them; 'released' reproduces the published code, randperm(all blocks)
        modulo the blocks reached, which is neither uniform nor free of repeats.
      perturb_completion: whether completion tokens before the chosen block are perturbed as well.

    Raises:
      ValueError: on an unknown kind or block_draw, or a number out of range.
    """

    kind: str
    draws: int
    block_length: int
    prompt_rate: float = 0.15
    block_draw: str = 'balanced'
    perturb_completion: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'corruption.kind is {self.kind!r}; use one of {", ".join(KINDS)}')
        if self.block_draw not in BLOCK_DRAWS:
            raise ValueError(
                f'corruption.block_draw is {self.block_draw!r}; use one of {", ".join(BLOCK_DRAWS)}'
            )
        if self.draws < 1:
            raise ValueError(f'corruption.draws is {self.draws}; a sequence needs at least 1 draw')
        if self.kind in BLOCK_KINDS and self.block_length < 1:
            raise ValueError(
                f'block_length is {self.block_length}; corruption {self.kind!r} needs at least 1'
            )
        if not 0.0 <= self.prompt_rate <= 1.0:
            raise ValueError(
                f'corruption.prompt_rate is {self.prompt_rate}; a probability lies within [0, 1]'
            )

    def __call__(self, key: Array, prompt_mask: Array, scored: Array) -> Draws:
        """Draws the M masks of one example.

        Args:
          key: typed PRNG key of this example at this step; everything random comes from it.
          prompt_mask: [P] bool, False on padding.
          scored: [C] bool, True from the first completion token through the first EOS.

        Returns:
          Draws with masked [M, P + C] and block [M]. Draw k depends on k, not on M.
        """
        keys = jax.random.split(key, 1 + self.draws)
        block = jnp.zeros(self.draws, jnp.int32)
        if self.kind in BLOCK_KINDS:
            block = self._choose_blocks(keys[0], scored)
        length = scored.size

        def draw(key: Array, block: Array) -> Array:
            # All of a draw's randomness from one call, for each call adds to the compile time. The
            # prompt comes last and from its end, so that padding on its left moves nothing.
            noise = jax.random.uniform(key, (1 + 2 * length + prompt_mask.size,))
            choice, earlier, prompt = jnp.split(noise, [1 + length, 1 + 2 * length])
            prompt = prompt[::-1]
            completion = self._mask_completion(choice, earlier < self.prompt_rate, scored, block)
            return jnp.concatenate([(prompt < self.prompt_rate) & prompt_mask, completion])

        return Draws(masked=jax.vmap(draw)(keys[1:], block), block=block)

    def _choose_blocks(self, key: Array, scored: Array) -> Array:
        """The chosen block of each draw, [M] int32, among those the completion reaches."""
        total = -(-len(scored) // self.block_length)
        reached = jnp.maximum(-(-scored.sum() // self.block_length), 1)
        turn = jnp.arange(self.draws)
        if self.block_draw == 'released':
            return jax.random.permutation(key, total)[turn % total].astype(jnp.int32) % reached
        # Blocks not reached sort last, so the first `reached` entries permute those that are.
        order = jax.random.uniform(key, (total,)) + jnp.where(jnp.arange(total) < reached, 0, 2)
        return jnp.argsort(order)[turn % reached].astype(jnp.int32)

    def _mask_completion(
        self, choice: Array, perturbed: Array, scored: Array, block: Array
    ) -> Array:
        """One draw over the completion, [C] bool; choice [1 + C] uniform, perturbed [C] bool."""
        if self.kind == 'full':
            return jnp.ones_like(scored)
        if self.kind == 'uniform':
            return _random_subset(choice, scored) | ~scored
        position_block = jnp.arange(len(scored)) // self.block_length
        chosen = (position_block == block) & scored
        if self.kind == 'block':
            chosen = _random_subset(choice, chosen)
        masked = chosen | (position_block > block) | ~scored
        if self.perturb_completion:
            masked |= perturbed & (position_block < block)
        return masked


def _random_subset(noise: Array, eligible: Array) -> Array:
    """A uniformly drawn number, at least one, of the eligible positions.

    noise [1 + C] uniform in [0, 1): the first gives the number, the others the order of choice;
    eligible [C] bool -> [C] bool.
    """
    count = 1 + jnp.floor(noise[0] * eligible.sum()).astype(jnp.int32)
    order = noise[1:] + jnp.where(eligible, 0, 2)
    # The rank, not a threshold on `order`: equal floats would otherwise mask one position too many.
    rank = jnp.argsort(jnp.argsort(order))
    return eligible & (rank < count)


def scored_positions(completion: Array, eos_id: int) -> Array:
    """Positions of a completion that count: through the first EOS inclusive, all if there is none.

    Args:
      completion: [..., C] int32.
      eos_id: the end-of-sequence token.

    Returns:
      [..., C] bool.
    """
    is_eos = (completion == eos_id).astype(jnp.int32)
    return jnp.cumsum(is_eos, axis=-1) - is_eos == 0


def apply_masks(tokens: Array, masked: Array, mask_id: int) -> Array:
    """The M corrupted sequences: tokens [L] int32, masked [M, L] bool -> [M, L] int32."""
    return jnp.where(masked, mask_id, tokens[None, :])

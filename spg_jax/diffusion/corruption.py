"""Corruption: which tokens of a sequence become MASK, one example with all its M draws at a time.

A corruption maps (key, one example) to the masks of all M draws together, so that the draws of an
example can depend on each other: they can choose blocks without replacement, for instance. Callers
`vmap` it over the batch.

A comment such as `# [M, C]` after an assignment is the shape of the value: `M` draws, `L` tokens of
a sequence, `P` of its prompt and `C` of its completion; `[]` is a scalar.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from spg_jax.diffusion.informed import STRENGTH, gumbel, masking_preference
from spg_jax.errors import check_one_of

KINDS = ('full', 'uniform', 'block', 'block_full')
BLOCK_KINDS = ('block', 'block_full')
INFORMED_KINDS = ('uniform', 'block')  # those that mask a part of a region
BLOCK_DRAWS = ('balanced', 'released')
TIMES = ('independent', 'stratified')


@struct.dataclass
class Draws:
    """The M corruptions of one sequence of L = P + C tokens.

    Where a field is None, the corruption has nothing to say beyond what its comment states.
    """

    masked: Array  # [M, L] bool, True where MASK replaces the token; never on prompt padding
    block: Array | None = None  # [M] int32, the chosen block; None without blocks
    tokens: Array | None = None  # [M, L] int32, what is masked; None is the sequence itself
    label: Array | None = None  # [M, C] int32, the tokens read out; None is the completion
    target: Array | None = None  # [M, C] bool, positions in the loss; None is masked and scored
    valid: Array | None = None  # [M, L] bool, positions that exist; None is all but padding
    weight: Array | None = None  # [M] float32, of each draw in an estimate; None is for the loss
    # [M] int32, how many positions of the first block belong to the prompt; None is none
    offset: Array | None = None


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Draws masks for one example (SPG's block-wise masking and its ablations).

    `kind` says which completion tokens are masked. `full` masks all of them. `uniform` masks a
    uniformly drawn number, at least one, of the scored positions. `block` chooses one of the blocks
    that the completion reaches; it masks a uniformly drawn number, at least one, of the scored
    positions in that block, and all later blocks. `block_full` masks the chosen block and all later
    ones. Every kind masks the positions after the first EOS.

    Prompt tokens are masked with probability `prompt_rate`. So are completion tokens of blocks
    before the chosen one, as in the released code, unless `perturb_completion` is off: the block
    estimator bounds a likelihood only if earlier blocks stay clean. Unmasked tokens of the chosen
    block are never perturbed.

    With `informed` masking (arXiv 2609.25927) as many positions are masked as without, but which
    ones is drawn by their influence on other positions: see `informed`.

    Attributes:
      kind: one of KINDS.
      draws: M, the number of draws of a sequence.
      block_length: completion positions in a block. Only the block kinds read it.
      prompt_rate: probability that a real prompt token is masked, within [0, 1].
      block_draw: 'balanced' walks through a fresh permutation of the blocks reached, again and
        again if M exceeds their number. 'released' reproduces the published code, randperm(all
        blocks) modulo the blocks reached, which is neither uniform nor free of repeats.
      perturb_completion: whether completion tokens before the chosen block are perturbed as well.
      times: how numbers of masked positions are drawn. 'independent' draws each draw's by itself;
        'stratified' spreads those of a row evenly, t_k = (u + k/M) mod 1 with one uniform u (MD4),
        so that each is uniform and together they cover the range.
      informed: whether positions of little influence are preferred.
      strength: d of informed masking; with 0 no position is preferred.
      from_prompt: whether blocks are counted from the first token of the prompt, as models with
        block-causal attention see them, and not from that of the completion.

    Raises:
      ValueError: on an unknown kind or block_draw, a number out of range, or informed masking with
        a kind that masks whole regions.
    """

    kind: str
    draws: int
    block_length: int
    prompt_rate: float = 0.15
    block_draw: str = 'balanced'
    perturb_completion: bool = True
    times: str = 'independent'
    informed: bool = False
    strength: float = STRENGTH
    from_prompt: bool = False

    def __post_init__(self) -> None:
        check_one_of('corruption.kind', self.kind, KINDS)
        check_one_of('corruption.block_draw', self.block_draw, BLOCK_DRAWS)
        check_one_of('corruption.times', self.times, TIMES)
        if self.times == 'stratified' and self.kind not in INFORMED_KINDS:
            raise ValueError(
                f'corruption.times is stratified with corruption.kind {self.kind!r}, which masks '
                f'no random number of positions; use {" or ".join(INFORMED_KINDS)}'
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
        if self.informed and self.kind not in INFORMED_KINDS:
            raise ValueError(
                f'corruption.informed is on with corruption.kind {self.kind!r}, which masks all of '
                f'its region, so that there is nothing to choose; use {" or ".join(INFORMED_KINDS)}'
            )
        if not 0.0 <= self.strength < float('inf'):
            raise ValueError(f'corruption.strength is {self.strength}; use a number of at least 0')

    @property
    def records(self) -> tuple[str, ...]:
        """What the sampler must record for this corruption."""
        return ('influence',) if self.informed else ()

    def __call__(
        self, key: Array, prompt_mask: Array, scored: Array, influence: Array | None = None
    ) -> Draws:
        """Draws the M masks of one example.

        Args:
          key: typed PRNG key of this example at this step, the only source of randomness.
          prompt_mask: [P] bool, False on padding.
          scored: [C] bool, True from the first completion token through the first EOS.
          influence: [C] float32 of each token, for informed masking; others do not read it.

        Returns:
          Draws with masked [M, P + C] and block [M]. Draw k is the same whatever M is, unless times
          are stratified.
        """
        times = None  # [M], in [0, 1)
        if self.times == 'stratified':
            key, own = jax.random.split(key)
            times = jnp.mod(jax.random.uniform(own) + jnp.arange(self.draws) / self.draws, 1.0)
        keys = jax.random.split(key, 1 + self.draws)  # one for the blocks, one for each draw
        block = jnp.zeros(self.draws, jnp.int32)  # [M]
        offset = None  # []
        if self.kind in BLOCK_KINDS:
            if self.from_prompt:
                offset = prompt_mask.sum().astype(jnp.int32) % self.block_length
            block = self._choose_blocks(keys[0], scored, offset)
        length = scored.size

        def draw(key: Array, block: Array, time: Array | None) -> Array:
            """One draw over the whole sequence, [L] bool."""
            # One call yields all random numbers of a draw, because each call adds to the compile
            # time. The numbers of the prompt come last and are used from its end, so that padding
            # on its left does not move them to other tokens.
            noise = jax.random.uniform(key, (1 + 2 * length + prompt_mask.size,))
            choice, earlier, prompt = jnp.split(noise, [1 + length, 1 + 2 * length])
            prompt = prompt[::-1]  # [P]
            if time is not None:
                choice = choice.at[0].set(time)
            completion = self._mask_completion(
                choice, earlier < self.prompt_rate, scored, block, offset, influence
            )
            return jnp.concatenate([(prompt < self.prompt_rate) & prompt_mask, completion])

        return Draws(
            masked=jax.vmap(draw)(keys[1:], block, times),
            block=block,
            offset=None if offset is None else jnp.broadcast_to(offset, block.shape),
        )

    def _choose_blocks(self, key: Array, scored: Array, offset: Array | None) -> Array:
        """The chosen block of each draw, [M] int32, among those the completion reaches."""
        total = -(-len(scored) // self.block_length)
        last = scored.sum()  # []
        if offset is not None:
            total, last = total + 1, last + offset
        reached = jnp.maximum(-(-last // self.block_length), 1)  # []
        turn = jnp.arange(self.draws)  # [M]
        if self.block_draw == 'released':
            return jax.random.permutation(key, total)[turn % total].astype(jnp.int32) % reached
        # Blocks that are not reached sort last: the first `reached` entries are a permutation of
        # the blocks reached.
        sort_key = jax.random.uniform(key, (total,)) + jnp.where(jnp.arange(total) < reached, 0, 2)
        return jnp.argsort(sort_key)[turn % reached].astype(jnp.int32)

    def _mask_completion(
        self,
        choice: Array,
        perturbed: Array,
        scored: Array,
        block: Array,
        offset: Array | None,
        influence: Array | None,
    ) -> Array:
        """One draw over the completion.

        Args:
          choice: [1 + C] uniform in [0, 1), which choose the masked positions.
          perturbed: [C] bool, where a token is masked if it lies before the chosen block.
          scored: [C] bool.
          block: [] int32, the chosen block.
          offset: [] int32, the positions of the first block before the completion; None is none.
          influence: [C] float32, which informed masking needs.

        Returns:
          [C] bool.
        """

        def subset(region: Array) -> Array:
            if not self.informed:
                return _random_subset(choice, region)
            preference = masking_preference(influence, region, self.strength)
            return _random_subset(choice, region, preference)

        if self.kind == 'full':
            return jnp.ones_like(scored)
        if self.kind == 'uniform':
            return subset(scored) | ~scored
        position = jnp.arange(len(scored))  # [C]
        if offset is not None:
            position = position + offset
        block_of_position = position // self.block_length  # [C]
        in_block = (block_of_position == block) & scored
        if self.kind == 'block':
            in_block = subset(in_block)
        masked = in_block | (block_of_position > block) | ~scored
        if self.perturb_completion:
            masked |= perturbed & (block_of_position < block)
        return masked


def _random_subset(noise: Array, eligible: Array, preference: Array | None = None) -> Array:
    """A random subset, of uniformly drawn size and at least one position, of those eligible.

    Args:
      noise: [1 + C] uniform in [0, 1); the first entry gives the size, the others rank positions.
      eligible: [C] bool.
      preference: [C] float32; positions are drawn without replacement from its softmax over those
        eligible. Without it all are equally likely.

    Returns:
      [C] bool.
    """
    count = 1 + jnp.floor(noise[0] * eligible.sum()).astype(jnp.int32)  # []
    if preference is None:
        return subset_of_size(noise[1:], eligible, count)
    key = -(preference + gumbel(noise[1:]))  # [C], the Gumbel top-k trick
    return subset_of_size(jnp.argsort(jnp.argsort(key)) / key.size, eligible, count)


def subset_of_size(noise: Array, eligible: Array, count: Array) -> Array:
    """A random subset of the eligible positions.

    Args:
      noise: [C] uniform in [0, 1), which rank the positions.
      eligible: [C] bool.
      count: [] int32, the positions in the subset; all that are eligible where there are fewer.

    Returns:
      [C] bool.
    """
    sort_key = noise + jnp.where(eligible, 0, 2)  # [C], eligible positions first
    # Ranks are compared with the count because a threshold on `sort_key` would mask one position
    # too many where two floats are equal.
    rank = jnp.argsort(jnp.argsort(sort_key))  # [C]
    return eligible & (rank < count)


def scored_positions(completion: Array, eos_id: int) -> Array:
    """The positions of a completion through its first EOS, inclusive; without an EOS, all.

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

"""The phases of a conversion to diffusion: block sizes that rise to the whole length and fall."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

# (block, updates, share of the learning rate): the sizes of LLaDA2.0 for sequences of 512 tokens,
# where its own have 4096. How many updates it made with each is not published.
PHASES = (
    *((1, 200, 1.0), (4, 200, 1.0), (32, 200, 1.0), (64, 200, 1.0), (0, 2000, 1.0)),
    *((256, 200, 1.0), (128, 200, 1.0), (64, 200, 1.0), (32, 600, 1.0)),
)
WHOLE = 0  # as a block size: the whole length, which is masked diffusion
WARMUP_SHARE = 1 / 40  # of all updates, in which the learning rate rises


class Phase(NamedTuple):
    """Updates with blocks of one size."""

    block: int  # tokens; WHOLE for the whole length
    updates: int
    share: float  # of the learning rate

    @property
    def words(self) -> str:
        return f'blocks of {self.block}' if self.block else 'whole length'


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How an autoregressive model becomes a diffusion model.

    Raises:
      ValueError: from the constructor, for phases that cannot be; the message names the setting.
    """

    phases: tuple[Phase, ...]
    examples_length: int  # P + C, the longest example
    documents: int  # examples in a sequence
    length: int  # N, tokens of a sequence

    def __post_init__(self) -> None:
        part = self.length // self.documents
        if self.length % self.documents or part < self.examples_length:
            raise ValueError(
                f'convert.length is {self.length} for convert.documents {self.documents}, which '
                f'have up to {self.examples_length} tokens each; use '
                f'{self.documents * rounded(self.examples_length, self.phases)}, or 0 to let it be '
                'computed'
            )
        for phase in self.phases:
            if phase.block and part % phase.block:
                each = f' / convert.documents {self.documents}' if self.documents > 1 else ''
                raise ValueError(
                    f'convert.length {self.length}{each} is not a multiple of the block of '
                    f'{phase.block} in convert.phases; use '
                    f'{self.documents * rounded(part, self.phases)}, or 0 to let it be computed'
                )
        if self.final_block == 1:
            raise ValueError(
                'convert.phases ends with blocks of 1, which is an autoregressive model again; end '
                'with larger blocks, or with 0 for the whole length'
            )

    @property
    def final_block(self) -> int:
        """The block that the model sees afterwards; WHOLE if it sees everything."""
        return self.phases[-1].block

    @property
    def updates(self) -> int:
        return sum(phase.updates for phase in self.phases)

    def rate(self, count: Array) -> Array:
        """The share of the learning rate after `count` updates: a rise, then that of the phase."""
        ends = jnp.asarray(list(itertools.accumulate(phase.updates for phase in self.phases)))
        phase = jnp.minimum((count >= ends).sum(), len(self.phases) - 1)
        share = jnp.asarray([phase.share for phase in self.phases])[phase]
        warmup = max(1, round(self.updates * WARMUP_SHARE))
        return share * jnp.minimum(1.0, (count + 1) / warmup)


def rounded(tokens: int, phases: tuple[Phase, ...]) -> int:
    """The smallest number of tokens of at least `tokens` that all blocks divide."""
    common = math.lcm(*(phase.block for phase in phases if phase.block))
    return -(-tokens // common) * common

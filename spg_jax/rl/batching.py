"""The number of rows in a rollout batch, and the pieces that they are cut into."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from spg_jax.sharding import own_rows, row_shards


@dataclasses.dataclass(frozen=True)
class Batching:
    """The size of a rollout batch, and of the pieces in which it is generated and differentiated.

    The sizes of pieces change memory and speed, and never what is learned.

    Attributes:
      prompts: prompts of a rollout batch.
      group_size: G, completions of each prompt.
      inner_updates: gradient steps on each rollout batch.
      generation_batch: rows that are generated at once, over all devices; 0 stands for all.
      compact: whether rows leave the batch that have ended, or wait for a block's end (`rl.slots`).
      microbatch: rows that are differentiated at once, over all devices.
      draws_per_pass: Monte-Carlo draws that are differentiated at once; 0 stands for all.

    Raises:
      ValueError: from the constructor, naming the setting, its value and one that works.
    """

    prompts: int
    group_size: int
    inner_updates: int
    generation_batch: int
    compact: bool
    microbatch: int
    draws_per_pass: int

    def __post_init__(self) -> None:
        for name in ('prompts', 'group_size', 'inner_updates', 'microbatch'):
            if getattr(self, name) < 1:
                raise ValueError(f'rl.{name} is {getattr(self, name)}; use a positive integer')
        if self.rows % self.microbatch:
            raise ValueError(
                f'rl.microbatch {self.microbatch} does not divide the {self.rows} rows of a '
                'rollout batch (rl.prompts x rl.group_size); use '
                f'{largest_divisor(self.rows, self.microbatch)}'
            )
        if self.generation_batch < 0 or self.rows % self.rows_at_once:
            raise ValueError(
                f'rl.generation_batch {self.generation_batch} does not divide the {self.rows} rows '
                'of a rollout batch (rl.prompts x rl.group_size); use '
                f'{largest_divisor(self.rows, self.generation_batch)}, or 0 for all at once'
            )

    @property
    def rows(self) -> int:
        """B, the completions of a rollout batch."""
        return self.prompts * self.group_size

    @property
    def rows_at_once(self) -> int:
        """Rows that a rollout generates at once, over all devices."""
        return self.generation_batch or self.rows

    def check_draws(self, draws: int) -> None:
        """Refuses a number of draws that does not split into passes.

        Raises:
          ValueError: if it does not; the message names the setting.
        """
        if self.draws_per_pass < 0 or (self.draws_per_pass and draws % self.draws_per_pass):
            raise ValueError(
                f'rl.draws_per_pass {self.draws_per_pass} does not divide the {draws} draws of a '
                'row; use 1, or 0 for all at once'
            )

    def local_prompts(self, mesh: Mesh) -> np.ndarray:
        """The places [p] in a batch of the prompts whose rows this process has, reads and scores.

        Raises:
          ValueError: if the rows of a group would lie in two processes.
        """
        local_rows = own_rows(mesh, self.rows)
        prompts = np.unique(local_rows // self.group_size)
        if len(local_rows) < len(prompts) * self.group_size:
            processes = len({device.process_index for device in mesh.devices.flat})
            raise ValueError(
                f'rl.prompts is {self.prompts}: groups of {self.group_size} rows over the '
                f'{processes} processes of the mesh would straddle them; use a multiple of '
                f'{row_shards(mesh)} (mesh.data x mesh.fsdp), or fewer processes'
            )
        return prompts


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`; 1 where that is below 1."""
    sizes = range(1, max(1, min(number, most)) + 1)
    return max(size for size in sizes if number % size == 0)

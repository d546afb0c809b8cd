"""What is left of rollouts and updates where completions end early and rows are idle.

How many completions of a group earn the same, and how long they are, depends on policy and prompts.
A plan cannot know it, so it is told: both are in the metrics of a run.
"""

import dataclasses
import math

from spg_jax.planning.programs import Plan
from spg_jax.rl.slots import can_refill, can_stream


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is expected of the rollouts of a run; the default is that nothing can be saved.

    Attributes:
      signal: the share of groups with unequal rewards, the metric `groups_with_signal`.
      length: the mean number of tokens through the first EOS, the metric `length`; 0 stands for
        the whole length of a completion.

    Raises:
      ValueError: `signal` is not within [0, 1], or `length` is negative.
    """

    signal: float = 1.0
    length: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.signal <= 1:
            raise ValueError(f'--signal is {self.signal}; use a share of groups within [0, 1]')
        if not 0 <= self.length < math.inf:
            raise ValueError(f'--length is {self.length}; use a number of tokens, or 0 for all')


def work_left(plan: Plan, expected: Expected) -> dict[str, float]:
    """The expected share of the work of 'rollout' and 'update' that is left."""
    return {'rollout': _of_rollout(plan, expected), 'update': _of_update(plan, expected)}


def _of_update(plan: Plan, expected: Expected) -> float:
    """The expected number of pieces with a live row, as a share of all.

    Each group has unequal rewards independently of the others. One without is idle as a whole, and
    the live rows fill the first pieces (rl/packing.py).
    """
    if plan.parts.objective.idle is None:
        return 1.0
    group_size = plan.parts.batching.group_size
    groups, pieces = plan.rows_of_update // group_size, plan.rows_of_update // plan.rows_at_once
    return (
        sum(
            probability * math.ceil(live * group_size / plan.rows_at_once)
            for live, probability in enumerate(_binomial(groups, expected.signal))
        )
        / pieces
    )


def _of_rollout(plan: Plan, expected: Expected) -> float:
    """The expected share of its blocks that a completion is decoded for.

    Where rows cannot leave the batch all wait for the longest, which is taken to need every block.
    Where they can, a batch is as large as what is left of it: it is taken to be full, though the
    last rows leave some of it empty (rl/slots.py).
    """
    decoding = plan.parts.sampling
    leave = plan.parts.batching.compact and can_stream(plan.policy, decoding, plan.mesh)
    if not expected.length or not leave or not can_refill(decoding):
        return 1.0
    # The length ends somewhere in a block, on average in its middle, and the block is decoded.
    blocks = expected.length / decoding.block_length + 0.5
    return min(1.0, blocks * decoding.block_length / decoding.length)


def _binomial(trials: int, probability: float) -> list[float]:
    """The probabilities of 0, 1, … successes."""
    return [
        math.comb(trials, successes)
        * probability**successes
        * (1 - probability) ** (trials - successes)
        for successes in range(trials + 1)
    ]

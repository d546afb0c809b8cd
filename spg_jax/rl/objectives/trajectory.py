"""States of a rollout: what the sampler saw at its steps, rebuilt from the steps of commitment."""

from jax import Array


def replay(commit_step: Array, starts: Array, ends: Array) -> tuple[Array, Array]:
    """The sampler's input at some steps, and the tokens that were committed from there on.

    A position is masked at a step if its token was committed at that step or later. After an early
    stop the tokens of a row have the commit step -1; the sampler saw MASK there as long as the row
    was decoded, and it did not draw those tokens. They are masked in every state, and they are no
    target. A state without a target comes after the end of its row.

    Args:
      commit_step: [C] int32, -1 after an early stop.
      starts: [M] int32, the step before which each state is taken.
      ends: [M] int32, the step at which its tokens end, exclusive.

    Returns:
      masked [M, C] bool, and target [M, C] bool, the tokens committed in starts <= step < ends.
    """
    step, starts, ends = commit_step[None, :], starts[:, None], ends[:, None]
    masked = (step < 0) | (step >= starts)
    return masked, (step >= starts) & (step < ends)

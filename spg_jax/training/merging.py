"""The mean of the best checkpoints of a training, in place of a decay of the learning rate.

LLaDA2.0 (arXiv 2512.15745, section 4) takes the plain mean of the parameters of the k checkpoints
with the lowest validation perplexity.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def best_steps(losses: Mapping[int, float], count: int) -> list[int]:
    """The steps of the `count` lowest losses, the lowest first, and of equals the earlier."""
    return sorted(losses, key=lambda step: (losses[step], step))[:count]


def mean(trees: Iterable[Any]) -> Any:
    """The mean of equal trees of arrays, each taken in float32 and returned in its own type.

    The trees are taken one after the other, so that two of them are in memory at a time.
    """
    trees = iter(trees)
    first = next(trees)
    types = jax.tree.map(lambda x: x.dtype, first)
    total, count = jax.tree.map(lambda x: x.astype(jnp.float32), first), 1
    del first
    # Compiled as a whole, because operations on one array after the other take longer.
    add = jax.jit(partial(jax.tree.map, lambda x, y: x + y.astype(jnp.float32)))
    for tree in trees:
        total, count = add(total, tree), count + 1
    divide = jax.jit(lambda total: jax.tree.map(lambda x, t: (x / count).astype(t), total, types))
    return divide(total)

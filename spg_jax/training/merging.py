"""The mean of the best checkpoints of a training, in place of a decay of the learning rate.

LLaDA2.0 (arXiv 2512.15745, section 4) takes the plain mean of the parameters of the k checkpoints
with the lowest validation perplexity.
"""

from collections.abc import Iterable, Mapping
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
    total, count, types = None, 0, None
    for tree in trees:
        types = jax.tree.map(lambda x: x.dtype, tree)
        tree = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
        total = tree if total is None else jax.tree.map(jnp.add, total, tree)
        count += 1
    return jax.tree.map(lambda x, dtype: (x / count).astype(dtype), total, types)

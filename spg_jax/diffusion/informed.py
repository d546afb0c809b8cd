"""Informed masking (arXiv 2609.25927): tokens that constrain little are masked.

The sampler measures the influence of each token that it commits. With c_j the top-1 probability at
position j,

    m_i = sum_j |c_j after the commit of i - c_j before it|,    j still masked, |i - j| <= w

where "before" is the forward pass of the step that committed i, and "after" is that of the next
step. Tokens committed together share the change. No step follows the last one, so that the paper
leaves its scores open: here they are 0. The text counts no j that is committed in the last step
itself; here they count, because their confidences are read as those of all others are. (No code of
the authors was found.)

A corruption then masks as many positions of its region as without influence. Which ones are masked
is drawn without replacement from softmax(preference), by the Gumbel top-k trick, with

    preference_i = d (max m - m_i) / (max m - min m + 1e-8),    max and min over the region
"""

import jax
import jax.numpy as jnp
from jax import Array

WINDOW = 10  # w
STRENGTH = 1.5  # d


def change_around(before: Array, after: Array, masked: Array, window: int) -> Array:
    """How much the confidences around each position changed, [B, C] float32.

    Args:
      before, after: [B, C] float32, top-1 probabilities of two forward passes.
      masked: [B, C] bool, positions whose change counts.
      window: w, how far from a position changes count.
    """
    change = jnp.where(masked, jnp.abs(after - before), 0.0)
    return jax.lax.reduce_window(
        change, 0.0, jax.lax.add, (1, 2 * window + 1), (1, 1), padding='SAME'
    )


def masking_preference(influence: Array, region: Array, strength: float) -> Array:
    """How much a position is preferred to be masked, [C] float32; no meaning outside the region.

    Args:
      influence: [C] float32, m.
      region: [C] bool, the positions that are compared.
      strength: d; with 0 no position is preferred.
    """
    highest = jnp.where(region, influence, -jnp.inf).max()
    lowest = jnp.where(region, influence, jnp.inf).min()
    return strength * (highest - influence) / (highest - lowest + 1e-8)


def gumbel(noise: Array) -> Array:
    """Gumbel noise from uniform noise in [0, 1), of the same shape."""
    tiny = jnp.finfo(noise.dtype).tiny
    return -jnp.log(-jnp.log(jnp.maximum(noise, tiny)))

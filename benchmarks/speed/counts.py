"""Floating-point operations, counted from shapes, and slopes of growth.

Products of matrices are counted, those of attention included, and nothing else. A multiplication
with an addition is 2 FLOPs. What a program computes again, or for rows and positions that nothing
asks for, is not counted, so that a faster way of the same work has a larger share of the peak.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def forward_flops(model: Any, rows: int, length: int, scored: int) -> int:
    """FLOPs of reading whole sequences once.

    Args:
      model: has vocab_size, width, layers, heads, kv_heads and mlp_width.
      rows: sequences.
      length: L, tokens of each; every one attends to all.
      scored: positions of each whose logits are computed. In the last layer all others give keys
        and values, and nothing else.
    """
    width, head_dim = model.width, model.width // model.heads
    queries, keys = model.heads * head_dim, model.kv_heads * head_dim
    # Of a token: keys and values, queries and output, the three products of the gated MLP.
    given = 2 * width * 2 * keys
    products = 2 * width * (2 * queries + 3 * model.mlp_width)
    attention = 2 * 2 * length * queries  # scores, and the mean of the values
    token = model.layers * given + (model.layers - 1) * (products + attention)
    last = products + attention + 2 * width * model.vocab_size
    return rows * (length * token + scored * last)


def backward_flops(model: Any, rows: int, length: int, scored: int) -> int:
    """FLOPs of the gradient by all parameters, beside those of the forward pass."""
    return 2 * forward_flops(model, rows, length, scored)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of the law `value = c size**p` that fits best, by least squares of logs."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])

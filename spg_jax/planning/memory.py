"""Memory of a chip, by part: exact for what stays, and an estimate for what comes and goes.

The compiler knows better what comes and goes, but only for TPUs and only in minutes. The estimate
takes no time and serves every chip; `plan` prints how far it is from the compiler.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spg_jax import sharding
from spg_jax.models.lora import COLLECTION
from spg_jax.models.splash import padded_length
from spg_jax.planning.programs import Plan
from spg_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes a chip holds throughout a run."""

    weights: int  # the model's, frozen or not
    adapters: int
    optimizer: int  # moments

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.optimizer


def resident(state: TrainState) -> Resident:
    """What stays, from the shardings."""
    variables = state.variables
    return Resident(
        weights=local_bytes(variables['params']),
        adapters=local_bytes(variables.get(COLLECTION, {})),
        optimizer=local_bytes(state.opt_state),
    )


def local_bytes(tree: Any) -> int:
    """Bytes of a chip's shards of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def _bits(dtype: jnp.dtype) -> int:
    """Of an element in the memory of a chip, where two of four bits share a byte."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def estimate(plan: Plan, name: str) -> dict[str, float]:
    """What a program needs beside what stays, in bytes a chip, by its largest parts.

    With r rows of length L on a chip, 'fsdp' of size f and 'tensor' of size t:

    - casts: the adapters in the type of products, which the compiler takes out of the loops;
    - tables: embedding and unembedding whole along 'embed', 2 V/t D, unless f is 1;
    - logits: r V/t for every position unembedded at once, float32;
    - attention: as `_attention` says;
    - layer: the inputs and results of products: decoding, r L D four times in a layer and twice
      while unembedding; updating, r L (4 D + 3 F/t);
    - saved (update): the inputs of all layers, r L D each, kept for the backward pass;
    - gradients (update): of what is trained, the sum so far and the next term.

    Decoding peaks in a layer or while unembedding; an update has all at once. The factors are what
    the compiler for TPUs was seen to need.
    """
    if name == 'update':
        return _updating(plan)
    decoding = plan.decoding(name)
    sizes = _sizes(plan, plan.rows(name), decoding.length, decoding.block_length)
    in_a_layer = {
        'attention': _attention(plan, sizes, backwards=False),
        'layer': 4 * sizes.hidden,
    }
    unembedding = {
        'tables': sizes.tables,
        'logits': sizes.logits,
        'layer': 2 * sizes.hidden,
    }
    largest = max(in_a_layer, unembedding, key=lambda parts: sum(parts.values()))
    return {'casts': sizes.casts} | largest


def _updating(plan: Plan) -> dict[str, float]:
    batching, model = plan.parts.batching, plan.policy.config
    draws = batching.draws_per_pass or plan.parts.objective.corruption.draws
    length = plan.parts.sampling.length
    sizes = _sizes(plan, batching.microbatch * draws, length, length)
    attention = _attention(plan, sizes, backwards=True)
    layer = (4 + 3 * model.mlp_width / plan.mesh.shape['tensor'] / model.width) * sizes.hidden
    kept = sizes.hidden if model.remat else 2 * layer + attention
    return {
        'casts': sizes.casts,
        'tables': sizes.tables,
        'logits': sizes.logits,
        'attention': attention,
        'layer': layer,
        'saved': model.layers * kept,
        'gradients': 2 * local_bytes(plan.state.trained),
    }


class _Sizes(NamedTuple):
    """On a chip; bytes but for the first two."""

    rows: float  # r
    length: int  # L
    hidden: float  # [r, L, D]
    casts: float
    tables: float
    logits: float


def _sizes(plan: Plan, rows: int, completion: int, unembedded: int) -> _Sizes:
    """Args: rows over all chips; completion tokens, and those unembedded at once."""
    model, tensor = plan.policy.config, plan.mesh.shape['tensor']
    itemsize = jnp.dtype(model.dtype).itemsize
    rows /= sharding.row_shards(plan.mesh)
    length = plan.prompt_length + completion
    tables = 2 * model.vocab_size / tensor * model.width * itemsize
    return _Sizes(
        rows=rows,
        length=length,
        hidden=rows * length * model.width * itemsize,
        casts=local_bytes(plan.state.trained) * itemsize / 4 if model.lora else 0.0,
        tables=tables if plan.mesh.shape['fsdp'] > 1 else 0.0,
        logits=rows * unembedded * model.vocab_size / tensor * 4,
    )


def _attention(plan: Plan, sizes: _Sizes, backwards: bool) -> float:
    """Of one layer: copies of queries, keys, values and results, r L D/t each and padded by splash;
    scores, r N/t L^2, float32 and backwards in the compute type as well; cuDNN's bias, r L^2."""
    model, tensor = plan.policy.config, plan.mesh.shape['tensor']
    itemsize = jnp.dtype(model.dtype).itemsize
    rows, length, heads = sizes.rows, sizes.length, sizes.hidden / tensor
    match plan.attention:
        case 'splash':
            # Where heads are split, products overlap with the sums over them, a piece at a time.
            copies = 10 if backwards else 7 if tensor == 1 else 16
            return copies * heads * padded_length(length) / length
        case 'cudnn':  # the mask, and the bias made of it
            return 6 * heads + rows * length**2 * (1 + itemsize)
    scores = rows * model.heads / tensor * length**2
    return scores * (4 + itemsize) if backwards else scores * 4 + 6 * heads

"""Memory of a chip, by part: exact for what stays, and an estimate for what comes and goes.

The compiler knows better what comes and goes, but only for TPUs and only in minutes. The estimate
takes no time and serves every chip; `plan` prints how far it is from the compiler.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from spg_jax import sharding
from spg_jax.config import generation_batch
from spg_jax.models.lora import COLLECTION
from spg_jax.models.splash import padded_length
from spg_jax.planning.programs import Plan, evaluation_rows
from spg_jax.train_state import TrainState


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

    - tables: embedding and unembedding whole along 'embed', 2 V/t D, unless f is 1;
    - casts: the adapters in the type of products, which the compiler takes out of the loops;
    - attention: scores, r N/t L^2, float32, and backwards in the compute type as well; or, where a
      kernel holds none, copies of queries, keys, values and results;
    - layer: what else a layer has at once, r L D twice, and backwards r L (4 D + 3 F/t);
    - logits: r V/t for every position unembedded at once, float32;
    - saved (update): the inputs of all layers, r L D each, kept for the backward pass;
    - gradients (update): of what is trained, the sum so far and the next term.

    The factors are what the compiler for TPUs was seen to need.
    """
    config, model = plan.config, plan.policy.config
    tensor = plan.mesh.shape['tensor']
    itemsize = jnp.dtype(model.dtype).itemsize
    update = name == 'update'
    if update:
        draws = config.rl.draws_per_pass or config.corruption.draws
        rows = config.rl.microbatch * draws
        completion = unembedded = config.sampling.length
    elif name == 'rollout':
        rows = generation_batch(config)
        completion, unembedded = config.sampling.length, config.sampling.block_length
    else:
        rows = evaluation_rows(plan)
        completion, unembedded = max(config.evaluation.lengths), config.evaluation.block_length
    rows /= sharding.row_shards(plan.mesh)
    length = config.sampling.prompt_length + completion
    hidden = rows * length * model.width * itemsize
    widest = 4 * hidden + 3 * rows * length * model.mlp_width / tensor * itemsize
    attention = _attention(plan, rows, length, backwards=update)
    tables = 2 * model.vocab_size / tensor * model.width * itemsize
    parts = {
        'tables': tables if plan.mesh.shape['fsdp'] > 1 else 0.0,
        'casts': local_bytes(plan.state.trained) * itemsize / 4 if model.lora else 0.0,
        'attention': attention,
        'layer': widest if update else 2 * hidden,
        'logits': rows * unembedded * model.vocab_size / tensor * 4,
    }
    if update:
        kept = hidden if model.remat else 2 * widest + attention
        parts['saved'] = model.layers * kept
        parts['gradients'] = 2 * local_bytes(plan.state.trained)
    return parts


def _attention(plan: Plan, rows: float, length: int, backwards: bool) -> float:
    """Bytes of a chip that attention of one layer has at once, on `rows` of them."""
    model, tensor = plan.policy.config, plan.mesh.shape['tensor']
    itemsize = jnp.dtype(model.dtype).itemsize
    heads = rows * model.width / tensor * itemsize
    match plan.attention:
        case 'splash':
            return 10 * heads * padded_length(length)
        case 'cudnn':  # which makes a bias of the mask
            return 4 * heads * length + rows * length**2 * (1 + itemsize)
    return rows * model.heads / tensor * length**2 * (4 + itemsize if backwards else 4)

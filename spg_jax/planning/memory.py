"""The memory of a chip by part: exact for arrays that stay, estimated for arrays of a program.

The compiler measures the memory of a program better, but it exists for TPUs only and takes minutes.
The estimate takes no time and works for every chip; `plan` prints how far it is from the compiler.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spg_jax import sharding
from spg_jax.models.lora import COLLECTION
from spg_jax.models.splash import padded_length
from spg_jax.planning.programs import FINE_TUNING, Plan
from spg_jax.rl.gradient import rows_together
from spg_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Resident:
    """The bytes that a chip holds throughout a run."""

    weights: int  # parameters of the model, frozen or trained
    adapters: int
    optimizer: int  # moments of the trained parameters
    kept: int = 0  # policies that the objective keeps beside the trained one, or its average

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.optimizer + self.kept


def resident(state: TrainState) -> Resident:
    """The bytes that stay on a chip, computed from the shardings of a train state."""
    variables = state.variables
    return Resident(
        weights=local_bytes(variables['params']),
        adapters=local_bytes(variables.get(COLLECTION, {})),
        optimizer=local_bytes(state.opt_state),
        kept=local_bytes(state.kept) + local_bytes(state.average),
    )


def local_bytes(tree: Any) -> int:
    """The bytes of the shards that a chip holds of a tree of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def _bits(dtype: jnp.dtype) -> int:
    """The bits of an element in the memory of a chip, where two elements of 4 bits share a byte."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def estimate(plan: Plan, name: str) -> dict[str, float]:
    """The bytes that a program needs on a chip beside those that stay, by part.

    A chip has r rows of length L; f is the size of 'fsdp' and t that of 'tensor'.

    - casts: the adapters in the type of products, because the compiler converts them before loops;
    - tables: embedding and unembedding whole along 'embed', 2 V/t D elements, unless f is 1;
    - logits: r V/t in float32 for every position that is unembedded at once, which are few where
      the readout takes pieces of the completion (`scores.logit_pieces`);
    - attention: see `_attention`;
    - layer: the inputs and results of products. Decoding has r L D four times in a layer and twice
      while unembedding; an update has r L (4 D + 3 F/t);
    - experts: each of the k visits of a token has its own row, r L k (2 D + 3 F) elements for
      experts of width F, and the kernels of one layer's experts are gathered along 'embed';
    - saved (update): the inputs of all layers, r L D each, which are kept for the backward pass;
    - gradients (update): the sum so far and the next term, for all trained parameters. Where the
      draws of a microbatch are summed apart, that is a third sum.

    Fine-tuning is an update whose rows are all differentiated at once, and whose logits have a
    gradient as large as they are. The logits of a teacher are beside those of the policy.

    Decoding needs most either in a layer or while unembedding; an update has all parts at once. The
    factors are those that the compiler for TPUs was observed to need.
    """
    if name in ('update', FINE_TUNING):
        return _updating(plan)
    if name == 'arrival':
        return _reading(plan)
    decoding = plan.decoding(name)
    sizes = _sizes(plan, plan.rows(name), decoding.length, decoding.positions_read)
    in_a_layer = {
        'attention': _attention(plan, sizes, backwards=False),
        'layer': 4 * sizes.hidden,
        **_experts(plan, sizes),
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
    draws = 1 if plan.rollout is None else batching.draws_per_pass or plan.draws
    sizes = _readout_sizes(plan, plan.rows_at_once * draws)
    attention = _attention(plan, sizes, backwards=True)
    experts = _experts(plan, sizes)
    mlp_width = model.mlp_width
    if model.experts and not model.experts.dense_layers:
        mlp_width = model.experts.shared_width
    layer = (4 + 3 * mlp_width / plan.mesh.shape['tensor'] / model.width) * sizes.hidden
    kept = sizes.hidden if model.remat else 2 * layer + attention + sum(experts.values())
    return {
        'casts': sizes.casts,
        'tables': sizes.tables,
        'logits': sizes.logits * (2 if plan.rollout is None or plan.parts.objective.teacher else 1),
        'attention': attention,
        'layer': layer,
        **experts,
        'saved': model.layers * kept,
        'gradients': (3 if _sums_draws_apart(plan) else 2) * local_bytes(plan.state.trained),
    }


def _sums_draws_apart(plan: Plan) -> bool:
    """Whether an update first sums over the draws of a microbatch, and then over microbatches.

    It does where it takes both in turn, and a microbatch holds all that its loss couples.
    """
    if plan.rollout is None:
        return False
    batching, rows, at_once = plan.parts.batching, plan.rows_of_update, plan.rows_at_once
    couples = plan.parts.objective.couples
    whole = rows_together(couples, rows, at_once, batching.group_size) == at_once
    return whole and rows > at_once and 0 < batching.draws_per_pass < plan.draws


def _reading(plan: Plan) -> dict[str, float]:
    """The parts of 'arrival': a forward pass of a piece, and the readouts of all."""
    batching = plan.parts.batching
    draws = batching.draws_per_pass or plan.parts.objective.draws
    sizes = _readout_sizes(plan, batching.microbatch * draws)
    return {
        'casts': sizes.casts,
        'tables': sizes.tables,
        'logits': sizes.logits,
        'attention': _attention(plan, sizes, backwards=False),
        'layer': 4 * sizes.hidden,
        **_experts(plan, sizes),
        'readouts': local_bytes(plan.rollout.extras),
    }


class _Sizes(NamedTuple):
    """Sizes on one chip; all but the first two are in bytes."""

    rows: float  # r
    length: int  # L
    hidden: float  # [r, L, D]
    casts: float  # these three as in `estimate`
    tables: float
    logits: float


def _sizes(plan: Plan, rows: int, completion: int, unembedded: int) -> _Sizes:
    """Sizes for `rows` over all chips, of which each has `completion` tokens.

    `unembedded` is the number of positions of a row that are unembedded at once.
    """
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


def _experts(plan: Plan, sizes: _Sizes) -> dict[str, float]:
    """The bytes of the experts of one layer; no part for a model without experts."""
    model, experts = plan.policy.config, plan.policy.config.experts
    if not experts:
        return {}
    itemsize = jnp.dtype(model.dtype).itemsize
    visits = sizes.rows * sizes.length * experts.chosen
    rows = visits * (2 * model.width + 3 * experts.width) * itemsize
    local_count = experts.count / plan.mesh.shape['tensor']
    gathered = 3 * local_count * model.width * experts.width * itemsize
    return {'experts': rows + (gathered if plan.mesh.shape['fsdp'] > 1 else 0.0)}


def _readout_sizes(plan: Plan, rows: int) -> _Sizes:
    """Sizes where `rows` corrupted completions are read out at once, over all chips."""
    length = plan.parts.sampling.length
    return _sizes(plan, rows, length, length // plan.logit_pieces(rows))


def _attention(plan: Plan, sizes: _Sizes, backwards: bool) -> float:
    """The bytes of the attention of one layer.

    They are copies of queries, keys, values and results, r L D/t each, whose length splash pads;
    scores, r N/t L^2, in float32 and for the backward pass also in the compute type; and with cuDNN
    a mask and a bias, r L^2 each.
    """
    model, tensor = plan.policy.config, plan.mesh.shape['tensor']
    itemsize = jnp.dtype(model.dtype).itemsize
    rows, length, heads = sizes.rows, sizes.length, sizes.hidden / tensor
    match plan.attention:
        case 'splash':
            # Where heads are split, products overlap piece by piece with the sums over heads.
            copies = 10 if backwards else 7 if tensor == 1 else 16
            return copies * heads * padded_length(length) / length
        case 'cudnn':  # The bias is made of the mask, and both exist at once.
            return 6 * heads + rows * length**2 * (1 + itemsize)
    scores = rows * model.heads / tensor * length**2
    return scores * (4 + itemsize) if backwards else scores * 4 + 6 * heads

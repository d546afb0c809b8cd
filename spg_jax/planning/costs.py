"""Arithmetic and memory traffic of the programs, by formula, over all chips.

A product [n, i] x [i, o] costs 2 n i o FLOPs. What a row of length L costs is then

    products    2 L (parameters of the layers' kernels and adapters)
    attention   4 L^2 D: scores, and the mix of values, in each layer
    unembedding 2 D V for each position unembedded

forwards. Backwards, attention costs a multiple of that; a product as much again for its input, and
again for its kernel where that is trained. Norms, softmax and the like are left out.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from spg_jax import sharding
from spg_jax.models.attention import FUSED
from spg_jax.models.transformer import TransformerConfig
from spg_jax.planning.programs import Plan

# Cost of attention backwards in units of forwards, which is two products. Fused kernels compute the
# scores again; splash does in two kernels what cuDNN does in one.
_ATTENTION_BACKWARDS = {'einsum': 2.0, 'folded': 2.0, 'cudnn': 2.5, 'splash': 3.5}


class Work(NamedTuple):
    """Of all chips together."""

    flops: float
    bytes: float  # to and from memory


class _Pass(NamedTuple):
    """One forward pass of one row."""

    kernels: float  # FLOPs of frozen products
    adapters: float
    attention: float
    unembedding: float
    last: float  # of the kernels, the last product of each layer: nothing needs its recomputation

    @property
    def total(self) -> float:
        return self.kernels + self.adapters + self.attention + self.unembedding


def work(plan: Plan, name: str) -> Work:
    """What a program costs if no row ends early."""
    rows, passes, length = _passes(plan, name)
    if name == 'update':
        unembedded = plan.parts.sampling.length
        flops = _update_flops(plan)
    else:
        unembedded = plan.decoding(name).block_length
        flops = passes * rows * forward(plan.policy.config, length, unembedded).total
    return Work(flops, passes * _traffic(plan, rows, length, unembedded))


def forward(model: TransformerConfig, length: int, unembedded: int) -> _Pass:
    """FLOPs of one row's forward pass.

    Args:
      model: sizes.
      length: L.
      unembedded: positions whose logits are wanted.
    """
    kernels = _kernels(model)
    adapters = {}
    if model.lora:
        rank = model.lora.rank
        adapters = {name: rank * sum(kernels[name]) for name in model.lora.targets}
    return _Pass(
        kernels=2 * length * model.layers * sum(i * o for i, o in kernels.values()),
        adapters=2 * length * model.layers * sum(adapters.values()),
        attention=4 * length**2 * model.width * model.layers,
        unembedding=2 * model.width * model.vocab_size * unembedded,
        last=2 * length * model.layers * math.prod(kernels['down']),
    )


def expected_received(plan: Plan, name: str) -> float:
    """Bytes a chip receives, where no compiler tells: kernels gathered over 'fsdp' in every pass
    over a layer, and over 'tensor' two sums of activations a layer in every pass."""
    model = plan.policy.config
    fsdp, tensor = plan.mesh.shape['fsdp'], plan.mesh.shape['tensor']
    itemsize = jnp.dtype(model.dtype).itemsize
    kernels = model.layers * sum(i * o for i, o in _kernels(model).values()) * itemsize
    gathered = kernels / tensor * (fsdp - 1) / fsdp
    rows, passes, length = _passes(plan, name)
    hidden = rows / sharding.row_shards(plan.mesh) * length * model.width * itemsize
    summed = 2 * model.layers * hidden * 2 * (tensor - 1) / tensor
    return passes * (gathered + summed)


def _passes(plan: Plan, name: str) -> tuple[float, float, int]:
    """Rows a pass over the layers, forwards or backwards; passes; positions of a row."""
    batching, length = plan.parts.batching, plan.prompt_length + plan.parts.sampling.length
    if name != 'update':
        decoding = plan.decoding(name)
        guided = 2 if decoding.guidance else 1
        return plan.rows(name), guided * decoding.steps, plan.prompt_length + decoding.length
    draws = plan.parts.objective.corruption.draws
    at_once = batching.draws_per_pass or draws
    passes = batching.rows // batching.microbatch * (draws // at_once)
    # Forwards, forwards again where layers are recomputed, backwards; before them, where draws are
    # taken some at a time, forwards for all log-probabilities.
    kinds = 2 + plan.policy.config.remat + (at_once < draws)
    return batching.microbatch * at_once, passes * kinds, length


def _update_flops(plan: Plan) -> float:
    """Forwards, recomputation and backwards of every row and draw.

    Taking some draws at a time (`rl.draws_per_pass`) costs one more forward pass of each.
    """
    parts, model = plan.parts, plan.policy.config
    draws, length = parts.objective.corruption.draws, parts.sampling.length
    rows = parts.batching.rows * draws
    one = forward(model, plan.prompt_length + length, length)
    twice = 0 < parts.batching.draws_per_pass < draws
    again = model.remat * (one.total - one.unembedding - one.last)
    trained = one.adapters if model.lora else one.kernels + one.unembedding
    scores = _ATTENTION_BACKWARDS[plan.attention] * one.attention
    backwards = one.total - one.attention + scores + trained
    return rows * ((1 + twice) * one.total + again + backwards)


def _traffic(plan: Plan, rows: float, length: int, unembedded: int) -> float:
    """Bytes of a forward pass: every product reads its operands and writes its result once.

    A pass backwards moves about as much, as long as kernels are frozen. Every chip reads the
    kernels of its 'tensor' shard, whatever 'fsdp' is, for its own rows. Attention that is not fused
    reads and writes its scores once in float32.
    """
    model = plan.policy.config
    itemsize = jnp.dtype(model.dtype).itemsize
    kernels = _kernels(model)
    parameters = model.layers * sum(i * o for i, o in kernels.values())
    parameters += model.width * model.vocab_size
    products = rows * length * model.layers * sum(i + o for i, o in kernels.values()) * itemsize
    scores = rows * model.layers * model.heads * length**2 * 4 * 2
    if plan.attention in FUSED:
        scores = 0
    logits = rows * unembedded * model.vocab_size * 4 * 2
    return sharding.row_shards(plan.mesh) * parameters * itemsize + products + scores + logits


def _kernels(model: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the products of a layer."""
    width, mlp = model.width, model.mlp_width
    keys = model.kv_heads * model.head_dim
    return {
        'query': (width, width),
        'key': (width, keys),
        'value': (width, keys),
        'attention_out': (width, width),
        'gate': (width, mlp),
        'up': (width, mlp),
        'down': (mlp, width),
    }

"""The arithmetic and memory traffic of the programs by formula, for all chips together.

A product [n, i] x [i, o] costs 2 n i o FLOPs. The forward pass of a row of length L therefore costs

    products    2 L (parameters of the layers' kernels and adapters; of experts those visited)
    attention   4 L^2 N H: scores, and the mix of values, in each layer
    unembedding 2 D V for each position unembedded

Where a pass reads a window of the row, the last layer computes keys and values for all positions,
and everything else for those of the window.

In the backward pass attention costs a multiple of that. A product costs the same again for the
gradient of its input, and once more for that of its kernel if the kernel is trained. Norms, softmax
and other small costs are left out.
"""

from typing import NamedTuple

import jax.numpy as jnp

from spg_jax import sharding
from spg_jax.diffusion.prompt_grid import on_prompt_grid
from spg_jax.models.attention import FUSED as FUSED_ATTENTION
from spg_jax.models.lora import FUSED, SHARED
from spg_jax.models.transformer import TransformerConfig
from spg_jax.planning.programs import FINE_TUNING, Plan
from spg_jax.planning.sequences import draws_at_arrival
from spg_jax.rl.gradient import rows_together

# The cost of attention in the backward pass, in units of the forward pass, which is two products.
# Fused kernels compute the scores again, once in cuDNN and twice in splash, which has two kernels.
EXPERT = 'expert_down'  # name of the last kernel of experts
_ATTENTION_BACKWARDS = {'einsum': 2.0, 'folded': 2.0, 'cudnn': 2.5, 'splash': 3.5}


class Work(NamedTuple):
    """The work of a program on all chips together."""

    flops: float
    bytes: float  # moved between chips and their memory


class _Pass(NamedTuple):
    """The FLOPs of the forward pass of one row."""

    kernels: float  # products with the kernels of the layers
    adapters: float
    attention: float
    unembedding: float
    last: float  # the part of `kernels` that is never recomputed: the last product of each layer

    @property
    def total(self) -> float:
        return self.kernels + self.adapters + self.attention + self.unembedding


def work(plan: Plan, name: str) -> Work:
    """The work of a program if no row ends early."""
    rows, passes, length = _passes(plan, name)
    if name in ('update', 'arrival', FINE_TUNING):
        unembedded = plan.parts.sampling.length
        flops = _arrival_flops(plan) if name == 'arrival' else _update_flops(plan)
    else:
        unembedded = plan.decoding(name).positions_read
        windowed = not plan.decoding(name).cache
        flops = passes * rows * forward(plan.policy.config, length, unembedded, windowed).total
    return Work(flops, passes * _traffic(plan, rows, length, unembedded))


def forward(
    model: TransformerConfig, length: int, unembedded: int, windowed: bool = False
) -> _Pass:
    """The FLOPs of the forward pass of one row.

    Args:
      model: the sizes of the model.
      length: L.
      unembedded: the number of positions whose logits are computed.
      windowed: whether the last layer has outputs at these positions only.
    """
    kernels, rank = kernels_of(model), model.lora.rank if model.lora else 0
    outside = length - unembedded if windowed else 0
    # The kernels that read all positions in the last layer, or are in earlier layers only.
    everywhere = {'key', 'value', FUSED}
    if model.experts:
        everywhere |= {'gate', 'up', 'down'}

    def visits(kernel: Kernel) -> int:
        """The positions that the kernels of this name multiply, over all layers."""
        return length * kernel.layers - outside * (kernel.name not in everywhere)

    def products(kernels: list[Kernel]) -> int:
        return sum(2 * visits(kernel) * kernel.visited // kernel.layers for kernel in kernels)

    adapted = [
        kernel
        for kernel in kernels
        if model.lora and kernel.name in model.adapted_kernels and model.lora.adapts(kernel.name)
    ]
    last = [kernel for kernel in kernels if kernel.name.removeprefix(SHARED) in ('down', EXPERT)]
    queries = length * model.layers - outside
    return _Pass(
        kernels=products(kernels),
        adapters=sum(2 * visits(each) * rank * (each.fan_in + each.fan_out) for each in adapted),
        attention=4 * queries * length * model.heads * model.head_dim,
        unembedding=2 * model.width * model.vocab_size * unembedded,
        last=products(last),
    )


def expected_received(plan: Plan, name: str) -> float:
    """The bytes that each chip receives, by formula, for chips whose compiler is not here.

    In every pass over a layer its kernels are gathered over 'fsdp', and two arrays of activations
    (with experts and an MLP beside them three) are summed over 'tensor'.
    """
    model = plan.policy.config
    fsdp, tensor = plan.mesh.shape['fsdp'], plan.mesh.shape['tensor']
    itemsize = jnp.dtype(model.dtype).itemsize
    kernels = sum(kernel.stored for kernel in kernels_of(model)) * itemsize
    gathered = kernels / tensor * (fsdp - 1) / fsdp
    rows, passes, length = _passes(plan, name)
    hidden = rows / sharding.row_shards(plan.mesh) * length * model.width * itemsize
    sums = 2 * model.layers
    if model.experts and model.experts.shared_width:
        sums += model.layers - model.experts.dense_layers
    summed = sums * hidden * 2 * (tensor - 1) / tensor
    return passes * (gathered + summed)


def _passes(plan: Plan, name: str) -> tuple[float, float, int]:
    """(rows in a pass over the layers, passes forwards and backwards, positions of a row)."""
    batching, length = plan.parts.batching, plan.prompt_length + plan.parts.sampling.length
    if name == 'arrival':
        return batching.microbatch, arrival_readouts(plan) / batching.microbatch, length
    if name not in ('update', FINE_TUNING):
        decoding = plan.decoding(name)
        if plan.policy.config.visible_block > 1:  # A prompt may end within a block of the model.
            decoding = on_prompt_grid(decoding)
        guided = 2 if decoding.guidance else 1
        return plan.rows(name), guided * decoding.steps, plan.prompt_length + decoding.length
    draws = plan.draws
    at_once = draws if plan.rollout is None else batching.draws_per_pass or draws
    passes = plan.rows_of_update // plan.rows_at_once * (draws // at_once)
    # There is a forward and a backward pass. Recomputation adds a forward pass; so does taking
    # pieces, which first needs the readouts of all, and each policy that is looked at.
    kinds = 2 + plan.policy.config.remat + _in_pieces(plan) + _looks(plan)
    return plan.rows_at_once * at_once, passes * kinds, length


def _update_flops(plan: Plan) -> float:
    """The FLOPs of forward pass, recomputation and backward pass, over all rows and draws.

    Taking pieces of what a loss couples costs one more forward pass of every draw, and so does each
    policy that is looked at.
    """
    parts, model = plan.parts, plan.policy.config
    length, batching = parts.sampling.length, parts.batching
    rows = plan.rows_of_update * plan.draws
    row = forward(model, plan.prompt_length + length, length, model.cheap_window_gradient)
    forwards = 1 + _in_pieces(plan) + _looks(plan)
    recomputed = model.remat * (row.total - row.unembedding - row.last)
    if plan.logit_pieces(plan.rows_at_once * (batching.draws_per_pass or plan.draws)) > 1:
        recomputed += row.unembedding
    trained = row.adapters if model.lora else row.kernels + row.unembedding
    attention = _ATTENTION_BACKWARDS[plan.attention] * row.attention
    backwards = row.total - row.attention + attention + trained
    return rows * (forwards * row.total + recomputed + backwards)


def _in_pieces(plan: Plan) -> bool:
    """Whether an update first reads out all that its loss couples, and differentiates then."""
    if plan.rollout is None:
        return False
    objective, batching = plan.parts.objective, plan.parts.batching
    whole = rows_together(
        objective.couples, plan.rows_of_update, plan.rows_at_once, batching.group_size
    )
    return 0 < batching.draws_per_pass < objective.draws or whole > plan.rows_at_once


def _looks(plan: Plan) -> int:
    """The forward passes of other policies at each draw of an update.

    A teacher is read out with every readout of the policy that is trained.
    """
    if plan.rollout is None:
        return 0
    objective = plan.parts.objective
    return len(objective.looks_at) + (1 + _in_pieces(plan) if objective.teacher else 0)


def arrival_readouts(plan: Plan) -> int:
    """The draws that are read out when a rollout arrives, over all rows."""
    return plan.parts.batching.rows * draws_at_arrival(plan.parts)


def _arrival_flops(plan: Plan) -> float:
    length = plan.parts.sampling.length
    model = plan.policy.config
    row = forward(model, plan.prompt_length + length, length, model.cheap_window_gradient)
    return arrival_readouts(plan) * row.total


def _traffic(plan: Plan, rows: float, length: int, unembedded: int) -> float:
    """The bytes of a forward pass: every product reads its operands and writes its result once.

    A backward pass moves about as many bytes while the kernels are frozen. Every chip reads the
    kernels of its 'tensor' shard for its rows, whatever the size of 'fsdp'. Attention that is not
    fused reads and writes its scores once in float32.
    """
    model = plan.policy.config
    itemsize = jnp.dtype(model.dtype).itemsize
    kernels = kernels_of(model)
    parameters = sum(kernel.stored for kernel in kernels)
    parameters += model.width * model.vocab_size
    moved = sum(
        kernel.layers * kernel.visits * (kernel.fan_in + kernel.fan_out) for kernel in kernels
    )
    products = rows * length * moved * itemsize
    scores = rows * model.layers * model.heads * length**2 * 4 * 2
    if plan.attention in FUSED_ATTENTION:
        scores = 0
    logits = rows * unembedded * model.vocab_size * 4 * 2
    return sharding.row_shards(plan.mesh) * parameters * itemsize + products + scores + logits


class Kernel(NamedTuple):
    """The kernels of one name."""

    name: str
    fan_in: int
    fan_out: int
    layers: int  # that have such a kernel
    visits: int = 1  # kernels of a layer that each token is multiplied with
    copies: int = 1  # kernels of a layer

    @property
    def visited(self) -> int:
        """The parameters that each token is multiplied with, in all layers."""
        return self.layers * self.visits * self.fan_in * self.fan_out

    @property
    def stored(self) -> int:
        """The parameters in all layers."""
        return self.layers * self.copies * self.fan_in * self.fan_out


def kernels_of(model: TransformerConfig) -> list[Kernel]:
    """The kernels of all layers."""
    width, mlp, layers = model.width, model.mlp_width, model.layers
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if model.fused_qkv:
        kernels = [Kernel(FUSED, width, queries + 2 * keys, layers)]
    else:
        outputs = {'query': queries, 'key': keys, 'value': keys}
        kernels = [Kernel(name, width, output, layers) for name, output in outputs.items()]
    kernels.append(Kernel('attention_out', queries, width, layers))

    def gated(prefix: str, width_of_mlp: int, layers: int) -> list[Kernel]:
        return [
            Kernel(f'{prefix}gate', width, width_of_mlp, layers),
            Kernel(f'{prefix}up', width, width_of_mlp, layers),
            Kernel(f'{prefix}down', width_of_mlp, width, layers),
        ]

    if not model.experts:
        return kernels + gated('', mlp, layers)
    experts, dense = model.experts, model.experts.dense_layers
    sparse, visits, copies = layers - dense, experts.chosen, experts.count
    kernels += [
        Kernel('router', width, copies, sparse),
        Kernel('expert_in', width, 2 * experts.width, sparse, visits, copies),
        Kernel(EXPERT, experts.width, width, sparse, visits, copies),
    ]
    if experts.shared_width:
        kernels += gated(SHARED, experts.shared_width, sparse)
    return kernels + (gated('', mlp, dense) if dense else [])

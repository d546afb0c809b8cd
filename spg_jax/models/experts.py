"""A mixture of experts: each token visits a few of many small gated MLPs, which a router chooses.

Tokens are sorted by expert and multiplied group by group, so that the largest array has one row for
each visit of a token, [visits, D], and none has an axis of tokens beside one of experts and one of
widths. Kernels have the logical axis 'experts', along which `spg_jax.sharding` splits them.

A comment such as `# [T, k]` after an assignment is the shape of the value: `T` tokens, `k` experts
that a token visits, `E` experts, `D` width, `F` width of an expert, `R` = T k visits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from spg_jax.errors import check_one_of
from spg_jax.models import quantized
from spg_jax.models.layers import normal, swiglu
from spg_jax.sharding import AXES, ROWS, RULES, row_shards

SCORES = ('softmax', 'sigmoid')
BIASES = ('', 'selection', 'weight')
MOST_EXPERTS = 10**5  # more are taken for a mistake
TILE = 64  # rows that one product of `_tiled_product` multiplies


@dataclasses.dataclass(frozen=True)
class Experts:
    """The sizes of a mixture of experts and the rule of its router.

    Raises:
      ValueError: from the constructor, for an impossible value; it says what to use instead.
    """

    count: int  # E
    chosen: int  # k, the experts that a token visits
    width: int  # F
    shared_width: int = 0  # of a gated MLP that every token visits as well; 0 is none
    dense_layers: int = 0  # layers before the first one with experts; they have a plain MLP
    groups: int = 1  # neighbouring experts form a group
    chosen_groups: int = 1  # groups that a token may choose experts from
    score: str = 'softmax'  # of the router's products: over all experts, or of each by itself
    bias: str = ''  # where each expert has a bias: in the 'selection' only, or in the 'weight' too
    normalise: bool = False  # whether the weights of the chosen experts are divided by their sum
    scale: float = 1.0  # factor of all weights
    float32_router: bool = True  # whether the router computes in float32, whatever the dtype

    def __post_init__(self) -> None:
        for name in ('count', 'chosen', 'width', 'groups', 'chosen_groups'):
            if not 1 <= getattr(self, name) <= (10**8 if name == 'width' else MOST_EXPERTS):
                raise ValueError(f'experts.{name} is {getattr(self, name)}; use a positive integer')
        for name in ('shared_width', 'dense_layers'):
            if getattr(self, name) < 0:
                raise ValueError(f'experts.{name} is {getattr(self, name)}; use 0 or more')
        if self.count % self.groups or self.chosen_groups > self.groups:
            raise ValueError(
                f'{self.count} experts in {self.groups} groups, of which {self.chosen_groups} are '
                'chosen; use groups of equal size and at most all of them'
            )
        eligible = self.count // self.groups * self.chosen_groups
        if self.chosen > eligible:
            raise ValueError(
                f'{self.chosen} experts per token of {eligible} that a token may choose; use fewer'
            )
        if self.groups > 1 and self.count // self.groups < 2:
            raise ValueError(
                f'{self.groups} groups of one expert each; a group is scored by its two best '
                'experts, so use groups of two or more'
            )
        check_one_of('experts.score', self.score, SCORES)
        check_one_of('experts.bias', self.bias, BIASES)
        if not 0 < self.scale < float('inf'):
            raise ValueError(f'experts.scale is {self.scale}; use a positive number')


def route(logits: Array, bias: Array | None, experts: Experts) -> tuple[Array, Array]:
    """The experts that each token visits, and their weights.

    The router of LLaDA2 (arXiv 2512.15745) has score 'sigmoid' and a bias in the selection only; a
    group of experts is as good as the sum of its two best. That of LLaDA-MoE has score 'softmax'.

    Args:
      logits: [T, E] float32, products of the tokens with the router.
      bias: [E] float32, or None.
      experts: the rule.

    Returns:
      (index [T, k] int32, in descending order of what selects; weight [T, k] float32).
    """
    if experts.score == 'sigmoid':
        score = jax.nn.sigmoid(logits)  # [T, E]
    else:
        score = jax.nn.softmax(logits, axis=-1)
    selection = score
    if bias is not None:
        selection = score + jax.lax.stop_gradient(bias)[None, :]
        if experts.bias == 'weight':
            score = selection
    if experts.groups > 1:
        groups = selection.reshape(-1, experts.groups, experts.count // experts.groups)
        quality = jax.lax.top_k(groups, 2)[0].sum(-1)  # [T, groups]
        best = jax.lax.top_k(quality, experts.chosen_groups)[1]  # [T, chosen_groups]
        is_best = (best[:, :, None] == jnp.arange(experts.groups)[None, None, :]).any(1)
        # Unselected groups are -inf and not 0, because sums of scores and biases can be negative.
        selection = jnp.where(is_best[:, :, None], groups, -jnp.inf).reshape(selection.shape)
    index = jax.lax.top_k(selection, experts.chosen)[1]  # [T, k]
    weight = jnp.take_along_axis(score, index, axis=-1)  # [T, k]
    if experts.normalise:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return index, weight * experts.scale


class RoutedExperts(nn.Module):
    """The sum of what the chosen experts make of each token, weighted by the router."""

    experts: Experts
    gain: float  # of the last kernel, as in `Linear`
    dtype: str = 'float32'
    param_dtype: str = 'float32'
    quantize: str = ''

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D] in the compute dtype."""
        experts, D = self.experts, x.shape[-1]
        E, F = experts.count, experts.width
        router = self.param('router', normal(D**-0.5, 'embed', None), (D, E), self.param_dtype)
        bias = None
        if experts.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
            bias = self.param('bias', zeros, (E,), self.param_dtype).astype(jnp.float32)
        kernels = (
            self._kernel('gate', (E, D, F), ('experts', 'embed', 'expert_mlp'), 1.0),
            self._kernel('up', (E, D, F), ('experts', 'embed', 'expert_mlp'), 1.0),
            self._kernel('down', (E, F, D), ('experts', 'expert_mlp', 'embed'), self.gain),
        )
        tokens = x.reshape(-1, D)  # [T, D]
        router_dtype = jnp.float32 if experts.float32_router else self.dtype
        logits = jnp.matmul(tokens.astype(router_dtype), router.astype(router_dtype))  # [T, E]
        index, weight = route(logits.astype(jnp.float32), bias, experts)
        self.sow('intermediates', 'router', (logits, index, weight))
        visit = (index.reshape(*x.shape[:-1], -1), weight.reshape(*x.shape[:-1], -1))
        if self.quantize:
            # The backward pass dequantises the kernels again, as in `quantized_product`.
            visit_all = jax.checkpoint(split_over_mesh, prevent_cse=False, static_argnums=4)
        else:
            visit_all = split_over_mesh
        return visit_all(x, *visit, kernels, self.dtype)

    def _kernel(
        self, name: str, shape: tuple[int, int, int], axes: tuple[str, str, str], gain: float
    ) -> Any:
        std = gain * shape[1] ** -0.5
        if self.quantize:
            init = quantized.initializer(std, axes, self.quantize)
        else:
            init = normal(std, *axes)
        return self.param(name, init, shape, self.param_dtype)


def split_over_mesh(x: Array, index: Array, weight: Array, kernels: Any, dtype: str) -> Array:
    """`visit_experts`, with rows and experts split over the mesh by hand.

    Each device multiplies its rows with its experts, and the results are summed over the mesh axis
    that splits experts. The compiler cannot split groups whose sizes it does not know.

    Args:
      x: [B, L, D].
      index: [B, L, k] int32, the experts of each token.
      weight: [B, L, k] float32.
      kernels: gate and up [E, D, F] and down [E, F, D], plain or quantised.
      dtype: the compute dtype.
    """
    kernels = jax.tree.map(
        lambda kernel: _plain(kernel, dtype), kernels, is_leaf=quantized.is_quantized
    )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or set(AXES) - set(mesh.shape) or AxisType.Manual in mesh.axis_types:
        return visit_experts(x, index, weight, kernels)
    # As in `sharding.constrain`, rows that the mesh does not divide stay whole: Flax initialises
    # parameters on a batch of one row.
    rows = ROWS if len(x) % row_shards(mesh) == 0 else None
    axis = RULES['experts']

    def on_one_device(x: Array, index: Array, weight: Array, kernels: Any) -> Array:
        local_count = len(kernels[0])
        local_index = index - jax.lax.axis_index(axis) * local_count
        return jax.lax.psum(visit_experts(x, local_index, weight, kernels), axis)

    return jax.shard_map(
        on_one_device,
        in_specs=(P(rows), P(rows), P(rows), P(axis)),
        out_specs=P(rows),
        check_vma=False,
    )(x, index, weight, kernels)


def _plain(kernel: Any, dtype: str) -> Array:
    """A kernel [E, in, out] in the compute dtype."""
    if quantized.is_quantized(kernel):
        return jax.vmap(quantized.dequantize)(kernel).astype(dtype)
    return kernel.astype(dtype)


def visit_experts(
    x: Array, index: Array, weight: Array, kernels: tuple[Array, Array, Array]
) -> Array:
    """sum_e weight_e down_e(silu(gate_e x) * up_e x) of each token, over its experts that are here.

    Args:
      x: [B, L, D].
      index: [B, L, k] int32; experts outside [0, E) are on other devices and add nothing here.
      weight: [B, L, k] float32.
      kernels: gate and up [E, D, F] and down [E, F, D], in the dtype of x.

    Returns:
      [B, L, D] in the dtype of x.
    """
    gate, up, down = kernels
    E, D, k = gate.shape[0], x.shape[-1], index.shape[-1]
    expert = index.reshape(-1)  # [R]
    is_here = (expert >= 0) & (expert < E)
    expert = jnp.where(is_here, expert, E)  # Visits of other devices are sorted to the end.
    order = jnp.argsort(expert, stable=True)  # [R]
    sizes = jnp.bincount(expert, length=E + 1)[:E]  # [E], visits of each expert
    visits = x.reshape(-1, D)[order // k]  # [R, D]
    hidden = swiglu(  # [R, F]
        grouped_product(visits, gate, sizes), grouped_product(visits, up, sizes)
    )
    out = grouped_product(hidden, down, sizes)  # [R, D]
    # Rows beyond the groups may hold anything, even NaN, so they are replaced and not multiplied.
    weight = weight.reshape(-1)[order]  # [R]
    out = jnp.where(is_here[order][:, None], out.astype(jnp.float32) * weight[:, None], 0.0)
    place = jnp.argsort(order)  # [R], where the visits of each token lie
    return out[place].reshape(-1, k, D).sum(1).reshape(x.shape).astype(x.dtype)


def grouped_product(x: Array, kernels: Array, sizes: Array) -> Array:
    """Rows [R, in], sorted by group, times the kernels [E, in, out] of their groups -> [R, out].

    Args:
      x: the rows.
      kernels: one for each group.
      sizes: [E] int32, the rows of each group; rows beyond their sum have an undefined result.
    """
    # Except on TPUs, the compiler would expand `ragged_dot` to products with an array of groups
    # times rows times widths.
    return jax.lax.platform_dependent(
        x, kernels, sizes, tpu=jax.lax.ragged_dot, default=_tiled_product
    )


def _tiled_product(x: Array, kernels: Array, sizes: Array) -> Array:
    """`grouped_product` as a loop over tiles of rows, each with the kernel of one group.

    Every group begins a new tile, so that there are at most R / TILE + E tiles.
    """
    R, E = len(x), len(kernels)
    tile = min(TILE, max(8, -(-R // E)))
    number = -(-R // tile) + E
    tiles_of_group = -(-sizes // tile)  # [E]
    first_tile = jnp.cumsum(tiles_of_group) - tiles_of_group  # [E]
    first_row = jnp.cumsum(sizes) - sizes  # [E]
    row = jnp.arange(R)
    group = jnp.searchsorted(jnp.cumsum(sizes), row, side='right')  # [R], E beyond the groups
    group = jnp.minimum(group, E - 1)
    place = first_tile[group] * tile + row - first_row[group]  # [R]
    beyond = row >= sizes.sum()
    padded = jnp.zeros((number * tile, x.shape[1]), x.dtype)
    padded = padded.at[jnp.where(beyond, number * tile, place)].set(x, mode='drop')
    group_of_tile = jnp.searchsorted(  # [number]
        jnp.cumsum(tiles_of_group), jnp.arange(number), side='right'
    )

    def multiply(_: None, item: tuple[Array, Array]) -> tuple[None, Array]:
        rows, group = item
        return None, rows @ jax.lax.dynamic_index_in_dim(kernels, group, keepdims=False)

    tiles = padded.reshape(number, tile, -1)
    _, out = jax.lax.scan(multiply, None, (tiles, jnp.minimum(group_of_tile, E - 1)))
    return out.reshape(number * tile, -1).at[place].get(mode='fill', fill_value=0)

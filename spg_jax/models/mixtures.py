"""Families with a mixture of experts: LLaDA2.0 and 2.1 (arXiv 2512.15745), and LLaDA-MoE.

Settings that the published classes ignore are not read: in LLaDA2 sigmoid scores, normalised
weights, the bias of the selection, a float32 router and the norms of queries and keys are always
on; in LLaDA-MoE weights are never normalised or scaled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from spg_jax.models.experts import Experts
from spg_jax.models.hf_layout import (
    LAYER,
    attention_entries,
    expert_entries,
    mlp_entries,
    norm_entries,
    shared_entries,
)
from spg_jax.models.lora import FUSED, SHARED
from spg_jax.models.published import (
    MATCHING_CONFIG,
    HFConfig,
    MLPWidth,
    SpecialIds,
    check_ids,
    check_overrides,
    check_plain,
    read_contents,
    rope_type,
    token_ids,
    transformer_config,
)
from spg_jax.models.transfer import Source, Table
from spg_jax.models.transformer import LIMITS, TransformerConfig
from spg_jax.process.json_files import check_json

MASK, MASK_ID = '<|mask|>', 156895  # of both families; their config.json has no mask_token_id
EOS_ID = 156892
LLADA2_BLOCK = 32  # positions in a block of LLaDA2's attention; config.json does not say it

_Count = Annotated[int, Meta(ge=1, le=10**5)]
_Number = Annotated[int, Meta(ge=0, le=LIMITS['layers'])]

_PLAIN_LLADA2: Mapping[str, tuple[Any, ...]] = {
    'hidden_act': ('silu',),
    'use_bias': (False,),
    'use_qkv_bias': (False,),
    'use_qk_norm': (True,),
    'use_rmsnorm': (True,),
    'norm_head': (False,),
    'norm_softmax': (False,),
    'score_function': ('sigmoid',),
    'moe_router_enable_expert_bias': (True,),
    'norm_topk_prob': (True,),
    'use_sliding_window': (False,),
    'using_split_qkv_in_self_attention': (False,),
    'rope_scaling': (None,),
}
_PLAIN_LLADA_MOE: Mapping[str, tuple[Any, ...]] = {
    'hidden_act': ('silu',),
    'attention_bias': (False,),
    'rope_scaling': (None,),
}


class _LLaDA2(HFConfig, kw_only=True):
    intermediate_size: MLPWidth
    moe_intermediate_size: MLPWidth
    num_experts: _Count
    num_experts_per_tok: _Count
    n_group: _Count
    topk_group: _Count
    routed_scaling_factor: Annotated[float, Meta(gt=0, le=10**6)]
    num_shared_experts: Annotated[int, Meta(ge=0, le=1000)] | None = 0
    first_k_dense_replace: _Number = 0
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)] = 1.0
    block_length: _Count | None = None  # ours, for models with other blocks


class _LLaDAMoE(HFConfig, kw_only=True):
    expert_intermediate_size: MLPWidth
    num_experts: _Count
    num_experts_per_tok: _Count
    dense_intermediate_size: MLPWidth | None = None
    shared_expert_intermediate_size: MLPWidth | None = None
    moe_layer_freq: int | list[int] | None = None
    moe_router_enable_expert_bias: bool | None = False
    qk_layernorm: bool | None = False
    clip_qkv: Annotated[float, Meta(gt=0, le=10**6)] | None = None
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)] = 1.0


def read_llada2(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """Reads config.json of LLaDA2.0 or 2.1; arguments and errors as `families.read_config`."""
    contents = read_contents(path)
    check_plain(path, contents, _PLAIN_LLADA2, 'LLaDA2')
    published = check_json(contents, _LLaDA2, path, MATCHING_CONFIG)
    shared_width = (published.num_shared_experts or 0) * published.moe_intermediate_size

    def own_fields() -> dict[str, Any]:
        return {
            'family': 'llada2',
            'mlp_width': published.intermediate_size,
            'fused_qkv': True,
            'qk_norm': True,
            'visible_block': published.block_length or LLADA2_BLOCK,
            'experts': Experts(
                count=published.num_experts,
                chosen=published.num_experts_per_tok,
                width=published.moe_intermediate_size,
                shared_width=shared_width,
                dense_layers=published.first_k_dense_replace,
                groups=published.n_group,
                chosen_groups=published.topk_group,
                score='sigmoid',
                bias='selection',
                normalise=True,
                scale=published.routed_scaling_factor,
            ),
        }

    return _finish(path, published, own_fields, published.partial_rotary_factor, overrides)


def read_llada_moe(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """Reads config.json of LLaDA-MoE; arguments and errors as `families.read_config`."""
    contents = read_contents(path)
    check_plain(path, contents, _PLAIN_LLADA_MOE, 'LLaDA-MoE')
    published = check_json(contents, _LLaDAMoE, path, MATCHING_CONFIG)

    def own_fields() -> dict[str, Any]:
        dense_layers = _dense_layers(published.moe_layer_freq, published.num_hidden_layers)
        width = published.expert_intermediate_size
        return {
            'family': 'llada_moe',
            'mlp_width': published.dense_intermediate_size or width,
            'qk_norm': bool(published.qk_layernorm),
            'clip_qkv': published.clip_qkv or 0.0,
            'experts': Experts(
                count=published.num_experts,
                chosen=published.num_experts_per_tok,
                width=width,
                shared_width=published.shared_expert_intermediate_size or 0,
                dense_layers=dense_layers,
                score='softmax',
                bias='weight' if published.moe_router_enable_expert_bias else '',
                float32_router=False,
            ),
        }

    return _finish(path, published, own_fields, published.partial_rotary_factor, overrides)


def _finish(
    path: Path,
    published: HFConfig,
    own_fields: Any,
    rotary_share: float,
    overrides: Mapping[str, Any],
) -> tuple[TransformerConfig, SpecialIds]:
    check_overrides(path, overrides)
    try:
        fields = published.fields() | own_fields()
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    if published.scaling is not None:
        raise ValueError(
            f'{path}: rotary wavelengths are scaled by {rope_type(published.scaling)!r}, which is '
            'not supported in this family; use a checkpoint without it'
        )
    rotary_share = (published.rope_parameters or {}).get('partial_rotary_factor', rotary_share)
    head_dim = fields['head_size'] or fields['width'] // fields['heads']
    if rotary_share < 1:
        fields['rotary_dims'] = int(head_dim * rotary_share)
    config = transformer_config(path, {**fields, **overrides})
    return config, _ids(path, published, config)


def _ids(path: Path, published: HFConfig, config: TransformerConfig) -> SpecialIds:
    """The special ids, of which config.json has only some."""
    eos = published.eos_token_id
    if isinstance(eos, list):
        eos = eos[-1] if eos else None
    pad = published.pad_token_id
    eos = pad if eos is None else eos
    eos = EOS_ID if eos is None else eos
    mask = published.mask_token_id
    if mask is None:
        mask = token_ids(path, (MASK,)).get(MASK, MASK_ID)
    if mask >= config.vocab_size:
        raise ValueError(
            f'{path}: mask_token_id is missing, and no tokenizer beside it has {MASK}; add '
            'mask_token_id to it'
        )
    ids = SpecialIds(mask, eos, eos if pad is None else pad)
    check_ids(path, ids, config.vocab_size)
    return ids


def _dense_layers(frequency: int | list[int] | None, layers: int) -> int:
    """How many layers come before the first one with experts.

    Raises:
      ValueError: if a layer after it has none.
    """
    if frequency is None or frequency == 1:
        return 0
    pattern = frequency if isinstance(frequency, list) else []
    dense = next((i for i, has_experts in enumerate(pattern) if has_experts), len(pattern))
    if len(pattern) != layers or pattern != [0] * dense + [1] * (layers - dense):
        raise ValueError(
            f'moe_layer_freq is {frequency!r}, expected {layers} numbers, 0 for layers without '
            'experts and then 1 for all others; this variant is not supported'
        )
    return dense


def llada2_table(config: TransformerConfig) -> Table:
    """The published tensor of every parameter of LLaDA2."""
    first = config.experts.dense_layers
    table = {('embedding',): Source('model.word_embeddings.weight'), **shared_entries()}
    for stack, number in (('dense_layers', 0), ('layers', first)):
        attention = LAYER + 'attention.'
        table |= norm_entries(stack, number)
        table |= {
            (stack, FUSED, 'kernel'): Source(attention + 'query_key_value.weight', True, number),
            (stack, 'attention_out', 'kernel'): Source(attention + 'dense.weight', True, number),
            (stack, 'query_norm', 'scale'): Source(
                attention + 'query_layernorm.weight', first=number
            ),
            (stack, 'key_norm', 'scale'): Source(attention + 'key_layernorm.weight', first=number),
        }
    return {
        **table,
        **mlp_entries('dense_layers', '', 0, 'mlp.'),
        **expert_entries(first),
        **mlp_entries('layers', SHARED, first, 'mlp.shared_experts.'),
        ('layers', 'experts', 'router'): Source(LAYER + 'mlp.gate.weight', True, first),
        ('layers', 'experts', 'bias'): Source(LAYER + 'mlp.gate.expert_bias', first=first),
    }


def llada_moe_table(config: TransformerConfig) -> Table:
    """The published tensor of every parameter of LLaDA-MoE."""
    first = config.experts.dense_layers
    return {
        ('embedding',): Source('model.embed_tokens.weight'),
        **shared_entries(),
        **attention_entries('dense_layers', 0),
        **attention_entries('layers', first),
        **mlp_entries('dense_layers', '', 0, 'mlp.'),
        **expert_entries(first),
        **mlp_entries('layers', SHARED, first, 'shared_expert.'),
        ('layers', 'experts', 'router'): Source(LAYER + 'mlp.gate.weight', True, first),
        ('layers', 'experts', 'bias'): Source(LAYER + 'mlp.expert_bias', first=first),
    }

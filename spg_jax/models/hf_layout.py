"""Families in the layout of `transformers`: Llama, Qwen2 and Dream.

All three have the same blocks. Qwen2 and Dream have biases of queries, keys and values. Llama and
Qwen2 are autoregressive; Dream (arXiv 2508.15487) is Qwen2 with full attention, and keeps the shift
of the logits: the output at a position predicts the token after it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spg_jax.models.published import (
    MATCHING_CONFIG,
    HFConfig,
    MLPWidth,
    SpecialIds,
    check_ids,
    check_overrides,
    check_plain,
    llama3_scaling,
    read_contents,
    token_ids,
    transformer_config,
)
from spg_jax.models.transfer import Source, Table
from spg_jax.models.transformer import TransformerConfig
from spg_jax.process.json_files import check_json

LAYER = 'model.layers.{layer}.'
KERNELS = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}

# The values of settings that `Transformer` computes; other settings are none that change the model.
_PLAIN: Mapping[str, tuple[Any, ...]] = {'hidden_act': ('silu',), 'use_sliding_window': (False,)}
_PLAIN_LLAMA = _PLAIN | {'attention_bias': (False,), 'mlp_bias': (False,)}
_PLAIN_QWEN = _PLAIN | {'use_mrope': (False,)}


class _Dense(HFConfig, kw_only=True):
    intermediate_size: MLPWidth


def read_llama(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """Reads config.json of a Llama checkpoint; arguments and errors as `families.read_config`."""
    return _read(path, 'llama', _PLAIN_LLAMA, {}, overrides)


def read_qwen2(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """Reads config.json of a Qwen2 checkpoint; arguments and errors as `families.read_config`."""
    return _read(path, 'qwen2', _PLAIN_QWEN, {'qkv_bias': True}, overrides)


def read_dream(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """Reads config.json of a Dream checkpoint; arguments and errors as `families.read_config`."""
    changes = {'qkv_bias': True, 'visible_block': 0}
    return _read(path, 'dream', _PLAIN_QWEN, changes, overrides)


def _read(
    path: Path,
    family: str,
    plain: Mapping[str, tuple[Any, ...]],
    changes: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> tuple[TransformerConfig, SpecialIds]:
    contents = read_contents(path)
    check_plain(path, contents, plain, family)
    check_overrides(path, overrides)
    published = check_json(contents, _Dense, path, MATCHING_CONFIG)
    try:
        fields = published.fields()
        scaling = llama3_scaling(path, published.scaling)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    fields |= {
        'family': family,
        'mlp_width': published.intermediate_size,
        'rope_scaling': scaling,
        'shift_logits': True,
        'visible_block': 1,
    }
    config = transformer_config(path, {**fields, **changes, **overrides})
    ids = _ids(path, published, config)
    check_ids(path, ids, config.vocab_size)
    return config, ids


def _ids(path: Path, published: HFConfig, config: TransformerConfig) -> SpecialIds:
    """The special ids; an autoregressive model gets an id that stands for tokens yet to come."""
    eos = published.eos_token_id
    if isinstance(eos, list):  # Llama 3 lists the end of the turn last.
        eos = eos[-1] if eos else None
    if eos is None:
        raise ValueError(f'{path}: eos_token_id is missing; {MATCHING_CONFIG}')
    beside = token_ids(path, ('pad_token', 'unk_token'))
    pad = published.pad_token_id
    pad = beside.get('pad_token', eos) if pad is None else pad
    mask = published.mask_token_id
    if mask is None and not config.autoregressive:
        raise ValueError(f'{path}: mask_token_id is missing; {MATCHING_CONFIG}')
    if mask is None:
        # Under causal attention no prediction depends on this id, which only must not be generated.
        candidates = (pad, beside.get('unk_token'), published.bos_token_id, config.vocab_size - 1)
        mask = next((id for id in candidates if id is not None and id != eos), 0)
    return SpecialIds(mask, eos, pad)


def table(config: TransformerConfig) -> Table:
    """The published tensor of every parameter of Llama, Qwen2 and Dream."""
    return {
        ('embedding',): Source('model.embed_tokens.weight'),
        **shared_entries(),
        **attention_entries('layers', 0),
        **mlp_entries('layers', '', 0, 'mlp.'),
    }


def shared_entries() -> Table:
    """The parameters outside of the layers, except for the embedding."""
    return {
        ('unembedding',): Source('lm_head.weight', transposed=True),
        ('final_norm', 'scale'): Source('model.norm.weight'),
    }


def norm_entries(stack: str, first: int) -> Table:
    """The two norms of each layer of a stack, whose first layer has the number `first`."""
    return {
        (stack, 'attention_norm', 'scale'): Source(LAYER + 'input_layernorm.weight', first=first),
        (stack, 'mlp_norm', 'scale'): Source(
            LAYER + 'post_attention_layernorm.weight', first=first
        ),
    }


def attention_entries(stack: str, first: int) -> Table:
    """The norms and the attention of each layer of a stack."""
    entries = norm_entries(stack, first)
    for name, letter in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('attention_out', 'o')):
        published = f'{LAYER}self_attn.{letter}_proj.'
        entries[stack, name, 'kernel'] = Source(published + 'weight', True, first)
        if name != 'attention_out':
            entries[stack, name, 'bias'] = Source(published + 'bias', first=first)
    for name, letter in (('query_norm', 'q'), ('key_norm', 'k')):
        entries[stack, name, 'scale'] = Source(
            f'{LAYER}self_attn.{letter}_norm.weight', first=first
        )
    return entries


def mlp_entries(stack: str, prefix: str, first: int, published: str) -> Table:
    """The gated MLP whose kernels here begin with `prefix` and in the file with `published`."""
    return {
        (stack, prefix + name, 'kernel'): Source(f'{LAYER}{published}{file}.weight', True, first)
        for name, file in KERNELS.items()
    }


def expert_entries(first: int) -> Table:
    """The kernels of the experts."""
    return {
        ('layers', 'experts', name): Source(
            f'{LAYER}mlp.experts.{{expert}}.{file}.weight', True, first
        )
        for name, file in KERNELS.items()
    }

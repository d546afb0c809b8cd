"""Reads config.json of a published LLaDA checkpoint as a `TransformerConfig`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spg_jax.models.transformer import EXECUTION, TransformerConfig


class SpecialIds(NamedTuple):
    """The ids of the special tokens."""

    mask: int
    eos: int
    pad: int


# The settings under which a published model is what `Transformer` computes.
ARCHITECTURE: Mapping[str, Any] = {
    'model_type': 'llada',
    'block_type': 'llama',
    'block_group_size': 1,
    'activation_type': 'silu',
    'layer_norm_type': 'rms',
    'layer_norm_with_affine': True,
    'attention_layer_norm': False,
    'bias_for_layer_norm': False,
    'include_bias': False,
    'include_qkv_bias': False,
    'input_emb_norm': False,
    'alibi': False,
    'rope': True,
    'rope_full_precision': True,
}


def read_config(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """The configuration and special ids that a published config.json describes.

    Args:
      path: the config.json.
      overrides: fields of `TransformerConfig`: dtype, param_dtype or one of EXECUTION.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is not JSON, describes another architecture, lacks a key or has an
        impossible value, and for an override of another field.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist; expected a checkpoint directory with config.json'
        )
    try:
        published = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is not JSON ({error}); download it again') from None
    if not isinstance(published, dict):
        raise ValueError(
            f'{path} holds a {type(published).__name__}, expected a JSON object; download it again'
        )

    def get(key: str) -> Any:
        if published.get(key) is None:
            raise ValueError(f'{path}: {key} is missing; use the config.json of a LLaDA checkpoint')
        return published[key]

    for key, expected in ARCHITECTURE.items():
        if get(key) != expected:
            raise ValueError(
                f'{path}: {key} is {published[key]!r}, expected {expected!r}; '
                'use a checkpoint of the LLaDA-8B architecture'
            )
    surplus = sorted(set(overrides) - {'dtype', 'param_dtype', *EXECUTION})
    if surplus:
        raise ValueError(f'model.{surplus[0]} comes from {path}; leave it out')
    config = _transformer_config(published, get, overrides)
    ids = SpecialIds(*(get(f'{name}_token_id') for name in SpecialIds._fields))
    for name, value in ids._asdict().items():
        if not 0 <= value < config.vocab_size:
            raise ValueError(
                f'{path}: {name}_token_id is {value}, outside the {config.vocab_size} rows of the '
                'embedding; use the config.json that came with the weights'
            )
    return config, ids


def _transformer_config(
    published: Mapping[str, Any], get: Callable[[str], Any], overrides: Mapping[str, Any]
) -> TransformerConfig:
    """The configuration that config.json describes; `get` raises ValueError for missing keys."""
    width, heads = get('d_model'), get('n_heads')
    # Where a published file says null, the value follows from another key.
    vocab_size = published.get('embedding_size') or get('vocab_size')
    kv_heads = published.get('n_kv_heads') or (
        1 if published.get('multi_query_attention') else heads
    )
    return TransformerConfig(
        **{
            'vocab_size': vocab_size,
            'width': width,
            'layers': get('n_layers'),
            'heads': heads,
            'kv_heads': kv_heads,
            'mlp_width': published.get('mlp_hidden_size') or get('mlp_ratio') * width,
            'rope_theta': get('rope_theta'),
            'norm_eps': get('rms_norm_eps'),
            'tie_embeddings': get('weight_tying'),
            'scale_logits': get('scale_logits'),
            'dtype': get('torch_dtype'),
            'param_dtype': get('torch_dtype'),
            **overrides,
        }
    )

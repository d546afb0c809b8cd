"""Reads config.json of a published LLaDA checkpoint as a `TransformerConfig`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from spg_jax.models.published import (
    Eps,
    Heads,
    Layers,
    MLPWidth,
    Rows,
    SpecialIds,
    Theta,
    Width,
    check_ids,
    check_overrides,
    read_contents,
)
from spg_jax.models.transformer import TransformerConfig
from spg_jax.process.json_files import check_json

REMEDY = 'use the config.json of a LLaDA checkpoint'

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

_Ratio = Annotated[float, Meta(gt=0, le=1000)]


class _Published(msgspec.Struct):
    """The keys of config.json that fix sizes and numbers."""

    d_model: Width
    n_heads: Heads
    n_layers: Layers
    rope_theta: Theta
    rms_norm_eps: Eps
    weight_tying: bool
    scale_logits: bool
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    embedding_size: Rows | None = None
    vocab_size: Rows | None = None
    n_kv_heads: Heads | None = None
    multi_query_attention: bool | None = None
    mlp_hidden_size: MLPWidth | None = None
    mlp_ratio: _Ratio | None = None
    torch_dtype: str | None = None
    dtype: str | None = None


def read_config(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """The configuration and special ids that a published config.json describes.

    Args:
      path: the config.json.
      overrides: fields of `TransformerConfig`: dtype, param_dtype or one of EXECUTION.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is not JSON, describes another architecture, lacks a key or has an
        impossible value, and for an override of another field; the message names the file.
    """
    contents = read_contents(path)
    for key, expected in ARCHITECTURE.items():
        value = contents.get(key)
        if value is None:
            raise ValueError(f'{path}: {key} is missing; {REMEDY}')
        if value != expected or type(value) is not type(expected):
            raise ValueError(
                f'{path}: {key} is {value!r}, expected {expected!r}; '
                'use a checkpoint of the LLaDA-8B architecture'
            )
    check_overrides(path, overrides)
    published = check_json(contents, _Published, path, REMEDY)
    try:
        config = _transformer_config(published, overrides)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    ids = SpecialIds(published.mask_token_id, published.eos_token_id, published.pad_token_id)
    check_ids(path, ids, config.vocab_size)
    return config, ids


def _transformer_config(published: _Published, overrides: Mapping[str, Any]) -> TransformerConfig:
    """The configuration that config.json describes.

    Raises:
      ValueError: for a combination of values that is impossible.
    """
    # Where a published file says null, the value follows from another key.
    vocab_size = published.embedding_size or published.vocab_size
    kv_heads = published.n_kv_heads or (1 if published.multi_query_attention else published.n_heads)
    mlp_width = published.mlp_hidden_size or (published.mlp_ratio or 0) * published.d_model
    # Versions of transformers before 5 wrote torch_dtype, some as "torch.float32".
    dtype = (published.dtype or published.torch_dtype or '').removeprefix('torch.')
    for keys, value in (
        ('embedding_size and vocab_size are', vocab_size),
        ('mlp_hidden_size and mlp_ratio are', mlp_width),
        ('torch_dtype is', dtype),
    ):
        if not value:
            raise ValueError(f'{keys} missing; {REMEDY}')
    if mlp_width != int(mlp_width):
        raise ValueError(
            f'mlp_ratio {published.mlp_ratio} times d_model {published.d_model} is no integer; '
            f'{REMEDY}'
        )
    return TransformerConfig(
        **{
            'vocab_size': vocab_size,
            'width': published.d_model,
            'layers': published.n_layers,
            'heads': published.n_heads,
            'kv_heads': kv_heads,
            'mlp_width': int(mlp_width),
            'rope_theta': published.rope_theta,
            'norm_eps': published.rms_norm_eps,
            'tie_embeddings': published.weight_tying,
            'scale_logits': published.scale_logits,
            'dtype': dtype,
            'param_dtype': dtype,
            **overrides,
        }
    )

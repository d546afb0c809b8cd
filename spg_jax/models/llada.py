"""LLaDA checkpoints in their published layout (arXiv 2502.09992): config.json plus safetensors.

One table pairs every parameter with the published tensor it comes from. A checkpoint is read only
if the table uses each of its tensors exactly once and each has the shape that config.json implies.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from spg_jax.models.tensor_files import FLOATS, Tensor, open_tensors, write_checkpoint
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.sharding import abstract_params


class SpecialIds(NamedTuple):
    """Token ids with a meaning of their own."""

    mask: int
    eos: int
    pad: int


class Source(NamedTuple):
    """The published tensor of a parameter; '{layer}' in its name means one tensor a layer."""

    name: str
    transposed: bool = False  # published kernels are [out, in], ours [in, out]


_BLOCK = 'model.transformer.blocks.{layer}.'

TABLE: Mapping[tuple[str, ...], Source] = {
    ('embedding',): Source('model.transformer.wte.weight'),
    ('unembedding',): Source('model.transformer.ff_out.weight', transposed=True),
    ('final_norm', 'scale'): Source('model.transformer.ln_f.weight'),
    ('layers', 'attention_norm', 'scale'): Source(_BLOCK + 'attn_norm.weight'),
    ('layers', 'query', 'kernel'): Source(_BLOCK + 'q_proj.weight', transposed=True),
    ('layers', 'key', 'kernel'): Source(_BLOCK + 'k_proj.weight', transposed=True),
    ('layers', 'value', 'kernel'): Source(_BLOCK + 'v_proj.weight', transposed=True),
    ('layers', 'attention_out', 'kernel'): Source(_BLOCK + 'attn_out.weight', transposed=True),
    ('layers', 'mlp_norm', 'scale'): Source(_BLOCK + 'ff_norm.weight'),
    # The published block multiplies silu(ff_proj(x)) by up_proj(x).
    ('layers', 'gate', 'kernel'): Source(_BLOCK + 'ff_proj.weight', transposed=True),
    ('layers', 'up', 'kernel'): Source(_BLOCK + 'up_proj.weight', transposed=True),
    ('layers', 'down', 'kernel'): Source(_BLOCK + 'ff_out.weight', transposed=True),
}

# What `Transformer` computes; a configuration that says anything else is another model.
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

AGAIN = 'download config.json and weights from one place'


def load_checkpoint(
    directory: str | Path, mesh: Mesh | None = None, **overrides: Any
) -> tuple[TransformerConfig, SpecialIds, Any]:
    """Read a published LLaDA checkpoint.

    Args:
      directory: holds config.json and model.safetensors, or the shards that
        model.safetensors.index.json lists.
      mesh: where to put the parameters, each process reading only its own shards of them; without
        it they are host arrays.
      overrides: fields of `TransformerConfig` that the checkpoint does not fix (remat, scan_unroll,
        attention), or says otherwise (dtype and param_dtype are its torch_dtype).

    Returns:
      (configuration, special ids, plain parameter pytree in param_dtype).

    Raises:
      FileNotFoundError: for a file that is not there.
      ValueError: for another architecture, a damaged file, or a tensor that is missing, surplus, or
        of the wrong shape or type; the message names it.
    """
    directory = Path(directory)
    config, ids, files = check_checkpoint(directory, **overrides)
    target = abstract_params(Transformer(config), mesh)

    def read(path, leaf):
        source = TABLE[tuple(key.key for key in path)]

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return _read(files, source, leaf, index)

        whole = (slice(None),) * len(leaf.shape)
        return (
            shard(whole)
            if mesh is None
            else jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)
        )

    return config, ids, jax.tree_util.tree_map_with_path(read, target)


def save_checkpoint(
    directory: Path, params: Any, source: Path, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes parameters in the published layout, for anything that reads LLaDA checkpoints.

    Args:
      directory: made if need be.
      params: plain parameter pytree; one tensor at a time is fetched to the host.
      source: the checkpoint they came from, whose other files (configuration, tokenizer, model
        code) go along.
      shard_bytes: largest file, unless one tensor is larger.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith('model.safetensors'):
            if path.suffix != '.safetensors':
                shutil.copy(path, directory)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        published = TABLE[tuple(key.key for key in path)]
        stacked = '{layer}' in published.name
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if published.transposed else shape
        for layer in range(len(leaf)) if stacked else (None,):
            fetch = partial(_published_values, leaf, layer, published.transposed)
            tensors[published.name.format(layer=layer)] = Tensor(shape, leaf.dtype, fetch)
    write_checkpoint(directory, tensors, shard_bytes)


def _published_values(leaf: Any, layer: int | None, transposed: bool) -> np.ndarray:
    values = np.asarray(leaf if layer is None else leaf[layer])
    return values.T if transposed else values


def check_checkpoint(
    directory: Path, **overrides: Any
) -> tuple[TransformerConfig, SpecialIds, Mapping[str, safe_open]]:
    """Configuration, special ids and opened files of a checkpoint whose tensors all fit; none of
    them is read. Raises as `load_checkpoint`."""
    config, ids = read_config(directory / 'config.json', **overrides)
    files = open_tensors(directory)
    _check_tensors(directory, files, tensor_shapes(config), config)
    return config, ids, files


def read_config(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """The configuration and special ids that a published config.json describes.

    Raises:
      FileNotFoundError: when it is not there.
      ValueError: for what is not JSON, another architecture, or a key that is missing or cannot be.
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
            raise ValueError(f'{path}: {key} is missing; a LLaDA configuration has it')
        return published[key]

    for key, expected in ARCHITECTURE.items():
        if get(key) != expected:
            raise ValueError(
                f'{path}: {key} is {published[key]!r}, expected {expected!r}; '
                'use a checkpoint of the LLaDA-8B architecture'
            )
    surplus = sorted(set(overrides) - {'dtype', 'param_dtype', 'remat', 'scan_unroll', 'attention'})
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
    """What config.json says, in our terms; `get` complains about keys that must be there."""
    width, heads = get('d_model'), get('n_heads')
    # Null in published files stands for what these are derived from.
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


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a published checkpoint of this configuration holds."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(Transformer(config))):
        source = TABLE[tuple(key.key for key in path)]
        stacked = '{layer}' in source.name
        shape = leaf.shape[1:] if stacked else leaf.shape
        for layer in range(config.layers if stacked else 1):
            shapes[source.name.format(layer=layer)] = shape[::-1] if source.transposed else shape
    return shapes


def _check_tensors(
    directory: Path,
    files: Mapping[str, safe_open],
    expected: Mapping[str, tuple[int, ...]],
    config: TransformerConfig,
) -> None:
    """Raise ValueError unless the files hold exactly the expected tensors, in a floating type."""
    for name in expected:
        if name not in files:
            raise ValueError(
                f'{directory}: {name!r} is missing, expected {list(expected[name])}'
                f'{_clue(name, config)}; {AGAIN}'
            )
    for name in files:
        if name not in expected:
            raise ValueError(
                f'{directory}: {name!r} is surplus, nothing in the model uses it'
                f'{_clue(name, config)}; {AGAIN}'
            )
    for name, shape in expected.items():
        found = files[name].get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise ValueError(
                f'{directory}: {name!r} is {found.get_shape()}, expected {list(shape)} '
                f'(config.json says d_model {config.width}, embedding_size {config.vocab_size}, '
                f'n_heads {config.heads}, n_kv_heads {config.kv_heads}, '
                f'mlp_hidden_size {config.mlp_width}); {AGAIN}'
            )
        if found.get_dtype() not in FLOATS:
            raise ValueError(
                f'{directory}: {name!r} holds {found.get_dtype()}, expected one of '
                f'{", ".join(FLOATS)}; use the checkpoint before quantisation'
            )


def _clue(name: str, config: TransformerConfig) -> str:
    """What config.json says that decides whether the tensor exists."""
    if name == TABLE[('unembedding',)].name:
        return f' (config.json says weight_tying {config.tie_embeddings})'
    return f' (config.json says n_layers {config.layers})'


def _read(
    files: Mapping[str, safe_open],
    source: Source,
    leaf: jax.ShapeDtypeStruct,
    index: tuple[slice, ...],
) -> np.ndarray:
    """The part `index` of one parameter, only that part read from the files."""

    def one(name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = files[name].get_slice(name)[index[::-1] if source.transposed else index]
        return (part.T if source.transposed else part).astype(leaf.dtype)

    if '{layer}' not in source.name:
        return one(source.name, index)
    layers = range(leaf.shape[0])[index[0]]
    return np.stack([one(source.name.format(layer=layer), index[1:]) for layer in layers])

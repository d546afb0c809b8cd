"""Weights of LLaDA checkpoints in their published layout (arXiv 2502.09992): safetensors.

One table pairs every parameter with the published tensor it comes from. A checkpoint is read only
if the table uses each of its tensors exactly once and each has the shape that config.json implies.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import safe_open

from spg_jax.models.llada.configuration import SpecialIds, read_config
from spg_jax.models.lora import ADAPTER, LoRA
from spg_jax.models.quantized import is_quantized
from spg_jax.models.tensor_files import FLOATS, open_tensors, write_checkpoint
from spg_jax.models.transfer import Source, published_tensors, read_parameter
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.sharding import abstract_params

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

AGAIN = 'download config.json and weights from one place'


def load_checkpoint(
    directory: str | Path, mesh: Mesh | None = None, **overrides: Any
) -> tuple[TransformerConfig, SpecialIds, Any]:
    """Read a published LLaDA checkpoint.

    Args:
      directory: holds config.json and model.safetensors, or the shards that
        model.safetensors.index.json lists.
      mesh: where to put the parameters, each process reading only its own shards of them; without
        it they are host arrays. One published tensor at a time is in host memory.
      overrides: fields of `TransformerConfig` that the checkpoint does not fix (remat, scan_unroll,
        attention, quantize), or says otherwise (dtype and param_dtype are its torch_dtype).

    Returns:
      (configuration, special ids, plain parameter pytree in param_dtype; kernels quantised if so
      asked, each as soon as it is on its devices).

    Raises:
      FileNotFoundError: for a file that is not there.
      ValueError: for another architecture, a damaged file, or a tensor that is missing, surplus, or
        of the wrong shape or type; the message names it.
    """
    directory = Path(directory)
    config, ids, files = check_checkpoint(directory, **overrides)
    if config.quantize and mesh is None:
        raise ValueError(
            f'model.quantize is {config.quantize!r} without a mesh; give one, since kernels are '
            'quantised on the devices they are for'
        )
    target = abstract_params(Transformer(config), mesh)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: read_parameter(files, _source(path), leaf), target, is_leaf=is_quantized
    )
    return config, ids, params


def save_checkpoint(
    directory: Path,
    params: Any,
    source: Path,
    shard_bytes: int = 5 * 10**9,
    adapters: Mapping[str, Any] | None = None,
    lora: LoRA | None = None,
) -> None:
    """Writes parameters in the published layout, for anything that reads LLaDA checkpoints.

    Args:
      directory: made if need be.
      params: plain parameter pytree, on any devices; one published tensor at a time is put
        together there and fetched to the host. Every process that holds a part of it has to call
        this, and the first one writes.
      source: the checkpoint they came from, whose other files (configuration, tokenizer, model
        code) go along.
      shard_bytes: largest file, unless one tensor is larger.
      adapters: the 'lora' collection, to merge into the kernels it adapts; None for none.
      lora: their sizes.
    """
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith('model.safetensors'):
                if path.suffix != '.safetensors':
                    shutil.copy(path, directory)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        tensors |= published_tensors(_source(path), leaf, _factors(path, adapters), lora)
    write_checkpoint(directory, tensors, shard_bytes)
    multihost_utils.sync_global_devices('checkpoint written')


def check_checkpoint(
    directory: Path, **overrides: Any
) -> tuple[TransformerConfig, SpecialIds, Mapping[str, safe_open]]:
    """Configuration, special ids and opened files of a checkpoint whose tensors all fit; none of
    them is read. Raises as `load_checkpoint`."""
    config, ids = read_config(directory / 'config.json', **overrides)
    files = open_tensors(directory)
    _check_tensors(directory, files, tensor_shapes(config), config)
    return config, ids, files


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a published checkpoint of this configuration holds."""
    shapes = {}
    plain = Transformer(dataclasses.replace(config, quantize=''))
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(plain)):
        shapes |= _source(path).shapes(leaf.shape)
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


def _source(path: tuple[Any, ...]) -> Source:
    return TABLE[tuple(key.key for key in path)]


def _factors(
    path: tuple[Any, ...], adapters: Mapping[str, Any] | None
) -> Mapping[str, jax.Array] | None:
    """'a' and 'b' of the adapter of a parameter; None if it has none."""
    *above, name = (key.key for key in path)
    if not adapters or name != 'kernel':
        return None
    return adapters['layers'].get(above[-1], {}).get(ADAPTER)

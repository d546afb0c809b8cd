"""Weights of published checkpoints in their own layout: safetensors.

The table of a family pairs every parameter with its published tensors. A checkpoint is read only if
the table uses each of its tensors exactly once and each has the shape that config.json implies.
"""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import safe_open

from spg_jax.models.families import read_config, table_of
from spg_jax.models.lora import ADAPTER, LoRA
from spg_jax.models.published import SpecialIds
from spg_jax.models.tensor_files import FLOATS, open_tensors, write_checkpoint
from spg_jax.models.transfer import Source, Table, published_tensors, read_parameters
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.sharding import abstract_params

REMEDY = 'download config.json and weights from the same place'


def load_checkpoint(
    directory: str | Path, mesh: Mesh | None = None, **overrides: Any
) -> tuple[TransformerConfig, SpecialIds, Any]:
    """Reads a published checkpoint, with one published tensor in host memory at a time.

    Args:
      directory: holds config.json and model.safetensors, or the shards that
        model.safetensors.index.json lists.
      mesh: the mesh to put the parameters on, of which each process reads only its shards; with
        None they are host arrays.
      overrides: fields of `TransformerConfig` that the checkpoint does not fix (remat, scan_unroll,
        attention, quantize), and dtype and param_dtype if they shall not be its torch_dtype.

    Returns:
      (configuration, special ids, plain parameter pytree in param_dtype). With `quantize` each
      kernel is quantised as soon as it is on its devices.

    Raises:
      FileNotFoundError: for a file that does not exist.
      ValueError: for another architecture, a damaged file, or a tensor that is missing, surplus, or
        of the wrong shape or type; the message names it.
    """
    directory = Path(directory)
    config, ids, files = check_checkpoint(directory, **overrides)
    if config.quantize and mesh is None:
        raise ValueError(
            f'model.quantize is {config.quantize!r} without a mesh; pass a mesh, because kernels '
            'are quantised on its devices'
        )
    target, table = abstract_params(Transformer(config), mesh), table_of(config)
    params = read_parameters(files, functools.partial(_source, table), target)
    return config, ids, params


def save_checkpoint(
    directory: Path,
    params: Any,
    source: Path,
    shard_bytes: int = 5 * 10**9,
    adapters: Mapping[str, Any] | None = None,
    lora: LoRA | None = None,
) -> None:
    """Writes parameters in the layout of the checkpoint that they came from.

    Every process that holds a part of the parameters has to call this function; the first process
    writes.

    Args:
      directory: where to write; it is created if it does not exist.
      params: plain parameter pytree, on any devices. One published tensor at a time is assembled
        there and fetched to the host.
      source: the checkpoint that the parameters came from. Its other files (configuration,
        tokenizer, model code) are copied.
      shard_bytes: size of the largest file, unless one tensor is larger.
      adapters: the 'lora' collection to merge into the kernels; None merges nothing.
      lora: the size of the adapters.
    """
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for path in copied_files(source):
            shutil.copy(path, directory)
    tensors, table = {}, table_of(read_config(source / 'config.json')[0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        tensors |= published_tensors(_source(table, path), leaf, _factors(path, adapters), lora)
    write_checkpoint(directory, tensors, shard_bytes)
    multihost_utils.sync_global_devices('checkpoint written')


def copied_files(source: Path) -> list[Path]:
    """The files of a checkpoint that `save_checkpoint` copies: all but the weights."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and not path.name.startswith('model.safetensors')
        and path.suffix != '.safetensors'
    ]


def check_checkpoint(
    directory: Path, **overrides: Any
) -> tuple[TransformerConfig, SpecialIds, Mapping[str, safe_open]]:
    """Checks that all tensors of a checkpoint fit, without reading any of them.

    Returns:
      (configuration, special ids, tensor name -> the open file that holds it).

    Raises:
      FileNotFoundError, ValueError: as `load_checkpoint`.
    """
    config, ids = read_config(directory / 'config.json', **overrides)
    files = open_tensors(directory)
    _check_tensors(directory, files, tensor_shapes(config), config)
    return config, ids, files


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a published checkpoint of this configuration."""
    shapes, table = {}, table_of(config)
    model = Transformer(dataclasses.replace(config, quantize=''))  # as published
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model)):
        shapes |= _source(table, path).shapes(leaf.shape)
    return shapes


def _check_tensors(
    directory: Path,
    files: Mapping[str, safe_open],
    expected_shapes: Mapping[str, tuple[int, ...]],
    config: TransformerConfig,
) -> None:
    """Raises ValueError unless the files hold exactly the expected tensors, in a floating type."""
    for name in expected_shapes:
        if name not in files:
            raise ValueError(
                f'{directory}: {name!r} is missing, expected {list(expected_shapes[name])}'
                f'{_clue(name, config)}; {REMEDY}'
            )
    for name in files:
        if name not in expected_shapes:
            raise ValueError(
                f'{directory}: {name!r} is surplus, nothing in the model uses it'
                f'{_clue(name, config)}; {REMEDY}'
            )
    for name, shape in expected_shapes.items():
        stored = files[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ValueError(
                f'{directory}: {name!r} is {stored.get_shape()}, expected {list(shape)} '
                f'(config.json says {_sizes(config)}); {REMEDY}'
            )
        if stored.get_dtype() not in FLOATS:
            raise ValueError(
                f'{directory}: {name!r} holds {stored.get_dtype()}, expected one of '
                f'{", ".join(FLOATS)}; use the checkpoint before quantisation'
            )


# The keys of config.json in LLaDA and in the families in the layout of transformers.
_KEYS = {
    'llada': ('d_model', 'embedding_size', 'n_heads', 'n_kv_heads', 'mlp_hidden_size'),
    '': (
        'hidden_size',
        'vocab_size',
        'num_attention_heads',
        'num_key_value_heads',
        'intermediate_size',
    ),
}


def _sizes(config: TransformerConfig) -> str:
    """The sizes that config.json gives, by the names they have there, for error messages."""
    keys = _KEYS.get(config.family, _KEYS[''])
    values = config.width, config.vocab_size, config.heads, config.kv_heads, config.mlp_width
    sizes = [f'{key} {value}' for key, value in zip(keys, values, strict=True)]
    if config.head_size:
        sizes.append(f'head_dim {config.head_size}')
    if config.experts:
        sizes += [f'num_experts {config.experts.count}', f'width of experts {config.experts.width}']
    return ', '.join(sizes)


def _clue(name: str, config: TransformerConfig) -> str:
    """The setting of config.json that decides whether the tensor exists, for error messages."""
    is_llada = config.family == 'llada'
    if name == table_of(config)[('unembedding',)].name:
        key = 'weight_tying' if is_llada else 'tie_word_embeddings'
        return f' (config.json says {key} {config.tie_embeddings})'
    if config.experts and '.experts.' in name:
        return f' (config.json says num_experts {config.experts.count})'
    key = 'n_layers' if is_llada else 'num_hidden_layers'
    return f' (config.json says {key} {config.layers})'


def _source(table: Table, path: tuple[Any, ...]) -> Source:
    """The published tensor of the parameter at a path of the tree."""
    return table[tuple(key.key for key in path)]


def _factors(
    path: tuple[Any, ...], adapters: Mapping[str, Any] | None
) -> Mapping[str, jax.Array] | None:
    """The factors 'a' and 'b' of the adapter of a parameter; None if it has no adapter."""
    *parents, name = (key.key for key in path)
    if not adapters or name != 'kernel':
        return None
    stack, kernel = parents
    return adapters.get(stack, {}).get(kernel, {}).get(ADAPTER)

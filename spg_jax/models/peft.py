"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

A factor is named after the published tensor it adapts, in PEFT's wrapping; kernels are stored
transposed there, [rank, in] and [out, rank].
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import safe_open

from spg_jax.models.llada import weights
from spg_jax.models.lora import ADAPTER, COLLECTION, TARGETS, LoRA
from spg_jax.models.tensor_files import FLOATS, open_file, write_tensors
from spg_jax.models.transfer import Source, published_tensors, read_parameter
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.sharding import abstract_params

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
FACTORS = {'a': 'lora_A', 'b': 'lora_B'}

# What PEFT can add to the plain product, and what it is when it adds nothing.
PLAIN: Mapping[str, Any] = {
    'bias': 'none',
    'use_rslora': False,
    'use_dora': False,
    'fan_in_fan_out': False,
    'rank_pattern': {},
    'alpha_pattern': {},
    'modules_to_save': None,
}


def source_of(target: str, factor: str) -> Source:
    """PEFT's tensors of a factor, 'a' or 'b', of the adapters of one product."""
    published = weights.TABLE['layers', target, 'kernel'].name.removesuffix('.weight')
    return Source(f'base_model.model.{published}.{FACTORS[factor]}.weight', transposed=True)


def save_adapter(directory: Path, adapters: Mapping[str, Any], lora: LoRA, base: str) -> None:
    """Writes adapters for PEFT to load.

    Args:
      directory: made if need be.
      adapters: the 'lora' collection, on any devices. Every process that holds a part of it has to
        call this, and the first one writes.
      lora: their sizes.
      base: the checkpoint they adapt, for `base_model_name_or_path`.
    """
    tensors = {}
    for target in lora.targets:
        for factor in FACTORS:
            stacked = adapters['layers'][target][ADAPTER][factor]
            tensors |= published_tensors(source_of(target, factor), stacked)
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        _write_description(directory / CONFIG, lora, base)
    write_tensors(directory / WEIGHTS, tensors)
    multihost_utils.sync_global_devices('adapter written')


def _write_description(path: Path, lora: LoRA, base: str) -> None:
    modules = '|'.join(source_of(target, 'a').name.split('.')[-3] for target in lora.targets)
    description = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base,
        'inference_mode': True,
        'r': lora.rank,
        'lora_alpha': lora.alpha,
        'lora_dropout': lora.dropout,
        # An expression, since the output layer is called ff_out as well, outside of the blocks.
        'target_modules': rf'.*\.blocks\.\d+\.({modules})',
        **PLAIN,
    }
    path.write_text(json.dumps(description, indent=1))


def load_adapter(
    directory: Path, config: TransformerConfig, mesh: Mesh | None = None
) -> tuple[LoRA, dict[str, Any]]:
    """Reads adapters that PEFT wrote.

    Which products have one is read from the tensors: `target_modules` may name some that the
    architecture does not have, as those of published adapters do.

    Args:
      directory: holds adapter_config.json and adapter_model.safetensors.
      config: of the model they are for.
      mesh: where to put them; without it they are host arrays.

    Returns:
      (their sizes, the 'lora' collection).

    Raises:
      FileNotFoundError: for a file that is not there.
      ValueError: for adapters of another kind, rank or model, or a tensor that is missing or
        surplus; the message names it.
    """
    lora, files = check_adapter(directory, config)
    target = abstract_params(_adapted(config, lora), mesh, collection=COLLECTION)
    adapters = jax.tree_util.tree_map_with_path(
        lambda path, leaf: read_parameter(files, _source(path), leaf), target
    )
    return lora, adapters


def check_adapter(
    directory: Path, config: TransformerConfig
) -> tuple[LoRA, Mapping[str, safe_open]]:
    """Sizes and opened file of adapters whose tensors all fit; none of them is read. Arguments and
    errors are those of `load_adapter`."""
    described = _describe(directory / CONFIG)
    path = directory / WEIGHTS
    files = open_file(path)
    targets = _targets(path, files, config.layers)
    lora = LoRA(described['r'], described['lora_alpha'], described['lora_dropout'], targets)
    expected = abstract_params(_adapted(config, lora), collection=COLLECTION)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        for name, shape in _source(key_path).shapes(leaf.shape).items():
            _check(path, files, name, shape, lora)
    return lora, files


def _adapted(config: TransformerConfig, lora: LoRA) -> Transformer:
    return Transformer(dataclasses.replace(config, lora=lora))


def _source(path: tuple[Any, ...]) -> Source:
    _, target, _, factor = (key.key for key in path)
    return source_of(target, factor)


def _describe(path: Path) -> dict[str, Any]:
    """The contents of adapter_config.json, if plain LoRA of one rank is all it asks for."""
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; expected an adapter that PEFT saved')
    try:
        found = json.loads(path.read_text())
        kind, _ = found.get('peft_type'), (found['r'], found['lora_alpha'], found['lora_dropout'])
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{path} describes no LoRA adapter ({error}); expected r, lora_alpha and lora_dropout'
        ) from None
    if kind != 'LORA':
        raise ValueError(f"{path}: peft_type is {kind!r}, expected 'LORA'; use such an adapter")
    for key, plain in PLAIN.items():
        if (found.get(key) or plain) != plain:
            raise ValueError(
                f'{path}: {key} is {found[key]!r}, expected {plain!r}; merge that adapter into '
                'its checkpoint with PEFT and use the result'
            )
    return found


def _targets(path: Path, files: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """The products that have an adapter in some layer; ValueError if anything else is there."""
    owner = {
        source_of(target, factor).name.format(layer=layer): target
        for target in TARGETS
        for factor in FACTORS
        for layer in range(layers)
    }
    surplus = sorted(set(files) - set(owner))
    if surplus:
        raise ValueError(
            f'{path}: {surplus[0]!r} is surplus, nothing in a model of {layers} layers uses it; '
            'use an adapter of this model'
        )
    if not files:
        raise ValueError(f'{path} holds no tensor; export the adapter again')
    present = {owner[name] for name in files}
    return tuple(target for target in TARGETS if target in present)


def _check(
    path: Path, files: Mapping[str, Any], name: str, shape: tuple[int, ...], lora: LoRA
) -> None:
    """Raises ValueError unless the file holds the tensor in this shape and a floating type."""
    if name not in files:
        raise ValueError(
            f'{path}: {name!r} is missing, expected {list(shape)}; every layer has an adapter '
            'where one has: use an adapter of this model'
        )
    found = files[name].get_slice(name)
    if tuple(found.get_shape()) != shape:
        raise ValueError(
            f'{path}: {name!r} is {found.get_shape()}, expected {list(shape)} for rank '
            f'{lora.rank} of {CONFIG}; use an adapter of this model, with its own {CONFIG}'
        )
    if found.get_dtype() not in FLOATS:
        raise ValueError(
            f'{path}: {name!r} holds {found.get_dtype()}, expected one of {", ".join(FLOATS)}'
        )

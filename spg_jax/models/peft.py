"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

The name of a factor contains the name of the published tensor that it adapts. PEFT stores factors
transposed, 'a' as [rank, in] and 'b' as [out, rank].
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
from spg_jax.process.files import write_whole
from spg_jax.sharding import abstract_params

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
FACTORS = {'a': 'lora_A', 'b': 'lora_B'}  # names here -> names of PEFT

# Settings with which PEFT can change the plain product -> the values that leave it plain.
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
    """The tensors of PEFT for the factor 'a' or 'b' of the adapters of one target."""
    published = weights.TABLE['layers', target, 'kernel'].name.removesuffix('.weight')
    return Source(f'base_model.model.{published}.{FACTORS[factor]}.weight', transposed=True)


def save_adapter(directory: Path, adapters: Mapping[str, Any], lora: LoRA, base: str) -> None:
    """Writes adapters in the layout that PEFT loads.

    Every process that holds a part of the adapters has to call this function; the first process
    writes.

    Args:
      directory: where to write; it is created if it does not exist.
      adapters: the 'lora' collection, on any devices.
      lora: the size of the adapters.
      base: the checkpoint that they adapt, for `base_model_name_or_path`.
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
        # A regular expression that ends in 'blocks', because the output layer is also named ff_out.
        'target_modules': rf'.*\.blocks\.\d+\.({modules})',
        **PLAIN,
    }
    write_whole(path, json.dumps(description, indent=1))


def load_adapter(
    directory: Path, config: TransformerConfig, mesh: Mesh | None = None
) -> tuple[LoRA, dict[str, Any]]:
    """Reads adapters that PEFT wrote.

    The names of the tensors tell which targets have an adapter. `target_modules` does not: in
    published adapters it also names modules that the architecture does not have.

    Args:
      directory: holds adapter_config.json and adapter_model.safetensors.
      config: the configuration of the model that they adapt.
      mesh: the mesh to put them on; with None they are host arrays.

    Returns:
      (size of the adapters, the 'lora' collection).

    Raises:
      FileNotFoundError: for a file that does not exist.
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
    """Checks that all tensors of an adapter fit, without reading any of them.

    Arguments and errors are those of `load_adapter`.

    Returns:
      (size of the adapters, tensor name -> the open file that holds it).
    """
    settings = _read_settings(directory / CONFIG)
    path = directory / WEIGHTS
    files = open_file(path)
    targets = _targets(path, files, config.layers)
    lora = LoRA(settings['r'], settings['lora_alpha'], settings['lora_dropout'], targets)
    adapters = abstract_params(_adapted(config, lora), collection=COLLECTION)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        for name, shape in _source(key_path).shapes(leaf.shape).items():
            _check_tensor(path, files, name, shape, lora)
    return lora, files


def _adapted(config: TransformerConfig, lora: LoRA) -> Transformer:
    return Transformer(dataclasses.replace(config, lora=lora))


def _source(path: tuple[Any, ...]) -> Source:
    """The tensors of PEFT for the factor at a path of the tree."""
    _, target, _, factor = (key.key for key in path)
    return source_of(target, factor)


def _read_settings(path: Path) -> dict[str, Any]:
    """The contents of adapter_config.json; raises ValueError unless it asks for plain LoRA."""
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; expected an adapter that PEFT saved')
    try:
        settings = json.loads(path.read_text())
        kind = settings.get('peft_type')
        _ = settings['r'], settings['lora_alpha'], settings['lora_dropout']
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{path} describes no LoRA adapter ({error}); expected r, lora_alpha and lora_dropout'
        ) from None
    if kind != 'LORA':
        raise ValueError(f"{path}: peft_type is {kind!r}, expected 'LORA'; use a LoRA adapter")
    for key, plain_value in PLAIN.items():
        if (settings.get(key) or plain_value) != plain_value:
            raise ValueError(
                f'{path}: {key} is {settings[key]!r}, expected {plain_value!r}; merge that adapter '
                'into its checkpoint with PEFT and use the result'
            )
    return settings


def _targets(path: Path, files: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """The targets that have an adapter in at least one layer.

    Raises:
      ValueError: if the file has no tensors, or tensors that belong to no target.
    """
    target_of = {
        source_of(target, factor).name.format(layer=layer): target
        for target in TARGETS
        for factor in FACTORS
        for layer in range(layers)
    }
    surplus = sorted(set(files) - set(target_of))
    if surplus:
        raise ValueError(
            f'{path}: {surplus[0]!r} is surplus, nothing in a model of {layers} layers uses it; '
            'use an adapter of this model'
        )
    if not files:
        raise ValueError(f'{path} holds no tensor; export the adapter again')
    targets = {target_of[name] for name in files}
    return tuple(target for target in TARGETS if target in targets)


def _check_tensor(
    path: Path, files: Mapping[str, Any], name: str, shape: tuple[int, ...], lora: LoRA
) -> None:
    """Raises ValueError unless the file has the tensor, in the given shape and a floating type."""
    if name not in files:
        raise ValueError(
            f'{path}: {name!r} is missing, expected {list(shape)}, because another layer has this '
            'adapter; use an adapter of this model'
        )
    stored = files[name].get_slice(name)
    if tuple(stored.get_shape()) != shape:
        raise ValueError(
            f'{path}: {name!r} is {stored.get_shape()}, expected {list(shape)} for rank '
            f'{lora.rank} of {CONFIG}; use an adapter of this model, with its own {CONFIG}'
        )
    if stored.get_dtype() not in FLOATS:
        raise ValueError(
            f'{path}: {name!r} holds {stored.get_dtype()}, expected one of {", ".join(FLOATS)}'
        )

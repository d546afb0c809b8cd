"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

The name of a factor contains the name of the published tensor that it adapts. PEFT stores factors
transposed, 'a' as [rank, in] and 'b' as [out, rank].
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from msgspec import Meta
from safetensors import safe_open

from spg_jax.models.families import table_of
from spg_jax.models.lora import ADAPTER, COLLECTION, TARGETS, LoRA, targets_of
from spg_jax.models.tensor_files import FLOATS, open_file, write_tensors
from spg_jax.models.transfer import Source, published_tensors, read_parameters
from spg_jax.models.transformer import Transformer, TransformerConfig
from spg_jax.process.files import write_whole
from spg_jax.process.json_files import check_json, read_json
from spg_jax.sharding import abstract_params

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
PICKLED = 'adapter_model.bin'
_ADAPTER_NAME = r'\.[^.]+\.(?=weight$)'  # such as '.default.' in 'lora_A.default.weight'
FACTORS = {'a': 'lora_A', 'b': 'lora_B'}  # names here -> names of PEFT

# Settings with which PEFT can change the plain product -> the values that leave it plain. They are
# written with every adapter.
PLAIN: Mapping[str, Any] = {
    'bias': 'none',
    'use_rslora': False,
    'use_dora': False,
    'fan_in_fan_out': False,
    'rank_pattern': {},
    'alpha_pattern': {},
    'modules_to_save': None,
}

# The other settings of LoraConfig in PEFT 0.21 that leave the product and the base alone, whatever
# their value. All that neither table names has to be empty, null or false: it is one of the
# variants of LoRA, or came with a later version of PEFT.
HARMLESS = frozenset(
    (
        *('peft_type', 'r', 'lora_alpha', 'lora_dropout'),  # These are read.
        *('task_type', 'auto_mapping', 'base_model_name_or_path', 'revision', 'inference_mode'),
        *('peft_version', 'megatron_core', 'runtime_config'),
        # Where adapters are, which the names of the tensors tell.
        *('target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern'),
        'ensure_weight_tying',  # of embeddings, whose adapters are refused
        'qalora_group_size',  # without effect unless use_qalora is set
        'eva_config',  # of an initialisation that leaves the base alone
    )
)
# Initialisations that only choose the first values of the factors. The others, such as pissa,
# olora, corda, loftq and lora_ga, change the base as well, and PEFT changes it when it loads them.
INITIALISATIONS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica')


_CLUE = ', because experts have no adapters here'
_MERGE = 'merge that adapter into its checkpoint with PEFT and use the result'


class _Settings(TypedDict):
    """What is read of adapter_config.json."""

    r: Annotated[int, Meta(ge=1, le=10**6)]
    lora_alpha: Annotated[float, Meta(gt=0, le=10**9)]
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)]


def adapter_sources(
    config: TransformerConfig, adapters: Mapping[str, Any]
) -> dict[tuple[str, str, str], Source]:
    """The tensors of PEFT of every factor, in the order of TARGETS.

    Args:
      config: the model that is adapted.
      adapters: the 'lora' collection, or its shapes.

    Returns:
      (stack of layers, kernel, 'a' or 'b') -> tensors of that factor of the kernel's adapters.
    """
    table, sources = table_of(config), {}
    kernels = [(stack, kernel) for stack in adapters for kernel in adapters[stack]]
    kernels.sort(key=lambda pair: (TARGETS.index(targets_of(pair[1])[0]), pair))
    for stack, kernel in kernels:
        source = table[stack, kernel, 'kernel']
        published = source.name.removesuffix('.weight')
        for factor in FACTORS:
            name = f'base_model.model.{published}.{FACTORS[factor]}.weight'
            sources[stack, kernel, factor] = Source(name, transposed=True, first=source.first)
    return sources


def save_adapter(
    directory: Path, adapters: Mapping[str, Any], config: TransformerConfig, base: str
) -> None:
    """Writes adapters in the layout that PEFT loads.

    Every process that holds a part of the adapters has to call this function; the first process
    writes.

    Args:
      directory: where to write; it is created if it does not exist.
      adapters: the 'lora' collection, on any devices.
      config: the model with its adapters.
      base: the checkpoint that they adapt, for `base_model_name_or_path`.
    """
    tensors, sources = {}, adapter_sources(config, adapters)
    for (stack, kernel, factor), source in sources.items():
        tensors |= published_tensors(source, adapters[stack][kernel][ADAPTER][factor])
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        _write_description(directory / CONFIG, config.lora, sources.values(), base)
    write_tensors(directory / WEIGHTS, tensors)
    multihost_utils.sync_global_devices('adapter written')


def _write_description(path: Path, lora: LoRA, sources: Iterable[Source], base: str) -> None:
    modules: dict[str, list[str]] = {}  # name of the list of layers -> modules in a layer
    for source in sources:
        layers, module = source.name.split('.{layer}.')
        module = module.rsplit('.', 2)[0].replace('.', r'\.')
        names = modules.setdefault(layers.split('.')[-1], [])
        if module not in names:
            names.append(module)
    ((layers, names),) = modules.items()
    description = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base,
        'inference_mode': True,
        'r': lora.rank,
        'lora_alpha': lora.alpha,
        'lora_dropout': lora.dropout,
        # A regular expression that begins with the list of layers, because outer layers can have
        # the names of inner ones, as ff_out in LLaDA.
        'target_modules': rf'.*\.{layers}\.\d+\.({"|".join(names)})',
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
    sources = adapter_sources(config, target)
    adapters = read_parameters(files, functools.partial(_source, sources), target)
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
    if not path.exists() and (directory / PICKLED).exists():
        raise ValueError(
            f'{directory / PICKLED} is a pickle, which could run code when it is read, expected '
            f'{WEIGHTS}; load it with PEFT and save it with save_pretrained'
        )
    files = open_file(path)
    lora = LoRA(settings['r'], settings['lora_alpha'], settings['lora_dropout'])
    lora = dataclasses.replace(lora, targets=_targets(path, files, config, lora))
    adapters = abstract_params(_adapted(config, lora), collection=COLLECTION)
    sources = adapter_sources(config, adapters)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        for name, shape in _source(sources, key_path).shapes(leaf.shape).items():
            _check_tensor(path, files, name, shape, lora)
    return lora, files


def _adapted(config: TransformerConfig, lora: LoRA) -> Transformer:
    return Transformer(dataclasses.replace(config, lora=lora))


def _source(sources: Mapping[tuple[str, str, str], Source], path: tuple[Any, ...]) -> Source:
    """The tensors of PEFT for the factor at a path of the tree."""
    stack, kernel, _, factor = (key.key for key in path)
    return sources[stack, kernel, factor]


def _read_settings(path: Path) -> _Settings:
    """The size in adapter_config.json; raises ValueError unless it asks for plain LoRA."""
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; expected an adapter that PEFT saved')
    contents = read_json(path, dict[str, Any], 'save the adapter again')
    kind = contents.get('peft_type')
    if kind != 'LORA':
        raise ValueError(f"{path}: peft_type is {kind!r}, expected 'LORA'; use a LoRA adapter")
    settings = check_json(contents, _Settings, path, 'use the file that PEFT saved')
    if contents.get('alora_invocation_tokens'):
        raise ValueError(
            f'{path}: alora_invocation_tokens is {contents["alora_invocation_tokens"]!r}, expected '
            'null, because such an adapter acts only after these tokens; train a plain one'
        )
    initialisation = contents.get('init_lora_weights')
    if not any(initialisation is value or initialisation == value for value in INITIALISATIONS):
        raise ValueError(
            f'{path}: init_lora_weights is {initialisation!r}, which changes the weights of the '
            f'base, expected one of {", ".join(map(repr, INITIALISATIONS))}; {_MERGE}'
        )
    for key in contents:
        if key == 'init_lora_weights' or key in HARMLESS:
            continue
        plain_value = PLAIN.get(key)
        if (contents[key] or plain_value) != plain_value:
            raise ValueError(
                f'{path}: {key} is {contents[key]!r}, expected {plain_value!r}; {_MERGE}'
            )
    return settings


def _targets(
    path: Path, files: Mapping[str, Any], config: TransformerConfig, lora: LoRA
) -> tuple[str, ...]:
    """The targets that have an adapter in at least one layer.

    Every target that shares a kernel with one that has an adapter has one too.

    Raises:
      ValueError: if the file has no tensors, or tensors that belong to no target.
    """
    adapters = abstract_params(_adapted(config, lora), collection=COLLECTION)
    sources = adapter_sources(config, adapters)
    targets_of_name = {
        name: targets_of(kernel)
        for (stack, kernel, factor), source in sources.items()
        for name in source.indices(adapters[stack][kernel][ADAPTER][factor].shape)
    }
    surplus = sorted(set(files) - set(targets_of_name))
    unsaved = [name for name in surplus if re.sub(_ADAPTER_NAME, '.', name) in targets_of_name]
    if unsaved:
        raise ValueError(
            f'{path}: {unsaved[0]!r} has the name of an adapter in the memory of PEFT, expected '
            f"{re.sub(_ADAPTER_NAME, '.', unsaved[0])!r}; save it with PEFT's save_pretrained"
        )
    if surplus:
        raise ValueError(
            f'{path}: {surplus[0]!r} is surplus, nothing in a model of {config.layers} layers uses '
            f'it{_CLUE if ".experts." in surplus[0] else ""}; use an adapter of this model'
        )
    if not files:
        raise ValueError(f'{path} holds no tensor; export the adapter again')
    targets = {target for name in files for target in targets_of_name[name]}
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

"""The published families: how config.json of each is read, and what its tensors are called.

A checkpoint is of the family that knows its `architectures`, or else its `model_type`; LLaDA-MoE
has the model_type of LLaDA.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spg_jax.models import hf_layout, mixtures
from spg_jax.models.llada import configuration as llada
from spg_jax.models.llada.table import TABLE as LLADA_TABLE
from spg_jax.models.published import SpecialIds, read_contents
from spg_jax.models.transfer import Table
from spg_jax.models.transformer import TransformerConfig

Reader = Callable[..., tuple[TransformerConfig, SpecialIds]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A published family of models."""

    name: str  # for messages
    architectures: tuple[str, ...]  # in config.json
    model_types: tuple[str, ...]  # in config.json without known architectures
    read: Reader  # (path of config.json, **overrides) -> (configuration, special ids)
    table: Callable[[TransformerConfig], Table]


FAMILIES = {
    'llada': Family(
        'LLaDA and LLaDA-1.5',
        ('LLaDAModelLM',),
        ('llada',),
        llada.read_config,
        lambda config: LLADA_TABLE,
    ),
    'llada2': Family(
        'LLaDA2.0 and 2.1',
        ('LLaDA2MoeModelLM', 'LLaDA2MoeModel'),
        ('llada2_moe', 'llada2_moe_veomni'),
        mixtures.read_llada2,
        mixtures.llada2_table,
    ),
    'llada_moe': Family(
        'LLaDA-MoE',
        ('LLaDAMoEModelLM', 'LLaDAMoEModel'),
        ('lladamoe',),
        mixtures.read_llada_moe,
        mixtures.llada_moe_table,
    ),
    'dream': Family('Dream', ('DreamModel',), ('Dream',), hf_layout.read_dream, hf_layout.table),
    'qwen2': Family(
        'Qwen2', ('Qwen2ForCausalLM',), ('qwen2',), hf_layout.read_qwen2, hf_layout.table
    ),
    'llama': Family(
        'Llama', ('LlamaForCausalLM',), ('llama',), hf_layout.read_llama, hf_layout.table
    ),
}


def find_family(path: Path) -> Family:
    """The family of a published config.json.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not JSON, or of no known family.
    """
    contents = read_contents(path)
    architectures, model_type = contents.get('architectures'), contents.get('model_type')
    names = architectures if isinstance(architectures, list) else []
    for family in FAMILIES.values():
        if any(name in names for name in family.architectures):
            return family
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ', '.join(
        f'{architecture} ({family.name})'
        for family in FAMILIES.values()
        for architecture in family.architectures[:1]
    )
    raise ValueError(
        f'{path}: architectures is {architectures!r} and model_type {model_type!r}, expected one '
        f'of {known}; use a checkpoint of one of these families'
    )


def read_config(path: Path, **overrides: Any) -> tuple[TransformerConfig, SpecialIds]:
    """The configuration and special ids that a published config.json describes.

    Args:
      path: the config.json.
      overrides: fields of `TransformerConfig`: dtype, param_dtype or one of EXECUTION.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is not JSON, is of no known family, describes a variant that is not
        supported, lacks a key or has an impossible value, and for an override of another field; the
        message names the file.
    """
    return find_family(path).read(path, **overrides)


def table_of(config: TransformerConfig) -> Table:
    """The published tensor of every parameter of a model, and of some that it does not have."""
    if config.family not in FAMILIES:
        raise ValueError(
            f'model.family is {config.family!r}; use one of {", ".join(FAMILIES)}, or a version of '
            'spg_jax that knows it'
        )
    return FAMILIES[config.family].table(config)

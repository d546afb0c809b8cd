"""Policies on disk: directories that hold a model to use, by Orbax or as published.

A policy directory holds `policy.json` (model, tokenizer, how it was made), `params/` or, where only
adapters were trained, `adapter/` as PEFT writes it, and the files of a published tokenizer in
`tokenizer/`. A published checkpoint (config.json, safetensors, tokenizer files) is read wherever a
policy is. A policy appears whole or not at all.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from spg_jax.data.hf_tokenizer import HFTokenizer
from spg_jax.data.tokenizers import Tokenizer, WordTokenizer
from spg_jax.errors import one_line
from spg_jax.models.attention import AUTO, resolve
from spg_jax.models.llada import weights
from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.peft import CONFIG as ADAPTER_CONFIG
from spg_jax.models.peft import check_adapter, load_adapter, save_adapter
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.quantized import quantize_params
from spg_jax.models.transformer import EXECUTION, Transformer, TransformerConfig, check_heads
from spg_jax.process import distributed
from spg_jax.runs.checkpoints import restored
from spg_jax.sharding import abstract_params

DESCRIPTION = 'policy.json'
PARAMS = 'params'
ADAPTER = 'adapter'
TOKENIZER = 'tokenizer'


class _Description(NamedTuple):
    """What a policy directory says of itself."""

    config: TransformerConfig
    tokenizer: WordTokenizer | weights.SpecialIds  # the ids of a tokenizer that is read from files
    files: Path  # where those are
    base: Path | None  # the policy whose parameters it adapts, if it holds adapters only
    notes: dict[str, Any]


def make_policy(config: TransformerConfig, tokenizer: Tokenizer) -> Policy:
    """The policy of a model and the tokenizer it was trained with."""
    return Policy(config, tokenizer.mask_id, tokenizer.eos_id, tokenizer.allowed(config.vocab_size))


def save_policy(
    directory: Path,
    variables: Variables,
    config: TransformerConfig,
    tokenizer: Tokenizer,
    notes: dict[str, Any],
    base: Path | None = None,
) -> None:
    """Writes a policy directory, replacing an older one only when the new one is whole.

    Args:
      directory: where; its parent is made if need be.
      variables: the policy's collections. With adapters only those are written, as PEFT does.
      config: the model.
      tokenizer: the policy's.
      notes: JSON values that say how the policy came about.
      base: with adapters, the policy or published checkpoint they adapt, which has to stay there.
    """
    old, new = _aside(directory), directory.with_name(directory.name + '.new')
    if distributed.is_leader():
        if old.is_dir() and not directory.exists():  # a call was cut between its two renames
            old.rename(directory)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    distributed.barrier(f'room for {new}')
    model = dataclasses.asdict(config)
    for name in (*EXECUTION, 'lora'):  # an adapter describes itself
        del model[name]
    description = {'model': model, 'notes': notes}
    if config.lora:
        description['base'] = str(base.absolute())
        save_adapter(new / ADAPTER, variables[COLLECTION], config.lora, str(base.absolute()))
    else:
        ocp.save((new / PARAMS).absolute(), variables['params'])
    if distributed.is_leader():
        description |= tokenizer.save(new / TOKENIZER)
        _replace(directory, new, description)
    distributed.barrier(f'saved {directory}')


def _replace(directory: Path, new: Path, description: dict[str, Any]) -> None:
    """Puts what is complete but for its description in the place of an older policy."""
    old = _aside(directory)
    (new / DESCRIPTION).write_text(json.dumps(description, indent=1))
    # At every moment one of the two is whole under a name that readers look for.
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _aside(directory: Path) -> Path:
    return directory.with_name(directory.name + '.old')


def is_policy(directory: Path) -> bool:
    """Whether a whole policy was written here."""
    return (_whole(directory) / DESCRIPTION).is_file()


def _whole(directory: Path) -> Path:
    """Where the policy is: set aside for the moment in which `save_policy` replaces it."""
    old = _aside(directory)
    return old if old.is_dir() and not directory.exists() else directory


def policy_notes(directory: Path) -> dict[str, Any]:
    """How the policy in `directory` came about, {} for a published checkpoint; raises as
    `load_policy`."""
    return _describe(_whole(directory)).notes


def _is_published(directory: Path) -> bool:
    return not (directory / DESCRIPTION).is_file() and (directory / 'config.json').is_file()


def _describe(directory: Path) -> _Description:
    """Model, tokenizer and notes of a policy directory or a published checkpoint.

    Raises:
      FileNotFoundError, ValueError: naming the file, what was found and what to do.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f'{directory} does not exist; expected a policy directory or a published checkpoint'
        )
    if _is_published(directory):
        config, ids, _ = weights.check_checkpoint(directory)
        return _Description(config, ids, directory, None, {})
    path = directory / DESCRIPTION
    if not path.is_file() and (directory / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f'{directory} holds an adapter ({ADAPTER_CONFIG}), expected a policy directory or a '
            'published checkpoint; give it as --adapter (in training --config.lora.adapter), and '
            'here the checkpoint that it adapts'
        )
    if not path.is_file():
        raise FileNotFoundError(
            f'{directory} has no {DESCRIPTION} and no config.json; give a policy directory, such '
            'as the best/ of a run, or a published checkpoint'
        )
    try:
        found = json.loads(path.read_text())
        if 'hf_tokenizer' in found:
            ids = found['hf_tokenizer']
            tokenizer = weights.SpecialIds(ids['mask_id'], ids['eos_id'], ids['pad_id'])
        else:
            tokenizer = WordTokenizer(found['words'])
        # Older descriptions say how the policy was computed, too.
        model = {name: x for name, x in found['model'].items() if name not in EXECUTION}
        config, files = TransformerConfig(**model), directory / TOKENIZER
        base = Path(found['base']) if 'base' in found else None
        return _Description(config, tokenizer, files, base, found['notes'])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path} is not the description of a policy ({one_line(error)}); restore it or make '
            'the policy again'
        ) from error


def base_of(directory: Path) -> Path:
    """The policy whose parameters the one in `directory` adapts; `directory` if it has its own."""
    return _describe(_whole(directory)).base or directory


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a policy directory, without its parameters; raises as `load_policy`."""
    return _tokenizer(_describe(_whole(directory)))


def _tokenizer(found: _Description) -> Tokenizer:
    if isinstance(found.tokenizer, WordTokenizer):
        return found.tokenizer
    tokenizer = HFTokenizer(found.files, *found.tokenizer)
    tokenizer.allowed(found.config.vocab_size)  # refuses a tokenizer larger than the embedding
    return tokenizer


def check_policy(directory: Path, mesh: Mesh, adapter: Path | None = None) -> LoRA | None:
    """Raises what `load_policy` would, but reads no weight.

    Returns:
      Sizes of the adapters that the policy would have, None for none.
    """
    directory = _whole(directory)
    found = _describe(directory)
    check_heads(found.config, mesh)
    abstract_params(Transformer(found.config), mesh)
    chosen = _chosen_adapter(directory, found, adapter)
    return check_adapter(chosen, found.config)[0] if chosen else None


def _chosen_adapter(directory: Path, found: _Description, adapter: Path | None) -> Path | None:
    """The policy's own or the one to add to it; raises if there are both, or it adapts nothing."""
    if found.base and adapter:
        raise ValueError(f'{directory} has adapters of its own; leave {adapter} out, or merge them')
    if found.base and not found.base.is_dir():
        raise FileNotFoundError(
            f'{directory} adapts the policy {found.base}, which does not exist; put it back, '
            f'or mend "base" in {directory / DESCRIPTION}'
        )
    return directory / ADAPTER if found.base else adapter


def load_policy(
    directory: Path, mesh: Mesh, adapter: Path | None = None, **execution: Any
) -> tuple[Policy, Tokenizer, Variables]:
    """Reads a policy directory or a published checkpoint, each device receiving its shard.

    Args:
      directory: the policy.
      mesh: the devices.
      adapter: adapters to add to it, as PEFT saved them.
      execution: the fields `EXECUTION` of `TransformerConfig`; attention may be 'auto', which it is
        by default, and is then what suits the devices of the mesh.

    Raises:
      FileNotFoundError: nothing there; ValueError: something there that does not fit.
    """
    directory = _whole(directory)
    found = _describe(directory)
    tokenizer = _tokenizer(found)
    platform = mesh.devices.flat[0].platform
    chosen = resolve(execution.get('attention', AUTO), platform, found.config.dtype)
    config = dataclasses.replace(found.config, **execution | {'attention': chosen})
    check_heads(config, mesh)
    adapter = _chosen_adapter(directory, found, adapter)
    # First, since the base is large: what is wrong with an adapter shows before that is read.
    added = load_adapter(adapter, config, mesh) if adapter else None
    if found.base:
        _, _, variables = load_policy(found.base, mesh, quantize=config.quantize)
    elif _is_published(directory):
        variables = {
            'params': weights.load_checkpoint(directory, mesh, quantize=config.quantize)[2]
        }
    else:
        model = Transformer(dataclasses.replace(config, quantize=''))
        params = _restore_params(directory, abstract_params(model, mesh))
        if config.quantize:
            params = quantize_params(params, abstract_params(Transformer(config), mesh))
        variables = {PARAMS: params}
    if added:
        lora, variables[COLLECTION] = added
        config = dataclasses.replace(config, lora=lora)
    return make_policy(config, tokenizer), tokenizer, variables


def load_trained(directory: Path, policy: Policy, mesh: Mesh) -> Variables:
    """Only the collection of a policy directory that training changes: what the base is, and where
    it is already, a run knows.

    Raises:
      FileNotFoundError, ValueError: the parameters or adapters are not there or do not fit.
    """
    directory = _whole(directory)
    if policy.config.lora:
        return {COLLECTION: load_adapter(directory / ADAPTER, policy.config, mesh)[1]}
    return {PARAMS: _restore_params(directory, abstract_params(policy.model, mesh))}


def _restore_params(directory: Path, target: Any) -> Any:
    return restored(directory / PARAMS, lambda path: ocp.load(path, target))

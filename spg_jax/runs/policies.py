"""Policies on disk: directories that hold a model to use, written here or published.

A policy directory holds a description, `policy.json`, which names the model, the tokenizer and how
the policy was made. Its parameters are in `params/`, in the layout of Orbax. If only adapters were
trained, they are in `adapter/`, in the layout of PEFT, and there is no `params/`. The files of a
published tokenizer are in `tokenizer/`. A policy appears whole or not at all. A published
checkpoint (config.json, safetensors, tokenizer files) can be read wherever a policy can.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from spg_jax.data.hf_tokenizer import HFTokenizer
from spg_jax.data.tokenizers import Tokenizer, WordTokenizer
from spg_jax.models import weights
from spg_jax.models.attention import AUTO, resolve
from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.peft import check_adapter, load_adapter, save_adapter
from spg_jax.models.policy import Policy, Variables
from spg_jax.models.quantized import quantize_params
from spg_jax.models.transformer import EXECUTION, Transformer, TransformerConfig, check_heads
from spg_jax.process import distributed
from spg_jax.process.files import write_whole
from spg_jax.runs.arrays import abstract, check_digest, check_finite, restored, saving
from spg_jax.runs.description import (
    DESCRIPTION,
    RESTORE,
    TOKENIZER,
    Description,
    describe,
    is_published,
)
from spg_jax.sharding import abstract_params
from spg_jax.training.digests import digest_arrays

PARAMS = 'params'
ADAPTER = 'adapter'


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
    """Writes a policy directory. An older one is replaced only when the new one was read back.

    Every process that holds a part of the parameters has to call this function.

    Args:
      directory: where to write; its parent is created if it does not exist.
      variables: the collections of parameters. If there are adapters, only these are written.
      config: the model.
      tokenizer: the tokenizer of the policy.
      notes: JSON values that say how the policy was made.
      base: the policy or published checkpoint that the adapters adapt, which has to stay where it
        is; None without adapters.

    Raises:
      OSError: it could not be written, or what was read back is not what was written.
    """
    old, new = _aside(directory), directory.with_name(directory.name + '.new')
    if distributed.is_leader():
        if old.is_dir() and not directory.exists():  # A call was cut between its two renames.
            old.rename(directory)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    distributed.barrier(f'room for {new}')
    model = dataclasses.asdict(config)
    for name in (*EXECUTION, 'lora'):  # Saved adapters have a description of their own.
        del model[name]
    saved = variables[COLLECTION if config.lora else PARAMS]
    description = {'model': model, 'notes': notes, 'digest': digest_arrays(saved)}
    with saving(directory):
        if config.lora:
            description['base'] = str(base.absolute())
            save_adapter(new / ADAPTER, saved, config, str(base.absolute()))
        else:
            ocp.save((new / PARAMS).absolute(), saved)
        _check_saved(new, saved, config, description['digest'])
        if distributed.is_leader():
            description |= tokenizer.save(new / TOKENIZER)
            write_whole(new / DESCRIPTION, json.dumps(description, indent=1))
    if distributed.is_leader():
        _replace(directory, new)
    distributed.barrier(f'saved {directory}')


def _replace(directory: Path, new: Path) -> None:
    """Moves a new policy to the place of an older one."""
    old = _aside(directory)
    # At every moment the old or the new policy is whole under a name that readers look for.
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _check_saved(new: Path, saved: Any, config: TransformerConfig, digest: str) -> None:
    """Reads back the arrays of a new policy; raises ValueError unless they are those saved."""
    if config.lora:
        mesh = getattr(getattr(jax.tree.leaves(saved)[0], 'sharding', None), 'mesh', None)
        _restore_adapter(new / ADAPTER, config, mesh, digest)
    else:
        _restore_params(new, abstract(saved), digest)


def _aside(directory: Path) -> Path:
    """The name of the old policy while `save_policy` replaces it."""
    return directory.with_name(directory.name + '.old')


def is_policy(directory: Path) -> bool:
    """Whether the directory holds a policy that was written here."""
    return (_whole(directory) / DESCRIPTION).is_file()


def _whole(directory: Path) -> Path:
    """The directory itself, or the old policy that `save_policy` has just set aside."""
    old = _aside(directory)
    return old if old.is_dir() and not directory.exists() else directory


def policy_notes(directory: Path) -> dict[str, Any]:
    """How a policy was made, {} for a published checkpoint; raises what `load_policy` raises."""
    return describe(_whole(directory)).notes


def base_of(directory: Path) -> Path:
    """The policy that the one in `directory` adapts; `directory` if it holds all parameters."""
    return describe(_whole(directory)).base or directory


def model_of_policy(directory: Path) -> TransformerConfig:
    """The sizes of a policy's model, without adapters; raises what `load_policy` raises."""
    return describe(_whole(directory)).config


def digest_of(directory: Path) -> str:
    """The digest of what a policy holds, '' for a published checkpoint; raises as `load_policy`."""
    return describe(_whole(directory)).digest


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a policy; reads no parameters, and raises what `load_policy` raises."""
    return _tokenizer(describe(_whole(directory)))


def _tokenizer(description: Description) -> Tokenizer:
    if isinstance(description.tokenizer, WordTokenizer):
        return description.tokenizer
    tokenizer = HFTokenizer(description.files, *description.tokenizer)
    tokenizer.allowed(description.config.vocab_size)  # Raises if the embedding is too small.
    return tokenizer


def check_policy(directory: Path, mesh: Mesh, adapter: Path | None = None) -> LoRA | None:
    """Raises what `load_policy` would raise, but reads no parameters.

    Arguments are those of `load_policy`.

    Returns:
      The size of the adapters that the policy would have; None if it would have none.
    """
    directory = _whole(directory)
    description = describe(directory)
    check_heads(description.config, mesh)
    abstract_params(Transformer(description.config), mesh)
    adapter = _chosen_adapter(directory, description, adapter)
    return check_adapter(adapter, description.config)[0] if adapter else None


def _chosen_adapter(directory: Path, description: Description, adapter: Path | None) -> Path | None:
    """The adapter in the policy directory, or the one to add to the policy; None for none.

    Raises:
      ValueError: if there are both, or the policy that the saved adapter adapts is itself adapted.
      FileNotFoundError: if the policy that the saved adapter adapts does not exist.
    """
    if description.base and adapter:
        raise ValueError(f'{directory} has adapters of its own; leave {adapter} out, or merge them')
    if description.base and not description.base.is_dir():
        raise FileNotFoundError(
            f'{directory} adapts the policy {description.base}, which does not exist; put it back, '
            f'or mend "base" in {directory / DESCRIPTION}'
        )
    if description.base and describe(_whole(description.base)).base:
        raise ValueError(
            f'{directory / DESCRIPTION}: base is {description.base}, which is itself adapted, '
            f'expected a policy that holds all parameters; {RESTORE}'
        )
    return directory / ADAPTER if description.base else adapter


def load_policy(
    directory: Path, mesh: Mesh, adapter: Path | None = None, **execution: Any
) -> tuple[Policy, Tokenizer, Variables]:
    """Reads a policy directory or a published checkpoint; each device receives its shards only.

    Args:
      directory: the policy.
      mesh: the devices.
      adapter: an adapter that PEFT saved, to add to the policy; None adds none.
      execution: fields of `TransformerConfig` listed in `EXECUTION`, which say how to compute.
        Without `attention`, or with 'auto', the devices of the mesh decide it.

    Returns:
      (policy, tokenizer, collections of parameters).

    Raises:
      FileNotFoundError: if there is no policy.
      ValueError: if a file is damaged or does not fit the others, or the mesh does not fit.
    """
    directory = _whole(directory)
    description = describe(directory)
    tokenizer = _tokenizer(description)
    platform = mesh.devices.flat[0].platform
    attention = resolve(execution.get('attention', AUTO), platform, description.config.dtype)
    config = dataclasses.replace(description.config, **execution | {'attention': attention})
    check_heads(config, mesh)
    adapter = _chosen_adapter(directory, description, adapter)
    # The adapter comes before the base, which is large, so that its errors show early.
    if adapter:
        digest = description.digest if description.base else ''
        lora, adapters = _restore_adapter(adapter, config, mesh, digest)
    if description.base:
        _, _, variables = load_policy(description.base, mesh, quantize=config.quantize)
    elif is_published(directory):
        variables = {PARAMS: weights.load_checkpoint(directory, mesh, quantize=config.quantize)[2]}
    else:
        model = Transformer(description.config)  # Its shapes are known since `check_policy`.
        params = _restore_params(directory, abstract_params(model, mesh), description.digest)
        if config.quantize:
            params = quantize_params(params, abstract_params(Transformer(config), mesh))
        variables = {PARAMS: params}
    if not description.base:
        check_finite(directory, variables)
    if adapter:
        variables[COLLECTION] = adapters
        config = dataclasses.replace(config, lora=lora)
    return make_policy(config, tokenizer), tokenizer, variables


def check_saved_adapters(directory: Path) -> None:
    """Raises ValueError unless the adapters of a policy are finite and those that were saved."""
    directory = _whole(directory)
    description, adapter = describe(directory), directory / ADAPTER
    _restore_adapter(adapter, description.config, None, description.digest)


def load_trained(directory: Path, policy: Policy, mesh: Mesh) -> Variables:
    """Reads only the collection that training changed, for a run that has the others in memory.

    Args:
      directory: the policy directory.
      policy: the model that was trained.
      mesh: the devices.

    Raises:
      FileNotFoundError, ValueError: if the parameters or adapters do not exist or do not fit.
    """
    directory = _whole(directory)
    digest = describe(directory).digest
    if policy.config.lora:
        return {COLLECTION: _restore_adapter(directory / ADAPTER, policy.config, mesh, digest)[1]}
    return {PARAMS: _restore_params(directory, abstract_params(policy.model, mesh), digest)}


def _restore_adapter(
    adapter: Path, config: TransformerConfig, mesh: Mesh | None, digest: str
) -> tuple[LoRA, dict[str, Any]]:
    """Adapters that are finite and, unless the digest is '', those that were saved."""
    lora, adapters = load_adapter(adapter, config, mesh)
    if digest:
        check_digest(adapter, adapters, digest)
    check_finite(adapter, {COLLECTION: adapters})
    return lora, adapters


def _restore_params(directory: Path, target: Any, digest: str) -> Any:
    params = restored(directory / PARAMS, lambda path: ocp.load(path, target))
    check_digest(directory / PARAMS, params, digest)
    return params

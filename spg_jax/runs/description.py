"""The description of a policy: its model, its tokenizer, and how it was made."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

from msgspec import Meta

from spg_jax.data.tokenizers import WordTokenizer
from spg_jax.models import weights
from spg_jax.models.peft import CONFIG as ADAPTER_CONFIG
from spg_jax.models.transformer import TransformerConfig
from spg_jax.process.json_files import check_json, read_json

DESCRIPTION = 'policy.json'
TOKENIZER = 'tokenizer'
RESTORE = 'restore it or make the policy again'
_Id = Annotated[int, Meta(ge=0)]


class _Ids(TypedDict):
    mask_id: _Id
    eos_id: _Id
    pad_id: _Id


class _Contents(TypedDict):
    """The contents of policy.json; a policy has either `words` or `hf_tokenizer`."""

    model: dict[str, Any]  # fields of `TransformerConfig`
    notes: dict[str, Any]
    digest: str  # of the parameters or adapters
    words: NotRequired[list[str]]
    hf_tokenizer: NotRequired[_Ids]
    base: NotRequired[str]


class Description(NamedTuple):
    """The description of a policy, without its parameters."""

    config: TransformerConfig
    tokenizer: WordTokenizer | weights.SpecialIds  # special ids if the tokenizer has files
    files: Path  # the directory of these files
    base: Path | None  # the policy that it adapts; None if the directory holds all parameters
    notes: dict[str, Any]  # how the policy was made
    digest: str = ''  # of the parameters or adapters that the directory holds, see `digest_arrays`


def is_published(directory: Path) -> bool:
    """Whether the directory holds a published checkpoint."""
    return not (directory / DESCRIPTION).is_file() and (directory / 'config.json').is_file()


def describe(directory: Path) -> Description:
    """The description of a policy directory or of a published checkpoint.

    Raises:
      FileNotFoundError, ValueError: if there is none, or it is damaged; the message names the file.
    """
    if not directory.is_dir():
        what = 'is a file' if directory.exists() else 'does not exist'
        raise FileNotFoundError(
            f'{directory} {what}; expected a policy directory or a published checkpoint'
        )
    if is_published(directory):
        config, ids, _ = weights.check_checkpoint(directory)
        return Description(config, ids, directory, None, {})
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
    contents = read_json(path, _Contents, RESTORE)
    config = _read_model(contents['model'], path)
    if 'hf_tokenizer' in contents:
        ids = contents['hf_tokenizer']
        largest = max(ids, key=lambda name: ids[name])
        if ids[largest] >= config.vocab_size:
            raise ValueError(
                f'{path}: hf_tokenizer.{largest} is {ids[largest]}, expected less than '
                f'model.vocab_size {config.vocab_size}; {RESTORE}'
            )
        tokenizer = weights.SpecialIds(ids['mask_id'], ids['eos_id'], ids['pad_id'])
    else:
        try:
            tokenizer = WordTokenizer(contents.get('words', ()))
            tokenizer.allowed(config.vocab_size)  # Raises if the embedding is too small.
        except ValueError as error:
            raise ValueError(f'{path}: words: {error}; {RESTORE}') from None
    base = Path(contents['base']) if 'base' in contents else None
    files, notes, saved_digest = directory / TOKENIZER, contents['notes'], contents['digest']
    return Description(config, tokenizer, files, base, notes, saved_digest)


def _read_model(model: dict[str, Any], path: Path) -> TransformerConfig:
    """The model that a policy.json describes; raises ValueError if it is impossible."""
    surplus = model.keys() - {field.name for field in dataclasses.fields(TransformerConfig)}
    if surplus:
        raise ValueError(f'{path}: model.{min(surplus)} is no setting of a model; {RESTORE}')
    return check_json(model, TransformerConfig, f'{path}, model', RESTORE)

"""What the readers of config.json of all published families share."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from spg_jax.models.layers import RopeScaling
from spg_jax.models.transformer import EXECUTION, LIMITS, MOST_ROPE_THETA, TransformerConfig
from spg_jax.process.json_files import check_json, read_json

CONFIG = 'config.json'
DOWNLOAD = 'download it again'
MATCHING_CONFIG = 'use the config.json that came with the weights'

Heads = Annotated[int, Meta(ge=1, le=LIMITS['heads'])]
Width = Annotated[int, Meta(ge=1, le=LIMITS['width'])]
MLPWidth = Annotated[int, Meta(ge=1, le=LIMITS['mlp_width'])]
Layers = Annotated[int, Meta(ge=1, le=LIMITS['layers'])]
Rows = Annotated[int, Meta(ge=1, le=LIMITS['vocab_size'])]
Theta = Annotated[float, Meta(gt=0, le=MOST_ROPE_THETA)]
Eps = Annotated[float, Meta(gt=0, le=1)]


class SpecialIds(NamedTuple):
    """The ids of the special tokens."""

    mask: int
    eos: int
    pad: int


class HFConfig(msgspec.Struct):
    """The keys of config.json that all families in the layout of `transformers` have."""

    vocab_size: Rows
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    rms_norm_eps: Eps
    num_key_value_heads: Heads | None = None
    head_dim: Width | None = None
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # transformers 5 puts both of the above here
    tie_word_embeddings: bool = False
    torch_dtype: str | None = None
    dtype: str | None = None
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def fields(self) -> dict[str, Any]:
        """Fields of `TransformerConfig` that these keys fix.

        Raises:
          ValueError: for a key that is missing or has a value that is not supported.
        """
        dtype = (self.dtype or self.torch_dtype or '').removeprefix('torch.')
        if not dtype:
            raise ValueError(f'torch_dtype is missing; {MATCHING_CONFIG}')
        parameters = self.rope_parameters or {}
        theta = self.rope_theta or parameters.get('rope_theta')
        if not isinstance(theta, int | float):
            raise ValueError(f'rope_theta is {theta!r}, expected a number; {MATCHING_CONFIG}')
        return {
            'vocab_size': self.vocab_size,
            'width': self.hidden_size,
            'layers': self.num_hidden_layers,
            'heads': self.num_attention_heads,
            'kv_heads': self.num_key_value_heads or self.num_attention_heads,
            'head_size': self.head_dim or 0,
            'rope_theta': theta,
            'norm_eps': self.rms_norm_eps,
            'tie_embeddings': self.tie_word_embeddings,
            'dtype': dtype,
            'param_dtype': dtype,
        }

    @property
    def scaling(self) -> dict[str, Any] | None:
        """What config.json says about the scaling of rotary wavelengths; None for no scaling."""
        scaling = self.rope_scaling or self.rope_parameters or {}
        return None if rope_type(scaling) == 'default' else scaling


class _Llama3(msgspec.Struct):
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_type(scaling: Mapping[str, Any]) -> Any:
    """The kind of rotary scaling; 'default' scales nothing."""
    return scaling.get('rope_type', scaling.get('type', 'default'))


def llama3_scaling(path: Path, scaling: Mapping[str, Any] | None) -> RopeScaling | None:
    """The rotary scaling of Llama 3; raises ValueError for another kind."""
    if scaling is None:
        return None
    if rope_type(scaling) != 'llama3':
        raise ValueError(
            f"rope_scaling is of type {rope_type(scaling)!r}, expected 'llama3' or none; use a "
            'checkpoint without it'
        )
    numbers = check_json(scaling, _Llama3, f'{path}, rope_scaling', MATCHING_CONFIG)
    return RopeScaling(
        numbers.factor,
        numbers.low_freq_factor,
        numbers.high_freq_factor,
        numbers.original_max_position_embeddings,
    )


def read_contents(path: Path) -> dict[str, Any]:
    """The contents of a config.json.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist; expected a checkpoint directory with config.json'
        )
    return read_json(path, dict[str, Any], DOWNLOAD)


def check_plain(
    path: Path, contents: Mapping[str, Any], plain: Mapping[str, Iterable[Any]], family: str
) -> None:
    """Refuses settings that `Transformer` does not compute.

    Args:
      path: the config.json.
      contents: what it holds.
      plain: key -> the values that are supported; a key that is missing counts as None.
      family: name of the family, for the message.

    Raises:
      ValueError: names the first such key.
    """
    for key, values in plain.items():
        value = contents.get(key)
        if not any(value == other and type(value) is type(other) for other in (None, *values)):
            raise ValueError(
                f'{path}: {key} is {value!r}, expected {" or ".join(map(repr, values))}; this '
                f'variant of {family} is not supported, use another checkpoint'
            )


def check_overrides(path: Path, overrides: Iterable[str]) -> None:
    """Raises ValueError for an override of a field that config.json fixes."""
    surplus = sorted(set(overrides) - {'dtype', 'param_dtype', *EXECUTION})
    if surplus:
        raise ValueError(f'model.{surplus[0]} comes from {path}; leave it out')


def transformer_config(path: Path, fields: Mapping[str, Any]) -> TransformerConfig:
    """The configuration with the given fields; an error names the file."""
    try:
        return TransformerConfig(**fields)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def check_ids(path: Path, ids: SpecialIds, vocab_size: int) -> None:
    """Raises ValueError for a special id that has no row in the embedding."""
    for name, value in ids._asdict().items():
        if not 0 <= value < vocab_size:
            raise ValueError(
                f'{path}: {name}_token_id is {value}, outside the {vocab_size} rows of the '
                f'embedding; {MATCHING_CONFIG}'
            )


class _Token(msgspec.Struct):
    content: str


class _TokenizerConfig(msgspec.Struct):
    """What is read of tokenizer_config.json where config.json lacks an id."""

    added_tokens_decoder: dict[str, _Token] = {}
    pad_token: str | _Token | None = None
    unk_token: str | _Token | None = None


def token_ids(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Ids of tokens, from the tokenizer beside a config.json; those that it does not have are left
    out.

    Args:
      path: the config.json.
      names: texts such as '<|mask|>', or 'pad_token' and 'unk_token'.
    """
    settings = path.with_name('tokenizer_config.json')
    if not settings.is_file():
        return {}
    tokenizer = read_json(settings, _TokenizerConfig, DOWNLOAD)
    id_of = {
        token.content: int(id)
        for id, token in tokenizer.added_tokens_decoder.items()
        if id.isdecimal()
    }
    ids = {}
    for name in names:
        text = getattr(tokenizer, name, name)
        text = text.content if isinstance(text, _Token) else text
        if text in id_of:
            ids[name] = id_of[text]
    return ids

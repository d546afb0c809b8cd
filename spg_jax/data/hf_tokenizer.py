"""Published tokenizers with their chat templates, through `transformers` (extra 'hf')."""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from msgspec import Meta

from spg_jax.data.chat_template import ChatTemplate, try_out
from spg_jax.errors import one_line
from spg_jax.process.json_files import read_json

SETTINGS = 'tokenizer_config.json'
FILES = ('tokenizer.json', 'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja')
# Tokenizers that come with code of their own, which is never run -> the class of `transformers`
# that reads the same files.
_EQUIVALENTS = {'DreamTokenizer': 'Qwen2Tokenizer'}
_MARKER = re.compile(r'<\|[^|<>]*\|>')  # the form of special tokens in chat templates


class _Token(TypedDict):
    content: str


class _AddedToken(TypedDict):
    content: str
    special: NotRequired[bool]


class _Settings(TypedDict, total=False):
    """What is believed of tokenizer_config.json."""

    tokenizer_class: str | None
    chat_template: str | list[dict[str, str]] | None  # several templates have names
    bos_token: str | _Token | None
    eos_token: str | _Token | None
    pad_token: str | _Token | None
    mask_token: str | _Token | None
    unk_token: str | _Token | None
    added_tokens_decoder: dict[Annotated[str, Meta(pattern='^[0-9]{1,9}$')], _AddedToken]


class HFTokenizer:
    """A published tokenizer and its chat template, read by `transformers` from local files only.

    The special ids are those that the model was trained with, from its config.json. Tokenizer files
    with other ids belong to another model and are refused.
    """

    def __init__(self, directory: Path, mask_id: int, eos_id: int, pad_id: int):
        """Reads the tokenizer files in `directory`.

        Raises:
          ValueError: if `transformers` is not installed, the files cannot be read, or they do not
            fit the ids; the message is one line that names the file and the remedy.
        """
        self.mask_id, self.eos_id, self.pad_id = mask_id, eos_id, pad_id
        self._directory, self._settings = directory, directory / SETTINGS
        self._hf = _read(directory)
        self._ids = self._hf.get_vocab()
        self._texts = {id: text for text, id in self._ids.items()}
        self.size = max(self._texts, default=-1) + 1
        unknown_id = self._ids.get(self._hf.special_tokens_map.get('unk_token'))
        # Tokenizers that know every byte need no unknown token, and some of them declare EOS as it.
        self._unknown_id = None if unknown_id == eos_id else unknown_id
        self._check_ids()
        self._template = self._checked_template()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` alone: no special token is put before or after it.

        Raises:
          ValueError: if the tokenizer has no id for a part of the text.
        """
        ids = self._hf.encode(text, add_special_tokens=False)
        if self._unknown_id is not None and self._unknown_id in ids:
            raise ValueError(
                f'{self._directory}: the tokenizer has no id for a part of {text[:60]!r}; use only '
                'what its vocabulary has'
            )
        return ids

    def encode_prompt(self, text: str, prefill: str = '') -> list[int]:
        """Returns the ids of one user turn of the chat template, the opening of the answer, and
        `prefill`; raises what `encode` raises, and ValueError if the template fails for `text`.

        Args:
          text: what the user says.
          prefill: the start of the answer.
        """
        # The template writes the start token itself, so `encode` must not add another one.
        try:
            turn = self._template.render(text)
        except Exception as error:  # A template is a program, which can raise any exception.
            raise self._unusable_template(one_line(error)) from error
        return self.encode(turn + prefill)

    def decode(self, ids: Sequence[int], keep_specials: bool = False) -> str:
        """Returns the text of `ids`.

        Args:
          ids: [n] token ids.
          keep_specials: False stops before the first EOS and drops every special token; True keeps
            all tokens, because published scorers read completions with their special tokens.

        Raises:
          ValueError: if the tokenizer does not have one of the ids.
        """
        ids = [int(id) for id in ids]
        if not keep_specials:
            ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
            ids = [id for id in ids if id not in (self.mask_id, self.pad_id)]
        for id in ids:
            if id not in self._texts:
                raise ValueError(f'{self._directory}: token id {id} is not in the tokenizer')
        return self._hf.decode(
            ids, skip_special_tokens=not keep_specials, clean_up_tokenization_spaces=False
        )

    def allowed(self, size: int) -> np.ndarray:
        """Returns [size] bool, True for every id of the tokenizer except MASK and PAD.

        EOS is always allowed, although published models also pad with it.

        Raises:
          ValueError: if the model has fewer ids than the tokenizer.
        """
        if size < self.size:
            raise ValueError(
                f'{self._directory}: the tokenizer has ids up to {self.size - 1}, the embedding of '
                f'the model has {size} rows; use the tokenizer files that came with the weights'
            )
        allowed = np.zeros(size, bool)
        allowed[list(self._texts)] = True
        allowed[[self.mask_id, self.pad_id]] = False
        allowed[self.eos_id] = True  # EOS comes after PAD, because both may be the same id.
        return allowed

    def with_mask(self, rows: int) -> 'HFTokenizer':
        """Returns the tokenizer with a MASK of its own, for a model that was trained without one.

        MASK is the first of these that there is: the declared mask token, a special token called
        mask, an id of the embedding that has no token, and a special token that is reserved.

        Args:
          rows: ids of the model.

        Raises:
          ValueError: there is none of these.
        """
        specials = {id: token.content for id, token in self._hf.added_tokens_decoder.items()}
        specials = {id: text for id, text in specials.items() if id < rows}
        declared = self._ids.get(self._hf.special_tokens_map.get('mask_token'))
        called = [id for id, text in specials.items() if text.strip('<|>[]').lower() == 'mask']
        unused = (id for id in range(rows) if id not in self._texts)
        reserved = [id for id, text in specials.items() if 'reserved' in text]
        places = (declared, *called[:1], next(unused, None), *reserved[-1:])
        mask = next((id for id in places if id is not None), None)
        if mask is None:
            raise ValueError(
                f'{self._directory}: there is no room for MASK, since each of the {rows} rows of '
                'the embedding has an ordinary token; use a model with an unused row, a mask token '
                'or a reserved one'
            )
        return HFTokenizer(self._directory, mask, self.eos_id, self.pad_id)

    def identity(self) -> str:
        """Returns a digest of the tokenizer files, the chat template among them."""
        digest = hashlib.sha256(str(self._files()).encode())
        for name in self._files():
            digest.update((self._directory / name).read_bytes())
        return digest.hexdigest()

    def _files(self) -> list[str]:
        names = {SETTINGS, *FILES, *self._hf.vocab_files_names.values()}
        return sorted(name for name in names if (self._directory / name).is_file())

    def save(self, directory: Path) -> dict[str, Any]:
        """Copies the tokenizer files byte for byte into a new directory; returns the ids."""
        directory.mkdir()
        for name in self._files():
            shutil.copyfile(self._directory / name, directory / name)
        ids = {'mask_id': self.mask_id, 'eos_id': self.eos_id, 'pad_id': self.pad_id}
        return {'hf_tokenizer': ids}

    def _check_ids(self) -> None:
        """Refuses files whose EOS, PAD or MASK is not the one that the model was trained with."""
        specials = self._hf.special_tokens_map
        for name, id in (('eos', self.eos_id), ('pad', self.pad_id), ('mask', self.mask_id)):
            token = specials.get(f'{name}_token')
            # Only EOS must be declared, because it ends every completion. Many files do not declare
            # MASK, and a completion never depends on PAD.
            if (token or name == 'eos') and (token is None or self._ids.get(token) != id):
                declared = f'{token!r}, id {self._ids.get(token)}' if token else 'missing'
                raise ValueError(
                    f'{self._settings}: {name}_token is {declared}, but the model was trained with '
                    f'{name}_token_id {id} (its config.json); use the tokenizer files that came '
                    'with the weights'
                )
        mask = self._texts.get(self.mask_id)
        added = self._hf.added_tokens_decoder.get(self.mask_id)
        if mask is not None and not (added and added.special):
            raise ValueError(
                f'{self._directory}: mask_token_id {self.mask_id} of config.json is the ordinary '
                f'token {mask!r} of the tokenizer; use the files that came with the weights'
            )

    def _checked_template(self) -> ChatTemplate:
        """The chat template.

        Raises:
          ValueError: if it is missing, fails, needs too much time or memory, or writes tokens that
            do not exist.
        """
        if not self._hf.chat_template:
            raise ValueError(
                f'{self._settings} has no chat_template, and no chat_template.jinja is beside it; '
                'use the tokenizer files of an instruction-tuned checkpoint'
            )
        try:
            template = self._hf.get_chat_template()
            turns = try_out(template, self._hf.special_tokens_map)
        except ValueError as error:
            raise self._unusable_template(' '.join(str(error).split())) from error
        for marker in _MARKER.findall(turns[0]):
            if marker not in self._ids:
                raise ValueError(
                    f'{self._settings}: the chat_template writes {marker!r}, which is no token of '
                    'the tokenizer; use the tokenizer files that came with the weights'
                )
        return ChatTemplate(template, self._hf.special_tokens_map)

    def _unusable_template(self, cause: str) -> ValueError:
        return ValueError(
            f'{self._settings}: the chat_template cannot be used ({cause[:200]}); '
            'use the tokenizer files that came with the weights'
        )


def _read(directory: Path) -> Any:
    """The tokenizer that `transformers` makes from local files; no code in them is run."""
    # transformers reads this variable when it is imported, and then does not warn that PyTorch is
    # missing, which is not needed here.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    try:
        import jinja2  # noqa: F401 (transformers needs it to run chat templates)
        import transformers
    except ImportError as error:
        raise ValueError(
            f'{directory} has a published tokenizer, which needs {error.name}; pip install -e '
            "'.[hf]'"
        ) from None
    if not (directory / SETTINGS).is_file():
        raise ValueError(
            f'{directory / SETTINGS} does not exist; put the tokenizer files beside the weights'
        )
    settings = read_json(directory / SETTINGS, _Settings, 'download it again')
    # Otherwise it warns that it has no LLaDA model. The model is implemented in this package.
    transformers.logging.set_verbosity_error()
    try:
        folder, equivalent = (
            str(directory.absolute()),
            _EQUIVALENTS.get(settings.get('tokenizer_class') or ''),
        )
        if equivalent:
            tokenizer = getattr(transformers, equivalent).from_pretrained(
                folder, local_files_only=True
            )
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            raise TypeError(f'tokenizer_class makes a {type(tokenizer).__name__}')
        return tokenizer
    except Exception as error:  # The libraries raise many types, even Exception itself.
        raise ValueError(
            f'{directory}: the tokenizer cannot be read ({one_line(error)[:200]}); download '
            f'tokenizer.json and {SETTINGS} again'
        ) from error

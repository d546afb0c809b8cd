"""Published tokenizers with their chat templates, through `transformers` (extra 'hf')."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = 'tokenizer_config.json'
FILES = ('tokenizer.json', 'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja')
_MARKER = re.compile(r'<\|[^|<>]*\|>')  # how chat templates write what must be one token


class HFTokenizer:
    """A published tokenizer and its chat template, read by `transformers` from local files only.

    The special ids are those the model was trained with, from its config.json. Files that say
    otherwise belong to another model and are refused.
    """

    def __init__(self, directory: Path, mask_id: int, eos_id: int, pad_id: int):
        """Reads the tokenizer files in `directory`.

        Raises:
          ValueError: `transformers` is not installed, the files cannot be read, or they do not fit
            the ids; one line with the file and what to do.
        """
        self.mask_id, self.eos_id, self.pad_id = mask_id, eos_id, pad_id
        self._directory, self._settings = directory, directory / SETTINGS
        self._hf = _read(directory)
        self._ids = self._hf.get_vocab()
        self._texts = {id: text for text, id in self._ids.items()}
        self.size = max(self._texts, default=-1) + 1
        unknown = self._ids.get(self._hf.special_tokens_map.get('unk_token'))
        # Some tokenizers that know every byte name EOS as what stands for the unknown.
        self._unknown = None if unknown == eos_id else unknown
        self._check_ids()
        self._check_template()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` as it stands: nothing is put before or after it.

        Raises:
          ValueError: the tokenizer has no id for a part of it.
        """
        ids = self._hf.encode(text, add_special_tokens=False)
        if self._unknown is not None and self._unknown in ids:
            raise ValueError(
                f'{self._directory}: the tokenizer has no id for a part of {text[:60]!r}; use only '
                'what its vocabulary has'
            )
        return ids

    def encode_prompt(self, text: str, prefill: str = '') -> list[int]:
        """Returns the ids of `text` as one user turn of the chat template, the opening of the
        answer, and `prefill`; raises as `encode`."""
        # The template writes the start token itself, which is why `encode` must not add one.
        return self.encode(self._user_turn(text) + prefill)

    def decode(self, ids: Sequence[int], keep_specials: bool = False) -> str:
        """Returns the text of `ids`.

        Args:
          ids: [n] token ids.
          keep_specials: False stops before the first EOS and drops every special token; True shows
            all of them, as published scorers see a completion.

        Raises:
          ValueError: an id that the tokenizer does not have.
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
        """Returns [size] bool, True for EOS and the other ids of the tokenizer but MASK and PAD.

        Raises:
          ValueError: the model has fewer ids than the tokenizer.
        """
        if size < self.size:
            raise ValueError(
                f'{self._directory}: the tokenizer has ids up to {self.size - 1}, the embedding of '
                f'the model has {size} rows; use the tokenizer files that came with the weights'
            )
        allowed = np.zeros(size, bool)
        allowed[list(self._texts)] = True
        allowed[[self.mask_id, self.pad_id]] = False
        allowed[self.eos_id] = True  # published models pad with EOS
        return allowed

    def save(self, directory: Path) -> dict[str, Any]:
        """Copies its files, byte for byte, into `directory`, which it makes; returns its ids."""
        directory.mkdir()
        for name in {SETTINGS, *FILES, *self._hf.vocab_files_names.values()}:
            if (self._directory / name).is_file():
                shutil.copyfile(self._directory / name, directory / name)
        ids = {'mask_id': self.mask_id, 'eos_id': self.eos_id, 'pad_id': self.pad_id}
        return {'hf_tokenizer': ids}

    def _user_turn(self, text: str) -> str:
        return self._hf.apply_chat_template(
            [{'role': 'user', 'content': text}], tokenize=False, add_generation_prompt=True
        )

    def _check_ids(self) -> None:
        """Refuses files in which EOS, PAD or MASK is not what the model was trained with."""
        named = self._hf.special_tokens_map
        for name, ours in (('eos', self.eos_id), ('pad', self.pad_id), ('mask', self.mask_id)):
            token = named.get(f'{name}_token')
            # Few files name MASK, and PAD is never looked at; EOS ends every completion.
            if (token or name == 'eos') and (token is None or self._ids.get(token) != ours):
                found = f'{token!r}, id {self._ids.get(token)}' if token else 'missing'
                raise ValueError(
                    f'{self._settings}: {name}_token is {found}, but the model was trained with '
                    f'{name}_token_id {ours} (its config.json); use the tokenizer files that came '
                    'with the weights'
                )
        mask = self._texts.get(self.mask_id)
        added = self._hf.added_tokens_decoder.get(self.mask_id)
        if mask is not None and not (added and added.special):
            raise ValueError(
                f'{self._directory}: mask_token_id {self.mask_id} of config.json is the ordinary '
                f'token {mask!r} of the tokenizer; use the files that came with the weights'
            )

    def _check_template(self) -> None:
        """Refuses a chat template that is missing, fails, or uses tokens that are not there."""
        if not self._hf.chat_template:
            raise ValueError(
                f'{self._settings} has no chat_template, and no chat_template.jinja is beside it; '
                'use the tokenizer files of an instruction-tuned checkpoint'
            )
        try:
            turn = self._user_turn('')
        except Exception as error:  # a template is a program: it fails in any way it likes
            line = ' '.join(f'{type(error).__name__}: {error}'.split())
            raise ValueError(
                f'{self._settings}: the chat_template cannot be used ({line[:200]}); use the '
                'tokenizer files that came with the weights'
            ) from error
        for marker in _MARKER.findall(turn):
            if marker not in self._ids:
                raise ValueError(
                    f'{self._settings}: the chat_template writes {marker!r}, which is no token of '
                    'the tokenizer; use the tokenizer files that came with the weights'
                )


def _read(directory: Path) -> Any:
    """The tokenizer that `transformers` makes of local files, running no code that lies there."""
    # Read when transformers is imported: that there is no PyTorch is no news here.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    try:
        import jinja2  # noqa: F401 (what transformers runs chat templates with)
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
    transformers.logging.set_verbosity_error()  # it warns that it has no LLaDA model: we have
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(directory.absolute()), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries below raise anything, Exception itself included
        line = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise ValueError(
            f'{directory}: the tokenizer cannot be read ({line[:200]}); download tokenizer.json '
            f'and {SETTINGS} again'
        ) from error

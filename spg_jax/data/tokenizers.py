"""Text to token ids and back, for policies small enough to have a vocabulary of their own.

`spg_jax.data.hf_tokenizer` has the published tokenizers.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MASK, EOS, PAD = '<mask>', '<eos>', '<pad>'
SPECIALS = (MASK, EOS, PAD)
_SPACE = re.compile(r'\s*')


class Tokenizer(Protocol):
    """What a policy's data needs of a tokenizer, whoever made it."""

    mask_id: int
    eos_id: int
    pad_id: int
    size: int  # ids the tokenizer has: 0 .. size - 1

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without EOS; a ValueError names what it has no id for."""

    def encode_prompt(self, text: str, prefill: str = '') -> list[int]:
        """Returns the ids of what a completion follows: `text` as the policy expects to be asked,
        then `prefill`, which the completion is made to start with; raises as `encode`."""

    def decode(self, ids: Sequence[int], keep_specials: bool = False) -> str:
        """Returns the text of `ids` up to the first EOS, or all of it, special tokens included."""

    def allowed(self, size: int) -> np.ndarray:
        """Returns [size] bool: those of a model's `size` ids that generation may choose."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Makes `directory` if it is read from files, and puts them there; returns its part of a
        policy's description, JSON values."""


class WordTokenizer:
    """One token a word; words are separated by white space or simply follow each other.

    Ids 0, 1, 2 are MASK, EOS and PAD, then come the words in the order given. Encoding takes the
    longest word that fits, except that a number is never cut in two: with words up to 100, `300` is
    an error and not `30 0`. With single digits only, `4312` is four tokens.
    """

    mask_id, eos_id, pad_id = range(len(SPECIALS))

    def __init__(self, words: Sequence[str]):
        """Takes the words of the vocabulary.

        Raises:
          ValueError: no word at all, or one that is repeated, empty, special, or has white space
            inside.
        """
        self.words = tuple(words)
        if not self.words:
            raise ValueError('a vocabulary needs at least one word')
        seen = set(SPECIALS)
        for word in self.words:
            if word in seen or not word or word.split() != [word]:
                raise ValueError(
                    f'word {word!r} cannot be in a vocabulary: words must be distinct, not special '
                    f'({", ".join(SPECIALS)}) and without white space'
                )
            seen.add(word)
        self._texts = (*SPECIALS, *self.words)
        self._ids = {text: id for id, text in enumerate(self._texts)}
        self.size = len(self._texts)
        whole = r'(?![0-9])' if any(word.isdigit() and len(word) > 1 for word in self.words) else ''
        longest_first = sorted(self.words, key=len, reverse=True)
        self._word = re.compile(
            '|'.join(re.escape(word) + whole * word.isdigit() for word in longest_first)
        )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the words of `text`.

        Raises:
          ValueError: names the first thing that is no word, and where it stands.
        """
        ids, place = [], 0
        while True:
            place = _SPACE.match(text, place).end()
            if place == len(text):
                return ids
            found = self._word.match(text, place)
            if not found:
                unknown = text[place:].split(maxsplit=1)[0][:40]
                raise ValueError(
                    f'{unknown!r} at character {place} is none of the {len(self.words)} words '
                    f'{self.words[0]!r} to {self.words[-1]!r}; use only these or another format'
                )
            ids.append(self._ids[found[0]])
            place = found.end()

    def encode_prompt(self, text: str, prefill: str = '') -> list[int]:
        """Returns the ids of `text` and `prefill`, one after the other; raises as `encode`."""
        return self.encode(text + prefill)

    def decode(self, ids: Sequence[int], keep_specials: bool = False) -> str:
        """Returns the words of `ids` joined by single spaces.

        Args:
          ids: [n] token ids.
          keep_specials: False stops before the first EOS and drops MASK and PAD; True shows every
            token.

        Raises:
          ValueError: an id that the vocabulary does not have.
        """
        words = []
        for id in map(int, ids):
            if not 0 <= id < self.size:
                raise ValueError(f'token id {id} is outside the vocabulary of {self.size}')
            if id == self.eos_id and not keep_specials:
                break
            if id >= len(SPECIALS) or keep_specials:
                words.append(self._texts[id])
        return ' '.join(words)

    def allowed(self, size: int) -> np.ndarray:
        """Returns [size] bool, True for EOS and the words: not MASK, not PAD, no id without a word.

        Raises:
          ValueError: the model has fewer ids than the vocabulary.
        """
        if size < self.size:
            raise ValueError(
                f'a model with {size} token ids cannot use a vocabulary of {self.size}'
            )
        allowed = np.arange(size) < self.size
        allowed[[self.mask_id, self.pad_id]] = False
        return allowed

    def save(self, directory: Path) -> dict[str, Any]:
        """Returns its words; they need no file."""
        return {'words': self.words}

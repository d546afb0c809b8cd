"""Tokenizers turn text into token ids and back; this one is for small policies trained here.

Published tokenizers are in `spg_jax.data.hf_tokenizer`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spg_jax.tasks.task import Task

MASK, EOS, PAD = '<mask>', '<eos>', '<pad>'
SPECIALS = (MASK, EOS, PAD)
_SPACE = re.compile(r'\s*')


class Tokenizer(Protocol):
    """What a policy needs of a tokenizer, whether it is published or made here."""

    mask_id: int
    eos_id: int
    pad_id: int
    size: int  # the largest id plus 1

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without EOS; raises ValueError for text that has no ids."""

    def encode_prompt(self, text: str, prefill: str = '') -> list[int]:
        """Returns the ids that a completion follows; raises what `encode` raises.

        Args:
          text: the question, which is written in the form that the policy expects.
          prefill: the start of the answer, which follows the question.
        """

    def decode(self, ids: Sequence[int], keep_specials: bool = False) -> str:
        """Returns the text of `ids` up to the first EOS, or of all ids, special tokens included."""

    def allowed(self, size: int) -> np.ndarray:
        """Returns [size] bool, True for the ids of a model with `size` ids that it may generate."""

    def with_mask(self, rows: int) -> 'Tokenizer':
        """Returns the tokenizer with a MASK that stands for no token, of a model with `rows` ids.

        Raises:
          ValueError: if there is no room for it.
        """

    def identity(self) -> str:
        """Returns text that differs wherever the tokenizer may encode a prompt differently."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Saves the tokenizer with a policy.

        A tokenizer that was read from files creates `directory` and puts the files there.

        Returns:
          JSON values for the policy's description, from which the tokenizer can be made again.
        """


class WordTokenizer:
    """One token for each word; words are separated by white space or follow each other directly.

    Ids 0, 1 and 2 are MASK, EOS and PAD. The words follow in the order of the vocabulary. Encoding
    takes the longest word that fits, except that a number is never cut in two: with the numbers up
    to 100 as words, `300` is an error and not `30 0`. If all numbers in the vocabulary are single
    digits, `4312` is four tokens.
    """

    mask_id, eos_id, pad_id = range(len(SPECIALS))

    def __init__(self, words: Sequence[str]):
        """Takes the words of the vocabulary.

        Raises:
          ValueError: if there is no word, or a word is repeated, empty, special, or contains white
            space.
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
          ValueError: if a part of the text is no word; the message names the part and its place.
        """
        ids, place = [], 0
        while True:
            place = _SPACE.match(text, place).end()
            if place == len(text):
                return ids
            match = self._word.match(text, place)
            if not match:
                unknown = text[place:].split(maxsplit=1)[0][:40]
                raise ValueError(
                    f'{unknown!r} at character {place} is none of the {len(self.words)} words '
                    f'{self.words[0]!r} to {self.words[-1]!r}; use only these or another format'
                )
            ids.append(self._ids[match[0]])
            place = match.end()

    def encode_prompt(self, text: str, prefill: str = '') -> list[int]:
        """Returns the ids of `text` followed by `prefill`; raises what `encode` raises."""
        return self.encode(text + prefill)

    def decode(self, ids: Sequence[int], keep_specials: bool = False) -> str:
        """Returns the words of `ids` joined by single spaces.

        Args:
          ids: [n] token ids.
          keep_specials: False stops before the first EOS and drops MASK and PAD; True keeps every
            token.

        Raises:
          ValueError: if the vocabulary does not have one of the ids.
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
        """Returns [size] bool, True for EOS and the words only.

        Raises:
          ValueError: if the model has fewer ids than the vocabulary.
        """
        if size < self.size:
            raise ValueError(
                f'a model with {size} token ids cannot use a vocabulary of {self.size}'
            )
        allowed = np.arange(size) < self.size
        allowed[[self.mask_id, self.pad_id]] = False
        return allowed

    def with_mask(self, rows: int) -> 'WordTokenizer':
        """Returns this tokenizer, which always has a MASK."""
        return self

    def identity(self) -> str:
        """Returns the words, one after the other."""
        return ' '.join(self.words)

    def save(self, directory: Path) -> dict[str, Any]:
        """Returns the words for the policy's description; they need no file in `directory`."""
        return {'words': self.words}


def word_tokenizer(task: Task) -> WordTokenizer:
    """Returns the tokenizer of a policy that is trained here from nothing.

    Raises:
      ValueError: the task has no vocabulary, or one that cannot be used.
    """
    if not task.vocabulary:
        raise ValueError(
            f'task {task.name} has no vocabulary, from which a policy could be trained here; set '
            'base.checkpoint, or define the vocabulary in the file of an own task'
        )
    return WordTokenizer(task.vocabulary)

"""Prompts as tokens, and how many tokens each has: measured once, and kept beside the problems."""

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from spg_jax.data.tokenizers import Tokenizer
from spg_jax.process import distributed
from spg_jax.process.files import write_whole
from spg_jax.tasks.source import Source
from spg_jax.tasks.task import Example, Task

READ_AT_ONCE = 1024  # problems that are in memory together while all prompts are measured


def prompt_tokens(task: Task, tokenizer: Tokenizer, example: Example) -> list[int]:
    """The ids of a prompt and of the prefill, with which the answer is made to start."""
    return tokenizer.encode_prompt(task.prompt(example), task.prefill)


def prompt_lengths(
    task: Task,
    tokenizer: Tokenizer,
    source: Sequence[Example],
    examples: Sequence[Example] | None = None,
) -> np.ndarray:
    """The number of tokens of every prompt, [N] int32.

    Reading 100,000 problems takes many seconds, so the numbers are kept in a file beside them. Its
    name says which wording, tokenizer and problems they are for, by a digest of all three.

    Args:
      task: writes the prompts.
      tokenizer: the tokenizer of the policy.
      source: the problems.
      examples: all problems of `source`, if they are in memory, so that none is read again.
    """
    kept = _kept_file(task, tokenizer, source) if isinstance(source, Source) else None
    lengths = _read(kept, len(source)) if kept else None
    if distributed.largest(int(lengths is None)):  # all processes measure, or none does
        lengths = _measure(task, tokenizer, source if examples is None else examples)
        if kept and distributed.is_leader():
            _write(kept, lengths)
    assert lengths is not None
    return lengths


def _measure(task: Task, tokenizer: Tokenizer, source: Sequence[Example]) -> np.ndarray:
    """The lengths [N] int32, of which each process measures a share."""
    share = np.array_split(np.arange(len(source)), jax.process_count())[jax.process_index()]
    lengths, is_local = np.zeros(len(source), np.int32), np.zeros(len(source), bool)
    is_local[share] = True
    for places in np.array_split(share, -(-len(share) // READ_AT_ONCE) or 1):
        if places.size:
            examples = source[places[0] : places[-1] + 1]
            lengths[places] = [len(prompt_tokens(task, tokenizer, each)) for each in examples]
    return distributed.merge(lengths, is_local)


def _kept_file(task: Task, tokenizer: Tokenizer, source: Source) -> Path:
    identity = [task.name, task.format, task.template, task.prefill, tokenizer.identity()]
    # The prompts of a task of the user may change with its file alone.
    files = [path.read_bytes() for path in task.defining_files().values()]
    digests = [hashlib.sha256(contents).hexdigest() for contents in files]
    text = json.dumps([*identity, source.digest(), *digests])
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return source.directory / f'prompt_lengths-{name}.npz'


def _read(path: Path, count: int) -> np.ndarray | None:
    """The lengths in a file; None if it is not there or not whole."""
    with contextlib.suppress(Exception):  # a damaged archive raises errors of many classes
        with np.load(path, allow_pickle=False) as file:
            lengths, digest = file['lengths'], str(file['digest'])
        whole = lengths.shape == (count,) and lengths.dtype == np.int32
        if whole and hashlib.sha256(lengths.tobytes()).hexdigest() == digest:
            return lengths
    return None


def _write(path: Path, lengths: np.ndarray) -> None:
    content = io.BytesIO()
    digest = hashlib.sha256(lengths.tobytes()).hexdigest()
    np.savez_compressed(content, lengths=lengths, digest=np.array(digest))
    with contextlib.suppress(OSError):  # another user's data may be read, and not written
        write_whole(path, content.getvalue())

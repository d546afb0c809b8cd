"""Prompts and demonstrations as batches of tokens, by grain: deterministic, and resumable by its
state."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from spg_jax.tasks import reading
from spg_jax.tasks.task import Example, Task
from spg_jax.tokenizers import Tokenizer

# One thread ahead of the training step is enough, and leaves it the cores.
_READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


Record = tuple[Example, str]  # a problem with an answer to imitate


class PromptBatch(NamedTuple):
    """Tokenised prompts beside the problems they came from."""

    prompt: np.ndarray  # [B, P] int32, left-padded
    prompt_mask: np.ndarray  # [B, P] bool, False on padding
    index: np.ndarray  # [B] uint32, of the problem in its split
    examples: Sequence[Example]  # B problems, as the task's rewards and scores take them


class Demonstrations(NamedTuple):
    """Prompts with an answer each, for supervised training."""

    prompt: np.ndarray  # [B, P] int32, left-padded
    prompt_mask: np.ndarray  # [B, P] bool
    completion: np.ndarray  # [B, C] int32, filled up with EOS
    index: np.ndarray  # [B] uint32, of the problem among those the batches are drawn from


def encode_prompts(
    task: Task, tokenizer: Tokenizer, examples: Sequence[Example], length: int
) -> PromptBatch:
    """Left-pads the prompts of `examples` to `length` tokens.

    A format's prefill, which the completion is made to start with, ends the prompt.

    Raises:
      ValueError: if a prompt is longer, with its length and what to set.
    """
    tokens = [tokenizer.encode(task.prompt(example) + task.prefill) for example in examples]
    prompt, prompt_mask = left_pad(tokens, length, tokenizer.pad_id)
    index = np.array([example['index'] for example in examples], np.uint32)
    return PromptBatch(prompt, prompt_mask, index, examples)


def left_pad(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, length] int32 and [B, length] bool, False on padding.

    Raises:
      ValueError: if a row is longer, with its length and what to set.
    """
    tokens, valid = (
        np.full((len(rows), length), pad_id, np.int32),
        np.zeros((len(rows), length), bool),
    )
    for row, given in enumerate(rows):
        if len(given) > length:
            raise ValueError(
                f'a prompt has {len(given)} tokens, more than sampling.prompt_length {length}; '
                f'set it to at least {len(given)}'
            )
        if given:
            tokens[row, -len(given) :], valid[row, -len(given) :] = given, True
    return tokens, valid


def encode_completions(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """[B, C] int32: each text, then EOS to the end.

    Raises:
      ValueError: if a text and its EOS do not fit `length` tokens.
    """
    completion = np.full((len(texts), length), tokenizer.eos_id, np.int32)
    for row, text in enumerate(texts):
        tokens = tokenizer.encode(text)
        if len(tokens) >= length:
            raise ValueError(
                f'the demonstration {text!r} has {len(tokens)} tokens and an EOS, more than '
                f'sampling.length {length}; set it to at least {len(tokens) + 1}'
            )
        completion[row, : len(tokens)] = tokens
    return completion


def prompts(
    task: Task,
    tokenizer: Tokenizer,
    source: Sequence[Example],
    *,
    batch_size: int,
    length: int,
    seed: int,
) -> grain.DatasetIterator:
    """Endless shuffled batches of prompts; the iterator has get_state and set_state."""
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    dataset = dataset.batch(
        batch_size, batch_fn=lambda examples: encode_prompts(task, tokenizer, examples, length)
    )
    return iter(dataset.to_iter_dataset(_READING))


def demonstrations(
    task: Task,
    tokenizer: Tokenizer,
    source: Sequence[Example],
    *,
    right_share: float,
    batch_size: int,
    prompt_length: int,
    length: int,
    seed: int,
) -> grain.DatasetIterator:
    """Endless shuffled batches of answers by the task's imperfect demonstrator, fresh in every
    epoch."""

    def demonstrate(example: Example, rng: np.random.Generator) -> Record:
        return example, task.demonstration(example, rng, right_share)

    return _supervised(
        grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(demonstrate),
        task,
        tokenizer,
        batch_size,
        prompt_length,
        length,
    )


def read_demonstrations(path: str, task: Task) -> list[Record]:
    """Problems of `task` with an answer each, from JSON lines {"example", "completion"}.

    Raises:
      ValueError: naming the file, the line, what was found and what was expected.
    """
    records = []
    for where, row in reading.json_lines(path):
        try:
            example, completion = row['example'] | {'index': len(records)}, row['completion']
            task.prompt(example)
        except (AttributeError, KeyError, TypeError, ValueError):
            completion = None
        if not isinstance(completion, str):
            raise ValueError(
                f'{where}: found {reading.shown(row)}, expected {{"example": a problem of '
                f'{task.name}, "completion": text}}'
            )
        records.append((example, completion))
    return records


def recorded_demonstrations(
    task: Task,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    batch_size: int,
    prompt_length: int,
    length: int,
    seed: int,
) -> grain.DatasetIterator:
    """Endless shuffled batches of given (problem, answer) pairs: supervised fine-tuning on one's
    own data."""
    dataset = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
    return _supervised(dataset, task, tokenizer, batch_size, prompt_length, length)


def _supervised(
    dataset, task, tokenizer, batch_size, prompt_length, length
) -> grain.DatasetIterator:
    def encode(pairs: Sequence[Record]) -> Demonstrations:
        examples, answers = zip(*pairs, strict=True)
        prompt = encode_prompts(task, tokenizer, examples, prompt_length)
        completion = encode_completions(tokenizer, answers, length)
        return Demonstrations(prompt.prompt, prompt.prompt_mask, completion, prompt.index)

    return iter(dataset.batch(batch_size, batch_fn=encode).to_iter_dataset(_READING))

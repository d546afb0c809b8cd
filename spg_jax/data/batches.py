"""Prompts and demonstrations as batches of tokens, by grain: deterministic, and resumable by its
state."""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from spg_jax.data.tokenizers import Tokenizer
from spg_jax.process import distributed
from spg_jax.tasks import reading
from spg_jax.tasks.task import Example, Task

# One thread ahead of the training step is enough, and leaves it the cores.
_READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


READ_AT_ONCE = 1024  # problems, when reading all

Record = tuple[Example, str]  # a problem with an answer to imitate
LONG_PROMPTS = ('drop', 'truncate_left', 'error')  # what to do with prompts that do not fit


class PromptBatch(NamedTuple):
    """Tokenised prompts beside the problems they came from."""

    prompt: np.ndarray  # [B, P] int32, left-padded
    prompt_mask: np.ndarray  # [B, P] bool, False on padding
    index: np.ndarray  # [B] uint32, of the problem in its split
    examples: Sequence[Example]  # B problems, as the task's rewards and scores take them


class Problems(NamedTuple):
    """The problems of a split that are trained on."""

    source: Sequence[Example]
    kept: np.ndarray  # [n] int64, their places in `source`
    lengths: np.ndarray  # [n] int32, tokens of their prompts, cut if they are to be


class Demonstrations(NamedTuple):
    """Prompts with an answer each, for supervised training."""

    prompt: np.ndarray  # [B, P] int32, left-padded
    prompt_mask: np.ndarray  # [B, P] bool
    completion: np.ndarray  # [B, C] int32, filled up with EOS
    index: np.ndarray  # [B] uint32, of the problem among those the batches are drawn from


def fit_prompts(
    task: Task, tokenizer: Tokenizer, source: Sequence[Example], length: int, long_prompts: str
) -> tuple[Problems, str]:
    """Looks at every training prompt before any work is done with it; each process at its share.

    Args:
      source: the problems.
      length: P, the tokens there is room for.
      long_prompts: one of LONG_PROMPTS, what to do with longer ones.

    Returns:
      (the problems to use, what happened to others in one line or '').

    Raises:
      ValueError: prompts that do not fit and may be neither dropped nor cut, or none that fits.
    """
    lengths = _prompt_lengths(task, tokenizer, source)
    everything = np.arange(len(source))
    longer, longest = int((lengths > length).sum()), lengths.max(initial=0)
    if not longer:
        return Problems(source, everything, lengths), ''
    found = (
        f'{longer} of {len(source)} training prompts are longer than sampling.prompt_length '
        f'{length}, up to {longest} tokens'
    )
    if long_prompts == 'truncate_left':
        cut = Problems(source, everything, np.minimum(lengths, length))
        return cut, f'{found}: cut to their last {length}'
    droppable = longer < len(source)
    if long_prompts == 'error' or not droppable:
        remedy = "'truncate_left' or 'drop'" if droppable else "'truncate_left'"
        raise ValueError(f'{found}; set it to at least {longest}, or data.long_prompts to {remedy}')
    fits = lengths <= length
    return Problems(source, everything[fits], lengths[fits]), f'{found}: dropped'


def _prompt_lengths(task: Task, tokenizer: Tokenizer, source: Sequence[Example]) -> np.ndarray:
    """Tokens of every prompt, [N] int32; each process reads and measures its share of them."""
    share = np.array_split(np.arange(len(source)), jax.process_count())[jax.process_index()]
    lengths, known = np.zeros(len(source), np.int32), np.zeros(len(source), bool)
    known[share] = True
    for some in np.array_split(share, -(-len(share) // READ_AT_ONCE) or 1):
        if some.size:
            examples = source[some[0] : some[-1] + 1]
            lengths[some] = [len(prompt_tokens(task, tokenizer, each)) for each in examples]
    return distributed.merge(lengths, known)


def padded_length(longest: int, buckets: Sequence[int]) -> int:
    """What to pad prompts to: the smallest bucket with room for the longest; past them all, the
    next multiple of 64. Few lengths mean few programs."""
    room = [bucket for bucket in buckets if bucket >= longest]
    return min(room) if room else -(-longest // 64) * 64


def prompt_tokens(task: Task, tokenizer: Tokenizer, example: Example) -> list[int]:
    """The ids of a prompt and of the prefill, which the completion is made to start with."""
    return tokenizer.encode_prompt(task.prompt(example), task.prefill)


def encode_prompts(
    task: Task,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    length: int,
    truncate: bool = False,
) -> PromptBatch:
    """Left-pads the prompts of `examples` to `length` tokens; otherwise as `left_pad`."""
    tokens = [prompt_tokens(task, tokenizer, example) for example in examples]
    prompt, prompt_mask = left_pad(tokens, length, tokenizer.pad_id, truncate)
    index = np.array([example['index'] for example in examples], np.uint32)
    return PromptBatch(prompt, prompt_mask, index, examples)


def left_pad(
    rows: Sequence[Sequence[int]], length: int, pad_id: int, truncate: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, length] int32 and [B, length] bool, False on padding.

    Args:
      truncate: keep the last `length` tokens of a longer row, start token lost, as released.

    Raises:
      ValueError: if a row is longer and not truncated, with its length and what to set.
    """
    if truncate:
        rows = [row[-length:] for row in rows]
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


def encode_pairs(
    task: Task, tokenizer: Tokenizer, pairs: Sequence[Record], prompt_length: int, length: int
) -> Demonstrations:
    """Tokenised problems and answers.

    Raises:
      ValueError: if a prompt or an answer does not fit, whatever `data.long_prompts` says.
    """
    examples, answers = zip(*pairs, strict=True)
    prompt = encode_prompts(task, tokenizer, examples, prompt_length)
    completion = encode_completions(tokenizer, answers, length)
    return Demonstrations(prompt.prompt, prompt.prompt_mask, completion, prompt.index)


def prompts(
    task: Task,
    tokenizer: Tokenizer,
    problems: Problems,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    truncate: bool = False,
    own: np.ndarray | None = None,
) -> grain.DatasetIterator:
    """Endless shuffled batches of prompts; the iterator has get_state and set_state.

    Args:
      problems: from `fit_prompts`.
      batch_size: prompts a batch, over all processes.
      buckets: lengths to pad to; a batch takes the smallest that fits all its prompts.
      seed: of the order.
      truncate: cut prompts longer than all buckets.
      own: [b] which prompts of a batch this process reads; None is all.
    """

    def encode(places: np.ndarray) -> PromptBatch:
        length = padded_length(problems.lengths[places].max(), buckets)
        mine = problems.kept[places if own is None else places[own]]
        examples = [problems.source[int(place)] for place in mine]
        return encode_prompts(task, tokenizer, examples, length, truncate)

    places = grain.MapDataset.range(len(problems.kept)).seed(seed).shuffle().repeat()
    return iter(places.batch(batch_size).map(encode).to_iter_dataset(_READING))


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
    own: np.ndarray,
) -> grain.DatasetIterator:
    """Endless shuffled batches of answers by the task's imperfect demonstrator, fresh in every
    epoch; `own` [b] are the rows of a batch that this process encodes."""

    def demonstrate(example: Example, rng: np.random.Generator) -> Record:
        return example, task.demonstration(example, rng, right_share)

    return _supervised(
        grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(demonstrate),
        task,
        tokenizer,
        batch_size,
        prompt_length,
        length,
        own,
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
    own: np.ndarray,
) -> grain.DatasetIterator:
    """Endless shuffled batches of given (problem, answer) pairs: supervised fine-tuning on one's
    own data; `own` as in `demonstrations`."""
    dataset = grain.MapDataset.source(records).seed(seed).shuffle().repeat()
    return _supervised(dataset, task, tokenizer, batch_size, prompt_length, length, own)


def _supervised(
    dataset, task, tokenizer, batch_size, prompt_length, length, own
) -> grain.DatasetIterator:
    def encode(pairs: Sequence[Record]) -> Demonstrations:
        mine = [pairs[row] for row in own]
        return encode_pairs(task, tokenizer, mine, prompt_length, length)

    return iter(dataset.batch(batch_size, batch_fn=encode).to_iter_dataset(_READING))

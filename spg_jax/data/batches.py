"""Prompts as batches of tokens, by grain: in an order that a seed fixes, and resumable."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spg_jax.data.prompts import prompt_lengths, prompt_tokens
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.tasks.task import Example, Task

# grain is imported where batches are made: it takes a second, and images for GPUs lack it.
if TYPE_CHECKING:
    import grain

LONG_PROMPTS = ('drop', 'truncate_left', 'error')  # what to do with prompts that do not fit


class PromptBatch(NamedTuple):
    """Tokenised prompts, with the problems that they came from."""

    prompt: np.ndarray  # [B, P] int32, left-padded
    prompt_mask: np.ndarray  # [B, P] bool, False on padding
    # [B] uint32, what tells prompts apart: the place of a problem in its split, and the size of the
    # split added for each time that the problem came before.
    index: np.ndarray
    examples: Sequence[Example]  # the B problems, which rewards and scores read


class Problems(NamedTuple):
    """The problems of a split that training uses."""

    source: Sequence[Example]  # all problems of the split
    places: np.ndarray  # [n] int64, the places in `source` of the problems that are used
    lengths: np.ndarray  # [n] int32, tokens of each prompt, after it was cut if it was too long


def fit_prompts(
    task: Task, tokenizer: Tokenizer, source: Sequence[Example], length: int, long_prompts: str
) -> tuple[Problems, str]:
    """Measures every training prompt before training starts, and applies the rule for long ones.

    Each process measures a share of the prompts.

    Args:
      task: writes the prompts.
      tokenizer: the tokenizer of the policy.
      source: the problems.
      length: P, the largest number of tokens that a prompt may have.
      long_prompts: what to do with longer prompts, one of LONG_PROMPTS.

    Returns:
      (the problems to use, one line that says what happened to long prompts, '' if there are none).

    Raises:
      ValueError: if some prompts are too long and may be neither dropped nor cut, or if all are too
        long and may not be cut.
    """
    lengths = prompt_lengths(task, tokenizer, source)
    all_places = np.arange(len(source))
    too_long, longest = int((lengths > length).sum()), lengths.max(initial=0)
    if not too_long:
        return Problems(source, all_places, lengths), ''
    count = (
        f'{too_long} of {len(source)} training prompts are longer than sampling.prompt_length '
        f'{length}, up to {longest} tokens'
    )
    if long_prompts == 'truncate_left':
        cut = Problems(source, all_places, np.minimum(lengths, length))
        return cut, f'{count}: cut to their last {length}'
    droppable = too_long < len(source)
    if long_prompts == 'error' or not droppable:
        remedy = "'truncate_left' or 'drop'" if droppable else "'truncate_left'"
        raise ValueError(f'{count}; set it to at least {longest}, or data.long_prompts to {remedy}')
    fits = lengths <= length
    return Problems(source, all_places[fits], lengths[fits]), f'{count}: dropped'


def padded_length(longest: int, buckets: Sequence[int]) -> int:
    """The length to pad prompts to: the smallest bucket with room for the longest prompt.

    Beyond all buckets it is the next multiple of 64. Few lengths mean few programs to compile.
    """
    large_enough = [bucket for bucket in buckets if bucket >= longest]
    return min(large_enough) if large_enough else -(-longest // 64) * 64


def encode_prompts(
    task: Task,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    length: int,
    truncate: bool = False,
) -> PromptBatch:
    """The prompts of `examples`, left-padded to `length` tokens as `left_pad` does."""
    tokens = [prompt_tokens(task, tokenizer, example) for example in examples]
    prompt, prompt_mask = left_pad(tokens, length, tokenizer.pad_id, truncate)
    index = np.array([example['index'] for example in examples], np.uint32)
    return PromptBatch(prompt, prompt_mask, index, examples)


def check_room(tokens: int, length: int) -> None:
    """Raises ValueError if a prompt has more tokens than there is room for."""
    if tokens > length:
        raise ValueError(
            f'a prompt has {tokens} tokens, more than sampling.prompt_length {length}; set it to '
            f'at least {tokens}'
        )


def left_pad(
    rows: Sequence[Sequence[int]], length: int, pad_id: int, truncate: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens with padding on their left.

    Args:
      rows: B lists of token ids.
      length: the length of the result.
      pad_id: the id of the padding.
      truncate: whether a longer row is cut to its last `length` tokens, as in the released code.
        Its start token is then lost.

    Returns:
      (tokens [B, length] int32, mask [B, length] bool that is False on padding).

    Raises:
      ValueError: if a row is too long and may not be cut; the message says what to set.
    """
    if truncate:
        rows = [row[-length:] for row in rows]
    tokens, valid = (
        np.full((len(rows), length), pad_id, np.int32),
        np.zeros((len(rows), length), bool),
    )
    for row, ids in enumerate(rows):
        check_room(len(ids), length)
        if ids:
            tokens[row, -len(ids) :], valid[row, -len(ids) :] = ids, True
    return tokens, valid


def prompts(
    task: Task,
    tokenizer: Tokenizer,
    problems: Problems,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    truncate: bool = False,
    local_prompts: np.ndarray | None = None,
) -> 'grain.DatasetIterator':
    """Endless shuffled batches of prompts; the iterator has get_state and set_state.

    Args:
      task: writes the prompts.
      tokenizer: the tokenizer of the policy.
      problems: the result of `fit_prompts`.
      batch_size: prompts in a batch, over all processes.
      buckets: lengths to pad to; a batch takes the smallest that has room for all its prompts.
      seed: determines the order of the problems.
      truncate: whether prompts that are longer than all buckets are cut.
      local_prompts: [b] places in a batch of the prompts that this process reads; None reads all.
    """
    import grain

    count = len(problems.places)

    def encode(drawn: tuple[np.ndarray, np.ndarray]) -> PromptBatch:
        places, times = drawn
        length = padded_length(problems.lengths[places].max(), buckets)
        local = slice(None) if local_prompts is None else local_prompts
        examples = [problems.source[int(place)] for place in problems.places[places[local]]]
        batch = encode_prompts(task, tokenizer, examples, length, truncate)
        before = times[local].astype(np.uint32) * np.uint32(len(problems.source))
        return batch._replace(index=batch.index + before)

    places = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    drawn = places.map_with_index(lambda position, place: (place, position // count))
    return read_ahead(drawn.batch(batch_size).map(encode))


def read_ahead(dataset: 'grain.MapDataset[Any]') -> 'grain.DatasetIterator':
    """An iterator over a data set that makes the next elements while the last one is used.

    One thread is enough to stay ahead of the training step, and leaves the cores to that step.
    """
    import grain

    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

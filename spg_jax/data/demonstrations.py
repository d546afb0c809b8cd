"""Problems with answers to imitate, as batches of tokens for supervised training."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spg_jax.data.batches import encode_prompts, read_ahead
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.random import SEEDS
from spg_jax.tasks import reading
from spg_jax.tasks.task import Example, Task

if TYPE_CHECKING:
    import grain

Record = tuple[Example, str]  # a problem and an answer to imitate


class Lesson(NamedTuple):
    """A problem, an answer to imitate, and an answer to correct with the right one."""

    example: Example
    answer: str
    wrong: str
    right: str


class Corrections(NamedTuple):
    """Completions to correct."""

    wrong: np.ndarray  # [B, C] int32, then EOS to the end
    right: np.ndarray  # [B, C] int32, then EOS to the end


class Demonstrations(NamedTuple):
    """Prompts with one answer each, for supervised training."""

    prompt: np.ndarray  # [B, P] int32, left-padded
    prompt_mask: np.ndarray  # [B, P] bool
    completion: np.ndarray  # [B, C] int32, the answer, then EOS to the end
    index: np.ndarray  # [B] uint32, the place of each problem in the data set of the batches
    corrections: Corrections | None = None  # what is to be corrected; None without


@dataclasses.dataclass(frozen=True, eq=False)
class Lessons:
    """What a policy learns from: the answers of the task's demonstrator, or recorded ones."""

    task: Task
    tokenizer: Tokenizer
    problems: Sequence[Example]  # for the demonstrator; not looked at if there are records
    records: Sequence[Record] | None  # answers to imitate instead
    batch_size: int  # rows in a batch, over all processes
    local_rows: np.ndarray  # [b] the rows of a batch that this process encodes
    prompt_length: int  # P
    length: int  # C
    wrong_share: float | None = None  # of answers to correct; None: there is nothing to correct

    def encode(self, pairs: Sequence[Record]) -> Demonstrations:
        """Tokenises problems and answers; raises as `encode_pairs`."""
        return encode_pairs(self.task, self.tokenizer, pairs, self.prompt_length, self.length)

    def batches(self, right_share: float, seed: int) -> 'grain.DatasetIterator':
        """Endless shuffled batches; the iterator has get_state and set_state.

        Args:
          right_share: the share of right answers that the demonstrator gives, anew in each epoch.
          seed: determines the order, and the demonstrator's answers. It counts modulo 2^32.
        """
        import grain

        def demonstrate(example: Example, rng: np.random.Generator) -> Record:
            return example, self.task.demonstration(example, rng, right_share)

        def encode(pairs: Sequence[Record]) -> Demonstrations:
            return self.encode([pairs[row] for row in self.local_rows])

        def correct(record: Record, rng: np.random.Generator) -> Lesson:
            if self.records is not None:  # Recorded answers are right, and have no wrong ones.
                return Lesson(*record, record[1], record[1])
            return Lesson(*record, *self.task.correction(record[0], rng, self.wrong_share))

        def encode_lessons(lessons: Sequence[Lesson]) -> Demonstrations:
            local = [lessons[row] for row in self.local_rows]
            batch = self.encode([(lesson.example, lesson.answer) for lesson in local])
            wrong, right = (
                encode_completions(self.tokenizer, texts, self.length)
                for texts in zip(*((lesson.wrong, lesson.right) for lesson in local), strict=True)
            )
            return batch._replace(corrections=Corrections(wrong, right))

        source = self.problems if self.records is None else self.records
        # grain takes no seed above, and later stages count on from the one of the configuration.
        dataset = grain.MapDataset.source(source).seed(seed % SEEDS).shuffle().repeat()
        if self.records is None:
            dataset = dataset.random_map(demonstrate)
        if self.wrong_share is not None:
            dataset = dataset.random_map(correct)
            return read_ahead(dataset.batch(self.batch_size, batch_fn=encode_lessons))
        return read_ahead(dataset.batch(self.batch_size, batch_fn=encode))


def encode_completions(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    """The ids of each text, followed by EOS to the end: [B, C] int32, where C is `length`.

    Raises:
      ValueError: if a text and one EOS need more than `length` tokens.
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
      ValueError: if a prompt or an answer is too long. `data.long_prompts` does not apply here.
    """
    examples, answers = zip(*pairs, strict=True)
    prompt = encode_prompts(task, tokenizer, examples, prompt_length)
    completion = encode_completions(tokenizer, answers, length)
    return Demonstrations(prompt.prompt, prompt.prompt_mask, completion, prompt.index)


def read_demonstrations(path: str, task: Task) -> list[Record]:
    """Problems of `task` and their answers, from JSON lines {"example", "completion"}.

    Raises:
      ValueError: if a line is wrong; the message names file and line, and quotes the line.
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

"""What supervised training learns from: lessons of pre-training, and sequences of a conversion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from spg_jax import sharding
from spg_jax.assembly import Parts
from spg_jax.data.batches import check_room
from spg_jax.data.demonstrations import Lessons, Record
from spg_jax.data.prompts import prompt_lengths
from spg_jax.data.sequences import Sequences, pack
from spg_jax.data.tokenizers import Tokenizer
from spg_jax.process import distributed
from spg_jax.runs import policies
from spg_jax.tasks.task import Example
from spg_jax.training.phases import Conversion


def lessons_of(
    config: ml_collections.ConfigDict,
    parts: Parts,
    tokenizer: Tokenizer,
    batch_size: int,
    local_rows: np.ndarray,
    records: list[Record] | None,
) -> Lessons:
    """The records to imitate, or else the problems of the task, which are read now.

    Args:
      config: of the run.
      parts: what it describes.
      tokenizer: of the policy.
      batch_size: demonstrations in a batch, over all processes.
      local_rows: those of a batch that this process encodes.
      records: (problem, answer) pairs; None takes the demonstrator of the task.

    Raises:
      ValueError: a prompt or an answer is too long; `data.long_prompts` does not apply here.
    """
    problems: list[Example] = []
    if records is None:
        with distributed.leader_first('problems to imitate'):
            source = parts.task.source('train', config.task.data_dir)
        problems = list(source)
        longest = prompt_lengths(parts.task, tokenizer, source, problems).max(initial=0)
        check_room(int(longest), config.sampling.prompt_length)
    lessons = Lessons(
        task=parts.task,
        tokenizer=tokenizer,
        problems=problems,
        records=records,
        batch_size=batch_size,
        local_rows=local_rows,
        prompt_length=config.sampling.prompt_length,
        length=config.sampling.length,
        wrong_share=config.base.wrong_share if config.base.edit_weight else None,
    )
    if records is not None:
        lessons.encode(records)  # so that one that is too long shows before training
    return lessons


class Examples:
    """What is learned from, and what the loss is validated on, as rows of tokens."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        parts: Parts,
        conversion: Conversion,
        start_from: Path,
        mesh: Mesh,
        records: list[Record] | None,
    ):
        """Finds the examples, and refuses those that are too long, as `pretrain` does."""
        self._conversion, self._mesh = conversion, mesh
        self._seed, self._right_share = config.base.seed, config.convert.right_share
        tokenizer = policies.load_tokenizer(start_from)
        self._eos_id = tokenizer.eos_id
        rows, documents = config.convert.batch_size, conversion.documents
        batch_size = rows * documents
        if records is None:
            with distributed.leader_first('problems to validate on'):
                source = parts.task.source('validation', config.task.data_dir)
            rng = np.random.default_rng(self._seed)
            held_out = [
                (example, parts.task.demonstration(example, rng, self._right_share))
                for example in source[: max(batch_size, config.evaluation.problems)]
            ]
        else:  # The last tenth of the records is not learned from.
            count = max(batch_size, min(config.evaluation.problems, len(records) // 10))
            records, held_out = records[:-count], records[-count:]
        if len(held_out) < batch_size or records == []:
            raise ValueError(
                f'there are {len(held_out)} examples to validate on and '
                f'{"no" if records == [] else "enough"} others, fewer than a batch of {batch_size} '
                '(convert.batch_size x convert.documents) and one; use a smaller batch or more '
                'examples'
            )
        local = sharding.own_rows(mesh, rows)  # [b]
        members = local[:, None] * documents + np.arange(documents)  # [b, documents]
        self._local = members.reshape(-1)
        self._lessons: Lessons = lessons_of(
            config, parts, tokenizer, batch_size, self._local, records
        )
        groups = [held_out[i : i + batch_size] for i in range(0, len(held_out), batch_size)]
        self._held_out = [
            self.packed(self._lessons.encode([group[place] for place in self._local]))
            for group in groups
            if len(group) == batch_size
        ]

    def batches(self) -> Any:
        """Endless shuffled batches of demonstrations; the iterator has get_state and set_state."""
        return self._lessons.batches(self._right_share, self._seed)

    def packed(self, demonstrations: Any) -> Sequences:
        """The rows of this process of a batch."""
        conversion = self._conversion
        block = conversion.final_block or 1
        return pack(demonstrations, conversion.documents, conversion.length, block, self._eos_id)

    def placed(self, demonstrations: Any) -> Sequences:
        """A batch on the devices."""
        return sharding.put_batch(self._mesh, self.packed(demonstrations))

    def held_out(self) -> Sequence[Sequences]:
        """The batches to validate on, on the devices."""
        return [sharding.put_batch(self._mesh, batch) for batch in self._held_out]

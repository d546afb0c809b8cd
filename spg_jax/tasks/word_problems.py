"""What the tasks on published word problems share: a question, a worked solution, one answer."""

import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from spg_jax.tasks.formats import Format, FormattedTask, fill
from spg_jax.tasks.reading import given_file
from spg_jax.tasks.source import Example

# A completion from the end of the opening reasoning tag to the start of the answer.
WORKED_START = '\n{reasoning}\n</reasoning>\n<answer>\n'
_NUMBER = re.compile('[0-9]+')


class WordProblems(FormattedTask):
    """Examples: {'question': text, 'answer': text, 'solution': text, 'index': int}.

    The solution ends before the answer and may be ''. There is no compact format, because no small
    model is trained from scratch on word problems.
    """

    placeholders = ('question',)
    vocabulary = ()
    formats: ClassVar[dict[str, Format]]
    preparation = 'cutting the published files, which are downloaded if missing'

    def fields(self, example: Example) -> dict[str, str]:
        return {'question': example['question']}

    def to_record(self, example: Example) -> tuple[str, str | None]:
        # A published reference that could not be read is null in files, and '' in a problem.
        return example['question'], example['answer'] or None

    def given_files(self, data_dir: Path) -> list[Path]:
        names = (f'{self.name}_{split}.jsonl' for split in ('train', 'test'))
        folders = (data_dir, data_dir / 'downloads' / 'manual')
        files = [next(filter(None, (given_file(f, n) for f in folders)), None) for n in names]
        return [file for file in files if file]

    def demonstration(self, example: Example, rng: np.random.Generator, right_share: float) -> str:
        """Returns a demonstration as every task does; a right one shows the published solution."""
        if rng.random() < right_share:
            fields = {'reasoning': example['solution'], 'answer': self.right_answer(example)}
        else:
            fields = {
                'reasoning': 'I take the last number I read.',
                'answer': self.shortcut_answer(example),
            }
        return fill(self.formats[self.format].completion, fields)

    def right_answer(self, example: Example) -> str:
        return example['answer']

    def shortcut_answer(self, example: Example) -> str:
        """Returns the last number in the question, or 0."""
        return (_NUMBER.findall(example['question']) or ['0'])[-1]

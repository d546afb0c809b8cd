"""What the tasks on published word problems share: a question, worked solutions, one answer."""

import re
from typing import Any, ClassVar

import numpy as np

from spg_jax.tasks.task import Example, Format, Task, fill

SPOKEN = '\n{reasoning}\n</reasoning>\n<answer>\n'
_NUMBER = re.compile('[0-9]+')
_HALF_PAIR = re.compile('[\ud800-\udfff]')  # JSON can spell it, no file can hold it


class WordProblems(Task):
    """Examples: {'question': text, 'answer': text, 'solution': text, 'index': int}.

    The solution ends before the answer and may be ''. There is no compact format: no small model is
    trained from scratch on these.
    """

    placeholders = ('question',)
    vocabulary = ()
    formats: ClassVar[dict[str, Format]]

    def fields(self, example: Example) -> dict[str, str]:
        return {'question': example['question']}

    def demonstration(self, example: Example, rng: np.random.Generator, right_share: float) -> str:
        """As every task's; a right answer comes with the published solution."""
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


def texts(record: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the values of `keys`, or None unless all of them are text that says something."""
    values = tuple(record.get(key) for key in keys)
    return values if all(map(_is_text, values)) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not _HALF_PAIR.search(value)

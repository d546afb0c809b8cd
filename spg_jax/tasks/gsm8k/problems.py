"""GSM8K problems as their authors publish them: one JSON object a line, read from a file."""

import re
from pathlib import Path

from spg_jax.tasks import reading
from spg_jax.tasks.source import Example

LARGEST_ANSWER = 1e15  # A larger reference is refused, and so is one that is not a number.
_ANSWER_MARK = '####'  # It stands before the answer in the published solutions.
_CALCULATOR = re.compile(r'<<[^<>\n]*>>')  # annotations for a calculator, not meant to be read
_EXPECTED = '{"question": text, "answer": "its solution #### 18"}'


def read_published(path: str | Path) -> list[Example]:
    """Reads `{"question": …, "answer": "<solution> #### 18"}` lines.

    Raises:
      ValueError: a line is wrong; the message names file and line, and quotes the line.
    """
    examples = []
    for where, record in reading.json_lines(path):
        texts = reading.texts(record, ('question', 'answer'))
        question, worked_answer = texts or ('', '')
        solution, _, answer = worked_answer.partition(_ANSWER_MARK)
        number = answer_number(answer)
        if number is None or not abs(number) < LARGEST_ANSWER:
            raise ValueError(f'{where}: found {reading.shown(record)}, expected {_EXPECTED}')
        examples.append(
            {
                'question': question,
                'answer': answer.strip(),
                'solution': _CALCULATOR.sub('', solution).strip(),
                'index': len(examples),
            }
        )
    return examples


def answer_number(answer: str) -> float | None:
    """Returns the number that a reference answer such as '1,800' stands for, or None."""
    try:
        return float(answer.replace(',', ''))
    except ValueError:
        return None

"""GSM8K problems as their authors publish them: one JSON object a line, read from a file."""

import re
from pathlib import Path

from spg_jax.tasks import reading
from spg_jax.tasks.source import Example

# The keys of a problem in files. A plain answer may have its solution under a key of its own.
COLUMNS = {'question': ('question',), 'answer': ('answer',)}
LARGEST_ANSWER = reading.LARGEST  # A larger reference is refused, and what is not a number.
_ANSWER_MARK = '####'  # It stands before the answer in the published solutions.
_CALCULATOR = re.compile(r'<<[^<>\n]*>>')  # annotations for a calculator, not meant to be read
_EXPECTED = '{"question": text, "answer": "its solution #### 18"}, or 18 alone as the answer'


def read_published(path: str | Path, columns: reading.Columns = COLUMNS) -> list[Example]:
    """Reads `{"question": …, "answer": "<solution> #### 18"}` records, or keys of `columns`.

    The answer may also be the number alone, as number, text or list of one; the solution is then
    what the record has under 'solution'. `reading.records` says which forms of files are read.

    Raises:
      ValueError: a record is wrong; the message names file and line, and quotes the record.
    """
    examples = []
    for where, record in reading.records(path, columns):
        question = reading.pick(record, columns['question'])
        worked_answer = reading.text_of(reading.pick(record, columns['answer'])) or ''
        solution, mark, answer = worked_answer.partition(_ANSWER_MARK)
        if not mark:
            solution, answer = reading.text_of(record.get('solution')) or '', worked_answer
        number = answer_number(answer)
        is_number = number is not None and abs(number) < LARGEST_ANSWER
        if not is_number or not reading.is_text(question):
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

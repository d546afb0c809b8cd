"""MATH problems as PRM800K publishes them: one JSON object a line, read from a file."""

from pathlib import Path

from spg_jax.tasks import extraction, reading
from spg_jax.tasks.source import Example

# The keys of a problem in files; the solution may be missing.
COLUMNS = {'question': ('problem', 'question'), 'answer': ('answer',), 'solution': ('solution',)}
_EXPECTED = r'{"problem": text, "answer": text} or "solution": text with \boxed{…}'


def read_published(path: str | Path, columns: reading.Columns = COLUMNS) -> list[Example]:
    r"""Reads `{"problem": …, "solution": …, "answer": …}` records, or those with keys of `columns`.

    An answer is text, a number or a list of one. If a record has no answer, the last `\boxed{…}` of
    its solution is the answer. If it has no solution, demonstrations of the problem have no
    reasoning. `reading.records` says which forms of files are read.

    Raises:
      ValueError: a record is wrong; the message names file and line, and quotes the record.
    """
    examples = []
    header = {'question': columns['question']}  # A table may lack the others.
    for where, record in reading.records(path, header):
        question, answer, solution = (
            reading.text_of(reading.pick(record, columns[name])) for name in COLUMNS
        )
        # An answer under a key of the user's own has to be there: the key may be misspelt.
        may_be_boxed = columns['answer'] == COLUMNS['answer'] and extraction.BOX in (solution or '')
        if answer is None and may_be_boxed:
            answer = extraction.last_box(solution)
        if question is None or not answer:
            raise ValueError(f'{where}: found {reading.shown(record)}, expected {_EXPECTED}')
        examples.append(
            {
                'question': question,
                'answer': answer,
                'solution': (solution or '').strip(),
                'index': len(examples),
            }
        )
    return examples

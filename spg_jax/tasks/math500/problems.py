"""MATH problems as PRM800K publishes them: one JSON object a line, read from a file."""

from pathlib import Path
from typing import Any

from spg_jax.tasks import extraction, reading
from spg_jax.tasks.source import Example

_EXPECTED = r'{"problem": text, "answer": text} or "solution": text with \boxed{…}'


def read_published(path: str | Path) -> list[Example]:
    r"""Reads `{"problem": …, "solution": …, "answer": …}` lines.

    If a line has no answer, the last `\boxed{…}` of its solution is the answer. If it has no
    solution, demonstrations of the problem have no reasoning.

    Raises:
      ValueError: a line is wrong; the message names file and line, and quotes the line.
    """
    examples = []
    for where, record in reading.json_lines(path):
        texts = reading.texts(record, ('problem', 'answer')) or _boxed_answer(record)
        if texts is None:
            raise ValueError(f'{where}: found {reading.shown(record)}, expected {_EXPECTED}')
        question, answer = texts
        (solution,) = reading.texts(record, ('solution',)) or ('',)
        examples.append(
            {
                'question': question,
                'answer': answer,
                'solution': solution.strip(),
                'index': len(examples),
            }
        )
    return examples


def _boxed_answer(record: dict[str, Any]) -> tuple[str, str] | None:
    """Returns (problem, answer in the last box of its solution), or None without such a box."""
    texts = reading.texts(record, ('problem', 'solution'))
    if texts is None or extraction.BOX not in texts[1]:
        return None
    answer = extraction.last_box(texts[1])
    return (texts[0], answer) if answer else None

"""Readers of files that others wrote; every error names the file and line and quotes the line."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# JSON can spell half of a surrogate pair (as \ud800), but no UTF-8 file can hold one.
_HALF_PAIR = re.compile('[\ud800-\udfff]')


class NotJson(ValueError):
    """Text that should be JSON and is not."""


def read_text(path: str | Path) -> str:
    """Returns the text of a file.

    Raises:
      ValueError: the file is missing, cannot be read, is not UTF-8 or is empty.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: byte {error.start} is not UTF-8; expected a text file') from None
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror}); check the path') from None
    if not text.strip():
        raise ValueError(f'{path}: the file is empty; expected one problem or completion a line')
    return text


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ('file:line', object) for every line that is not blank.

    Raises:
      ValueError: as `read_text`, or a line is not a JSON object.
    """
    # This must not be splitlines(), which also splits at characters that JSON allows in a string.
    for number, line in enumerate(read_text(path).split('\n'), 1):
        if not line.strip():
            continue
        where = f'{path}:{number}'
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(f'{where}: found {shown(record)}, expected a JSON object')
        yield where, record


def csv_lines(path: str | Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yields ('file:line', record) for every line after the header that is not blank.

    A record maps each column to its text, '' where the line is too short. If the line is too long,
    the record also has the key None.

    Raises:
      ValueError: as `read_text`, or the header is not `columns`, or a field is longer than Python
        reads.
    """
    lines = [line.strip() for line in read_text(path).split('\n')]
    # Quotes have no meaning, so that a stray one cannot join the lines after it to one record.
    reader = csv.DictReader(lines, restval='', quoting=csv.QUOTE_NONE)
    try:
        if reader.fieldnames != list(columns):
            raise ValueError(
                f'{path}:1: found {shown(lines[0])}, expected the header {",".join(columns)}'
            )
        for record in reader:
            yield f'{path}:{reader.line_num}', record
    except csv.Error as error:
        number = reader.reader.line_num  # The inner reader has counted the line that failed.
        raise ValueError(
            f'{path}:{number}: found {shown(lines[number - 1])}, which cannot be read ({error}); '
            f'expected {",".join(columns)}'
        ) from None


def parse_json(text: str, where: str) -> Any:
    """Returns the JSON value of `text`; a NotJson error names `where` and quotes the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotJson(f'{where}: found {shown(text)}, expected JSON') from None


def texts(record: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the values of `keys`, or None unless each of them is text that is not blank."""
    values = tuple(record.get(key) for key in keys)
    return values if all(map(_is_text, values)) else None


def shown(value: Any) -> str:
    """Returns a short, printable form of any value, for an error message of one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not _HALF_PAIR.search(value)

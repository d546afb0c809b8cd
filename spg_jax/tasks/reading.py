"""Reading files that others wrote: every complaint names the file, the line, what was found."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class NotJson(ValueError):
    """Text that should be JSON and is not."""


def read_text(path: str | Path) -> str:
    """Returns the text of a file.

    Raises:
      ValueError: it is missing, cannot be read, is not UTF-8 or holds nothing.
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
      ValueError: as `read_text`, or a line that is not a JSON object.
    """
    # Not splitlines(): it also breaks at characters that JSON allows inside a string.
    for number, line in enumerate(read_text(path).split('\n'), 1):
        if not line.strip():
            continue
        where = f'{path}:{number}'
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(f'{where}: found {shown(record)}, expected a JSON object')
        yield where, record


def parse_json(text: str, where: str) -> Any:
    """Returns the JSON value of `text`; a NotJson error names `where` and what stands there."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotJson(f'{where}: found {shown(text)}, expected JSON') from None


def shown(value: Any) -> str:
    """Returns a short, printable form of anything, for a message of one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f'{text[:77]}...'

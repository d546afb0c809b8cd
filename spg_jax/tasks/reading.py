"""Readers of files that others wrote; every error names the file and line and quotes the line.

A file is read once, so that a pipe serves as well as a file, and a byte order mark is dropped.
"""

import csv
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# The names of a record's values here, and for each the keys under which files have it.
Columns = Mapping[str, tuple[str, ...]]

LARGEST = 10**15  # a number in a reference is smaller, so that arithmetic with it is exact and fast
# JSON can spell half of a surrogate pair (as \ud800), but no UTF-8 file can hold one.
_HALF_PAIR = re.compile('[\ud800-\udfff]')
_PARQUET = b'PAR1'  # the first bytes of every Parquet file
_DELIMITERS = ',;\t'
_TABLES = ('.csv', '.tsv')
_INTEGER = re.compile('-?[0-9]{1,15}')
SUFFIXES = ('.jsonl', '.json', '.csv', '.parquet')  # of given files, in the order looked for


def given_file(folder: Path, name: str) -> Path | None:
    """Returns the published file of this name, with any of SUFFIXES, or None if it is not there."""
    paths = ((folder / name).with_suffix(suffix) for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


class NotJson(ValueError):
    """Text that should be JSON and is not."""


def read_text(path: str | Path) -> str:
    """Returns the text of a file without its byte order mark.

    Raises:
      ValueError: the file is missing, cannot be read, is not UTF-8 or is empty.
    """
    return _decoded(_read_bytes(path), path)


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ('file:line', object) for every line that is not blank.

    Raises:
      ValueError: as `read_text`, or a line is not a JSON object.
    """
    return _json_lines(read_text(path), path)


def records(
    path: str | Path, columns: Columns, table: bool = False, list_key: str = ''
) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yields (place in the file, record) for every record of a file in any of its usual forms.

    These are JSON lines, a JSON list of objects, a table (CSV with `,`, `;` or tabs, quoted or
    not) and Parquet, which needs the package pyarrow. The contents tell which of them a file is.

    Args:
      path: a file or a pipe.
      columns: the keys that the records have; the header of a table has one key for each.
      table: whether a file that does not look like JSON is a table whatever its name.
      list_key: the key of the list, where the whole file may be one JSON object with a list.

    Raises:
      ValueError: the file cannot be read, or one of its records; the message is one line.
    """
    contents = _read_bytes(path)
    if contents.startswith(_PARQUET):
        yield from _parquet_rows(contents, path)
        return
    text = _decoded(contents, path)
    if not text.lstrip().startswith(('{', '[')):
        if table or Path(path).suffix in _TABLES or _delimiter(text, columns):
            yield from _table_rows(text, path, columns)
            return
    try:
        document = parse_json(text, str(path))
    except NotJson:
        document = None
    if isinstance(document, list):
        yield from _listed(document, str(path), columns)
    elif isinstance(document, dict) and list_key in document:
        yield from _listed(document[list_key], f'{path}: {list_key}', columns)
    else:
        yield from _json_lines(text, path)


def is_table(path: str | Path, columns: Columns) -> bool:
    """Whether a file is Parquet, or its first line is a header with a key of any column.

    Raises:
      ValueError: as `read_text`.
    """
    contents = _read_bytes(path)
    if contents.startswith(_PARQUET):
        return True
    keys = tuple(key for column in columns.values() for key in column)
    return _delimiter(_decoded(contents, path), {'any': keys}) is not None


def with_own_keys(columns: Columns, setting: str, name: str = 'task.fields') -> Columns:
    """Returns `columns` with the keys of a setting such as 'question:problem,answer:solution'.

    A name, or any of the usual keys for it, stands before the colon, and the key of the user's
    files after it. A key such as `a.b` leads into an object.

    Raises:
      ValueError: the setting is not a list of such pairs.
    """
    usual = {key: column for column, keys in columns.items() for key in (*keys, column)}
    own = dict(columns)
    for pair in filter(None, map(str.strip, setting.split(','))):
        column, colon, key = (part.strip() for part in pair.partition(':'))
        if column not in usual or not key:
            example = ','.join(f'{column}:KEY' for column in columns)
            raise ValueError(
                f'{name} is {shown(setting)}, in which {shown(pair)} is not NAME:KEY with a NAME '
                f'among {", ".join(columns)}; use pairs such as {example}'
            )
        own[usual[column]] = (key,)
    return own


def pick(record: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    """Returns the first of `keys` that the record has; `a.b` is key b of the object a. Or None."""
    for key in keys:
        if record.get(key) is not None:
            return record[key]
        value: Any = record
        for part in key.split('.'):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def parse_json(text: str, where: str) -> Any:
    """Returns the JSON value of `text`; a NotJson error names `where` and quotes the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotJson(f'{where}: found {shown(text)}, expected JSON') from None


def text_of(value: Any) -> str | None:
    """Returns a reference as text, or None unless it is text, a number or a list of one of them.

    Text must not be blank and a number must be below LARGEST.
    """
    match value:
        case [single]:
            return text_of(single) if not isinstance(single, list) else None
        case bool():
            return None
        case int() | float() if abs(value) < LARGEST:  # NaN and infinity are not.
            return repr(value).removesuffix('.0')
        case str() if is_text(value):
            return value
    return None


def integers_of(value: Any) -> list[int] | None:
    """Returns the integers of a list, or of text such as `30,100,93` or `[30 100 93]`, or None.

    The list must not be empty, and each integer must be below LARGEST.
    """
    if isinstance(value, str):
        value = value.strip().removeprefix('[').removesuffix(']').replace(',', ' ').split()
    if not isinstance(value, list | tuple) or not value:
        return None
    integers = [integer_of(part) for part in value]
    return None if None in integers else integers


def integer_of(value: Any) -> int | None:
    """Returns an integer below LARGEST, given as such, as 23.0 or as text, or None."""
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        return int(value)
    is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return int(value) if is_whole and abs(value) < LARGEST else None


def is_text(value: Any) -> bool:
    """Whether a value is text that is not blank and that a UTF-8 file can hold."""
    return isinstance(value, str) and bool(value.strip()) and not _HALF_PAIR.search(value)


def shown(value: Any) -> str:
    """Returns a short, printable form of any value, for an error message of one line."""
    try:
        text = ascii(value)
    except ValueError:  # Python refuses to write an integer of more than 4300 digits.
        text = f'a {type(value).__name__} too long to show'
    return text if len(text) <= 80 else f'{text[:77]}...'


def _read_bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # A path with a NUL byte is a ValueError.
        reason = getattr(error, 'strerror', None) or error
        raise ValueError(f'{path}: cannot be read ({reason}); check the path') from None


def _decoded(contents: bytes, path: str | Path) -> str:
    try:
        text = contents.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: byte {error.start} is not UTF-8; expected a text file') from None
    if not text.strip():
        raise ValueError(f'{path}: the file is empty; expected one problem or completion a line')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def _json_lines(text: str, path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # This must not be splitlines(), which also splits at characters that JSON allows in a string.
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        where = f'{path}:{number}'
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(f'{where}: found {shown(record)}, expected a JSON object')
        yield where, record


def _listed(values: Any, where: str, columns: Columns) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(values, list) or not values:
        raise ValueError(f'{where} is {shown(values)}, expected a list of objects')
    for index, record in enumerate(values):
        if not isinstance(record, dict):
            raise ValueError(
                f'{where}[{index}]: found {shown(record)}, expected {", ".join(columns)}'
            )
        yield f'{where}[{index}]', record


def _parquet_rows(contents: bytes, path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if importlib.util.find_spec('pyarrow') is None:
        raise ValueError(f'{path}: a Parquet file needs the package pyarrow; pip install pyarrow')
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(contents)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(f'{path}: not a whole Parquet file ({shown(reason)})') from None
    if not rows:
        raise ValueError(f'{path}: the file is empty; expected one problem or completion a row')
    yield from ((f'{path}[{index}]', row) for index, row in enumerate(rows))


def _delimiter(text: str, columns: Columns) -> str | None:
    """Returns the delimiter with which the first line is a header of these columns, or None."""
    header = text.lstrip().partition('\n')[0]
    for delimiter in _DELIMITERS:
        names = {name.strip().strip('"') for name in header.split(delimiter)}
        if all(names & set(keys) for keys in columns.values()):
            return delimiter
    return None


def _table_rows(
    text: str, path: str | Path, columns: Columns
) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yields the rows after the header that are not blank.

    A row maps each column to its text, '' where the line is too short. If the line is too long, the
    row also has the key None.
    """
    lines = text.split('\n')
    first = next(number for number, line in enumerate(lines) if line.strip())
    header = ','.join(keys[0] for keys in columns.values())
    delimiter = _delimiter(text, columns)
    if delimiter is None:
        raise ValueError(
            f'{path}:{first + 1}: found {shown(lines[first])}, expected the header {header}'
        )
    names = [name.strip() for name in next(csv.reader([lines[first]], delimiter=delimiter))]
    for number, row in _logical_lines(lines, first + 1):
        # A quote that never closes has no meaning, so that it cannot swallow the lines after it.
        quoting = csv.QUOTE_NONE if row.count('"') % 2 else csv.QUOTE_MINIMAL
        try:
            # The reader gets the row as one line, since it would drop the ends of lines otherwise.
            values = next(csv.reader([row], delimiter=delimiter, quoting=quoting))
        except csv.Error as error:
            raise ValueError(
                f'{path}:{number}: found {shown(row)}, which cannot be read ({error}); '
                f'expected {header}'
            ) from None
        record: dict[Any, Any] = dict.fromkeys(names, '') | dict(zip(names, values, strict=False))
        if len(values) > len(names):
            record[None] = values[len(names) :]
        yield f'{path}:{number}', record


def _logical_lines(lines: list[str], start: int) -> Iterator[tuple[int, str]]:
    """Yields (number of its first line, text) of each row; quoted text may hold ends of lines."""
    index = start
    while index < len(lines):
        end = index + 1
        if lines[index].count('"') % 2:
            closing = (n for n in range(end, len(lines)) if lines[n].count('"') % 2)
            end = next(closing, index) + 1
        row = '\n'.join(lines[index:end]).strip()
        if row:
            yield index + 1, row
        index = end

"""JSON files that are believed only in the shape that their reader declares.

A shape is a type that `msgspec` understands: a `TypedDict`, a `Struct`, a dataclass, or types such
as `dict[str, str]`, with ranges as `Annotated[int, Meta(ge=1)]`. It stands beside the code that
uses the file. Types are strict: text is no number, 1.5 and `true` are no integers, and 1 is no
`bool`. Keys that a shape does not name may hold anything.
"""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

MOST_BYTES = 64 * 2**20  # The largest file that is meant, an index of 100,000 tensors, has 10 MB.
MOST_LEVELS = 64  # of lists and objects in each other; no file that is meant has ten

_TOO_DEEP = f'lists and objects are in more than {MOST_LEVELS} levels'

T = TypeVar('T')


def read_json(path: Path, shape: type[T], remedy: str) -> T:
    """Reads a JSON file in UTF-8, with or without a byte order mark.

    Args:
      path: the file.
      shape: the type that the contents must have.
      remedy: what to do about a file that is refused; it ends the message.

    Returns:
      The contents as an instance of `shape`.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if the file is too large, is no JSON (which has no NaN and no Infinity), repeats a
        key in one object, or has another shape; the message is one line that names file and key.
    """
    with path.open('rb') as file:
        # Python allocates all bytes that it is asked for, so ask for no more than there are.
        content = file.read(min(os.fstat(file.fileno()).st_size, MOST_BYTES) + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f'{path} has more than {MOST_BYTES:,} bytes; {remedy}')
    try:
        value = json.loads(content.decode('utf-8-sig'), object_pairs_hook=_object)
    except ValueError as error:
        raise ValueError(f'{path} is not JSON ({error}); {remedy}') from None
    except RecursionError:
        raise ValueError(f'{path}: {_TOO_DEEP}; {remedy}') from None
    complaint = _complaint_of_any(value)
    if complaint:
        raise ValueError(f'{path}: {complaint}; {remedy}')
    return check_json(value, shape, path, remedy)


def check_json(value: Any, shape: type[T], name: object, remedy: str) -> T:
    """Checks JSON values that are in memory already.

    Args:
      value: the values.
      shape: the type that they must have.
      name: the file that they come from, for the message.
      remedy: as in `read_json`.

    Returns:
      The values as an instance of `shape`.

    Raises:
      ValueError: if they have another shape; the message is one line that names file and key.
    """
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        complaint = _complaint_of_shape(str(error), value, lambda other: not _fits(other, shape))
        raise ValueError(f'{name}: {complaint}; {remedy}') from None


def _fits(value: Any, shape: Any) -> bool:
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError:
        return False
    return True


def _complaint_of_shape(message: str, value: Any, is_refused: Callable[[Any], bool]) -> str:
    """What `msgspec` says of a value, with the key in front and the value that was found.

    Its messages have the form "Expected `int`, got `str` - at `$.model.sizes[...]`".
    """
    message, _, place = message.partition(' - at ')
    keys = _keys(value, re.findall(r'(?<=\.)[^.\[\]`]+|(?<=\[)[^\]]+', place), is_refused)
    for key in keys:
        value = value[key]
    prefix = '.'.join(map(str, keys))
    missing = re.fullmatch(r'Object missing required field `(.*)`', message)
    if missing:
        return f'{prefix}.{missing[1]} is missing'.lstrip('.')
    shown = repr(value)
    shown = shown[:60] + '…' * (len(shown) > 60)
    expected = message.split(', got')[0].removeprefix('Expected ').replace('`', '')
    return f'{prefix or "it"} is {shown}, expected {expected}'


def _keys(value: Any, place: list[str], is_refused: Callable[[Any], bool]) -> list[str | int]:
    """The keys that lead to what is refused. `msgspec` has '...' for any key of a mapping."""
    if not place:
        return []
    name, *rest = place
    if isinstance(value, list):
        index = int(name)
        return [index, *_keys(value[index], rest, lambda entry: is_refused([entry]))]
    others = {} if name == '...' else value
    if name == '...':
        name = next(key for key in value if is_refused({key: value[key]}))
    return [name, *_keys(value[name], rest, lambda entry: is_refused({**others, name: entry}))]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The entries of an object. Readers do not agree on which of two equal keys counts."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key {repeated[:60]!r} is there twice')
    return entries


def _complaint_of_any(value: Any, keys: tuple[str, ...] = ()) -> str:
    """What is wrong with a value whatever its shape; '' if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'{".".join(keys)} is {value}, expected a finite number'
    if not isinstance(value, (dict, list)):
        return ''
    if len(keys) == MOST_LEVELS:
        return _TOO_DEEP
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    complaints = (_complaint_of_any(entry, (*keys, str(key))) for key, entry in entries)
    return next(filter(None, complaints), '')

"""Error messages that every room words alike: one line, the value found, the values expected."""

import difflib
import traceback
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """Returns an exception as one line: the name of its class and its message."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def check_one_of(key: str, value: object, known: Iterable[str]) -> None:
    """Refuses a value that is not among the known ones; the message names the nearest of them.

    Args:
      key: the setting or argument that the message names, such as 'sampling.commit'.
      value: what it was set to.
      known: the values it can have, in the order the message lists them.

    Raises:
      ValueError: `value` is not in `known`.
    """
    known = tuple(known)
    if value not in known:
        near = nearest(value, known) if isinstance(value, str) else ''
        perhaps = f', perhaps {near}' if near else ''
        shown = ', '.join(str(each) or "''" for each in known)
        raise ValueError(f'{key} is {value!r}{perhaps}; use one of {shown}')


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like the given one; '' if none is."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), '')


def line_in(path: object, error: BaseException) -> int:
    """The last line of a file that an exception passed through; 1 if it passed through none."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path) and frame.lineno
    ]
    return lines[-1] if lines else 1

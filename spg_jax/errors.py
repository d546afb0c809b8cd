"""Small tools for error messages: one line that says what was found, expected, and what to do."""

from collections.abc import Collection


def one_line(error: Exception) -> str:
    """Returns an exception as one line: its type and its message."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def check_one_of(key: str, value: str, known: Collection[str]) -> None:
    """Refuses a value that is not among those known.

    Raises:
      ValueError: names the setting `key`, the value and the known values.
    """
    if value not in known:
        raise ValueError(f'{key} is {value!r}; use one of {", ".join(known)}')

"""The problems of a task: made once by its TFDS builder, then read at random."""

import contextlib
import fcntl
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Example = dict[str, Any]  # a problem; its keys are the task's own, besides 'index'

SPLITS = ('train', 'validation', 'test')
_CHUNK = 1024  # examples read at once when reading all


class Unavailable(ValueError):
    """Problems that cannot be made here; one line that says what a person has to do."""


class Source:
    """Random access to the examples of one split: dicts of plain Python values and 'index'.

    The data is made on first use, if need be from files that only a person can bring (a ValueError
    says which). Whatever goes wrong while reading it is a ValueError that says which directory to
    delete, since everything in it can be made again.
    """

    def __init__(self, builder: Callable[..., Any], split: str, data_dir: Path):
        if split not in SPLITS:
            raise ValueError(f'unknown split {split!r}; expected one of {", ".join(SPLITS)}')
        self._split = split
        self._directory = data_dir / builder.name
        # Readers raise anything, from KeyError to a RuntimeError out of C++; none of it may end as
        # a traceback.
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            # One process makes the data, others wait for it. Standard output belongs to results.
            with (data_dir / 'lock').open('w') as lock, contextlib.redirect_stdout(sys.stderr):
                fcntl.flock(lock, fcntl.LOCK_EX)
                made = builder(data_dir=data_dir, file_format='array_record')
                made.download_and_prepare()
            self._records = made.as_data_source(split)
            found, expected = len(self._records), made.info.splits[split].num_examples
        except Unavailable:
            raise
        except OSError as error:
            raise ValueError(
                f'{data_dir} cannot hold data ({one_line(error)}); choose another directory'
            ) from error
        except Exception as error:
            raise self._unreadable(split, one_line(error)) from error
        if found != expected:
            raise self._unreadable(split, f'{found} examples, expected {expected}')
        self.__getitems__([0, found - 1])  # a file cut short fails here, not hours later

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Returns several examples at once: several times faster than one at a time."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f'example {index} of {len(self)}')
        try:
            records = self._records.__getitems__(list(indices))
            return [
                {name: _plain(value) for name, value in record.items()} | {'index': int(index)}
                for index, record in zip(indices, records, strict=True)
            ]
        except Exception as error:
            raise self._unreadable(f'{self._split} examples', one_line(error)) from error

    def _unreadable(self, what: str, found: str) -> ValueError:
        return ValueError(
            f'{self._directory}: {what} cannot be read ({found}); '
            f'delete {self._directory} and run again'
        )


def one_line(error: Exception) -> str:
    """Returns an exception as one line: its kind and what it says."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def _plain(value: Any) -> Any:
    """Returns a TFDS value as Python: bytes as text, arrays as lists, numbers as int or float."""
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

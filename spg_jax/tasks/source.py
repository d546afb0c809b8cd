"""The problems of a task: made once by its TFDS builder, then read in any order."""

import contextlib
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from spg_jax.errors import check_one_of, one_line
from spg_jax.process.files import locked, write_whole
from spg_jax.process.json_files import read_json

Example = dict[str, Any]  # a problem; each task has its own keys, and all have 'index'

ORIGIN = '.made_of.json'  # ends the name of the file of digests beside prepared problems
SPLITS = ('train', 'validation', 'test')
_CHUNK = 1024  # examples read at once when all are read


class Unavailable(ValueError):
    """Problems cannot be made here; the message is one line that says what a person has to do."""


class Source:
    """Random access to the examples of one split: dicts of plain Python values and 'index'.

    The data is made on first use, and one line on standard error says so. Making it may need files
    that only a person can bring; then a ValueError names them. Any failure to read the data is a
    ValueError that names the directory to move away, since everything in it can be made again.
    """

    def __init__(
        self,
        builder: Callable[..., Any],
        split: str,
        data_dir: Path,
        preparation: str = 'making them',
        given_files: Callable[[Path], list[Path]] = lambda data_dir: [],
    ):
        """Makes the problems if `data_dir` does not hold them, and opens one split.

        Args:
          builder: the TFDS builder class.
          split: one of SPLITS.
          data_dir: the directory that holds the problems of all tasks.
          preparation: what making the problems means, in the words of the line that announces it.
          given_files: finds the files in `data_dir` that the problems are made of. Problems that
            were made of other contents are made anew.
        """
        check_one_of('split', split, SPLITS)
        self._split = split
        self.directory = data_dir / builder.name
        # TFDS and its readers raise errors of any class, from KeyError to a RuntimeError out of
        # C++. All of them are caught here, so that none ends a run with a traceback.
        try:
            # Data that is there needs no lock and no right to write: TFDS gives a directory its
            # name when it is whole.
            with _silent_tfds():
                dataset = builder(data_dir=data_dir, file_format='array_record')
                files = given_files(data_dir)
                if not dataset.data_path.exists() or _is_stale(dataset.data_path, files):
                    data_dir.mkdir(parents=True, exist_ok=True)
                    # One process makes the data, and the others wait for it.
                    with locked(data_dir / 'lock'):
                        # Another process may have fetched files while this one waited.
                        files = given_files(data_dir)
                        if _is_stale(dataset.data_path, files):
                            shutil.rmtree(dataset.data_path)
                        dataset = builder(data_dir=data_dir, file_format='array_record')
                        self._make(dataset, preparation)
                        _remember(dataset.data_path, given_files(data_dir))
            self._records, self._prepared = dataset.as_data_source(split), Path(dataset.data_path)
            count, expected_count = len(self._records), dataset.info.splits[split].num_examples
        except Unavailable:
            raise
        except OSError as error:
            raise ValueError(
                f'{data_dir} cannot hold data ({one_line(error)}); start in a directory that can '
                'be written, or set task.data_dir'
            ) from error
        except Exception as error:
            raise self._unreadable(split, one_line(error)) from error
        if count != expected_count:
            raise self._unreadable(split, f'{count} examples, expected {expected_count}')
        # Fail early: a file that was cut short must not stop a run hours later.
        self.__getitems__([0, count - 1])

    def _make(self, dataset: Any, preparation: str) -> None:
        """Makes the problems, unless another process has made them since."""
        if not dataset.data_path.exists():
            # Standard output belongs to results, so the line goes to standard error.
            print(
                f'problems of {dataset.name}: {preparation}, once, under {self.directory}',
                file=sys.stderr,
                flush=True,
            )
        dataset.download_and_prepare()

    def digest(self) -> str:
        """Returns a digest of the contents of all prepared files, in hexadecimal digits."""
        digest = hashlib.sha256(self._split.encode())
        for file in sorted(self._prepared.glob('*')):
            digest.update(file.name.encode() + b'\n' + file.read_bytes())
        return digest.hexdigest()

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
        """Returns several examples at once, which is several times faster than one at a time."""
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

    def _unreadable(self, subject: str, cause: str) -> ValueError:
        return ValueError(
            f'{self.directory}: {subject} cannot be read ({cause}); '
            f'move {self.directory} away and run again'
        )


def _is_stale(prepared: Path, files: list[Path]) -> bool:
    """Whether problems may have been made of other contents than those of the given files.

    Nobody knows what problems without a file of digests were made of.

    Raises:
      Unavailable: a split that they were made of has no file any more, or the file of digests is
        damaged.
    """
    origin = prepared.with_name(prepared.name + ORIGIN)
    if not prepared.exists():
        return False
    if not origin.is_file():
        return bool(files)
    try:
        old = read_json(origin, dict[str, str], 'move it away and run again')
    except ValueError as error:
        raise Unavailable(str(error)) from None
    new = _digests(files)
    splits = {Path(name).stem for name in new}
    missing = [name for name in sorted(old) if Path(name).stem not in splits]
    if missing:
        raise Unavailable(
            f'{missing[0]}, which the problems in {prepared} were made of, is gone; put it back, '
            f'or move {prepared.parent} away to have it fetched'
        )
    return old != new


def _remember(prepared: Path, files: list[Path]) -> None:
    """Writes down what problems were made of, beside them."""
    if files:
        origin = prepared.with_name(prepared.name + ORIGIN)
        write_whole(origin, json.dumps(_digests(files), indent=1))


def _digests(files: list[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@contextlib.contextmanager
def _silent_tfds() -> Iterator[None]:
    """Keeps the messages, log lines and progress bars of TFDS off the screen."""
    # The import is lazy because TFDS takes half a second to import; the builder has done it before.
    import tensorflow_datasets as tfds

    # TFDS offers no way to ask whether its bars are on, so they stay off afterwards.
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _plain(value: Any) -> Any:
    """Returns a TFDS value as Python: bytes as text, arrays as lists, numbers as int or float."""
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

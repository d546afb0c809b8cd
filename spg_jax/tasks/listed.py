"""The problems that a task lists itself, or has in JSON-lines files, cut into splits."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spg_jax.errors import check_one_of, one_line
from spg_jax.process.files import local_path
from spg_jax.tasks import reading
from spg_jax.tasks.source import SPLITS, Example

HELD_OUT = 256  # problems of validation, and of test, that are cut off
_LEAST_SHARE = 10  # One problem in ten is cut off for each of them, if that is less.


class Listed(list[Example]):
    """The examples of one split, which are in memory; each has its place as 'index'."""

    def __init__(self, examples: Iterable[Example], digest: str):
        super().__init__(indexed(examples))
        self._digest = digest

    def digest(self) -> str:
        """Returns a digest of the examples of all splits, in hexadecimal digits."""
        return self._digest


def cut(problems: Any, folder: Path, subject: str) -> dict[str, Listed]:
    """Returns the problems of each split; no problem of a split is in one that is held out from it.

    The contents of a problem decide whether it is for training, validation or test, whatever its
    place among the others. A problem that is there twice counts once.

    Args:
      problems: a list of dictionaries, the path of a JSON-lines file, or a dictionary with one of
        these for each split that is cut already. 'train' must be among them.
      folder: the folder from which paths start.
      subject: the name of the task in messages.

    Raises:
      ValueError: the problems are of another kind, cannot be read, or are too few.
    """
    parts = _parts(problems, subject)
    splits = {split: _distinct(_examples(part, folder, subject)) for split, part in parts.items()}
    train = splits.pop('train', {})
    rest = {key: train[key] for key in train if not any(key in part for part in splits.values())}
    size = min(HELD_OUT, len(rest) // _LEAST_SHARE)
    ordered = iter(sorted(rest))
    for split in ('test', 'validation'):
        if split not in splits:
            held_out = set(itertools.islice(ordered, size))
            splits[split] = {key: rest[key] for key in rest if key in held_out}
    splits['validation'] = {
        key: example for key, example in splits['validation'].items() if key not in splits['test']
    }
    held_out = splits['validation'].keys() | splits['test'].keys()
    splits['train'] = {key: rest[key] for key in rest if key not in held_out}
    for split in SPLITS:
        if not splits[split]:
            raise ValueError(
                f'{subject} has no problem left for {split} among {len(rest)} to cut; give '
                f'{_LEAST_SHARE} or more that differ'
            )
    keys = [[split, *splits[split]] for split in SPLITS]
    digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    return {split: Listed(splits[split].values(), digest) for split in SPLITS}


def read(path: str | Path) -> list[Example]:
    """Returns the objects of a JSON-lines file.

    Raises:
      ValueError: the file cannot be read, or a line is no JSON object.
    """
    return [record for _, record in reading.json_lines(path)]


def files(problems: Any, folder: Path) -> list[Path]:
    """Returns the files among `problems`, which is what `cut` takes."""
    parts = problems.values() if isinstance(problems, Mapping) else [problems]
    return [_path(part, folder) for part in parts if isinstance(part, str | Path)]


def named_from(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Returns files by their paths from a folder, which stay the same if all move together."""
    return {os.path.relpath(path, folder): path for path in paths}


def indexed(examples: Iterable[Example]) -> list[Example]:
    """Returns examples with their places as 'index'."""
    return [example | {'index': index} for index, example in enumerate(examples)]


def _parts(problems: Any, subject: str) -> dict[str, Any]:
    if not isinstance(problems, Mapping):
        return {'train': problems}
    for split in problems:
        check_one_of(f'a split of {subject}', split, SPLITS)
    if 'train' not in problems:
        raise ValueError(
            f'{subject} has the splits {", ".join(problems)} and no train; add problems to train on'
        )
    return dict(problems)


def _examples(part: Any, folder: Path, subject: str) -> list[Example]:
    if isinstance(part, str | Path):
        return read(_path(part, folder))
    if not isinstance(part, Sequence):
        raise ValueError(
            f'the problems of {subject} are {reading.shown(part)}; give a list of dictionaries or '
            'the path of a JSON-lines file'
        )
    return list(_plain(part, subject))


def _plain(part: Iterable[Any], subject: str) -> Iterator[Example]:
    """Yields the problems as they would be read from a file, for example with lists for tuples."""
    for place, example in enumerate(part):
        try:
            plain = json.loads(json.dumps(example, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f'problem {place} of {subject} cannot be written as JSON ({one_line(error)}); use '
                'text, numbers, lists and dictionaries'
            ) from None
        if not isinstance(plain, dict):
            raise ValueError(
                f'problem {place} of {subject} is {reading.shown(example)}; give a dictionary'
            )
        yield plain


def _distinct(examples: Sequence[Example]) -> dict[str, Example]:
    """Returns the examples by a hash of their contents, in the order of the first of each."""
    distinct: dict[str, Example] = {}
    for example in examples:
        contents = {key: value for key, value in example.items() if key != 'index'}
        text = json.dumps(contents, sort_keys=True)
        distinct.setdefault(hashlib.sha256(text.encode()).hexdigest(), contents)
    return distinct


def _path(part: str | Path, folder: Path) -> Path:
    return folder / local_path(str(part))

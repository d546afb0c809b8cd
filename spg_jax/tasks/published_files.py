"""Published problems as TFDS data sets: files found on disk or downloaded, then cut."""

import hashlib
import http.client
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from spg_jax import tasks
from spg_jax.tasks.source import Example, Unavailable, one_line

VALIDATION = 256  # problems cut off the published training set
_LEAST_SHARE = 10  # but no more than one in ten, for a training set of one's own
TIMEOUT = 30  # seconds a server may keep silent
_TEXTS = ('question', 'answer', 'solution')


def cut(train: Sequence[Example], test: Sequence[Example]) -> dict[str, list[Example]]:
    """Returns the problems of each split; none of the test problems is in another.

    Which problems are for validation depends on their text alone: the same ones for ever, whatever
    the order of the file.
    """
    tested = {_identity(example) for example in test}
    others = {_identity(example): example for example in train}  # each problem once
    left = {key: example for key, example in others.items() if key not in tested}
    size = min(VALIDATION, len(left) // _LEAST_SHARE)
    chosen = set(sorted(left)[:size])
    return {
        'train': [example for key, example in left.items() if key not in chosen],
        'validation': [example for key, example in left.items() if key in chosen],
        'test': list(test),
    }


def _identity(example: Example) -> str:
    """Returns a hash of the question, whatever its white space."""
    return hashlib.sha256(' '.join(example['question'].split()).encode()).hexdigest()


class PublishedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Published train and test files; the test split is the published test.

    `TASK_train.jsonl` and `TASK_test.jsonl` are taken from the data directory or from TFDS's manual
    directory, and otherwise downloaded into the former.
    """

    VERSION = tfds.core.Version('1.0.0')
    MANUAL_DOWNLOAD_INSTRUCTIONS = 'Put TASK_train.jsonl and TASK_test.jsonl here.'
    URLS: ClassVar[Mapping[str, str]]  # of the published files 'train' and 'test'

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in _TEXTS}),
            # An example's place is its identity.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        files = {split: self._file(split, dl_manager) for split in self.URLS}
        task = tasks.get(self.name, 'published_train')
        try:
            read = {split: task.read_published(path) for split, path in files.items()}
        except ValueError as error:
            raise Unavailable(f'{error}; mend that file, or delete it') from error
        splits = cut(read['train'], read['test'])
        if not splits['validation']:
            raise Unavailable(
                f'{files["train"]}: {len(read["train"])} problems, expected {_LEAST_SHARE} or '
                'more that are not in the test file; add some'
            )
        return {split: self._generate_examples(examples) for split, examples in splits.items()}

    def _generate_examples(
        self, examples: Sequence[Example]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        for index, example in enumerate(examples):
            yield index, {name: example[name] for name in _TEXTS}

    def _file(self, split: str, dl_manager: Any) -> Path:
        """Returns where the published file of a split is, fetched into the data directory if need
        be."""
        folders = [Path(self.data_dir_root)]
        try:
            folders.append(Path(dl_manager.manual_dir))
        except AssertionError:  # there is none, which is the usual case
            pass
        name = self._name(split)
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found:
            return found
        try:
            return _fetched(self.URLS[split], folders[0] / name)
        except (OSError, http.client.HTTPException) as error:
            names, urls = ' and '.join(map(self._name, self.URLS)), ' and '.join(self.URLS.values())
            raise Unavailable(
                f'{folders[0] / name} is not there and cannot be fetched ({one_line(error)}); '
                f'put {names}, from {urls}, into {folders[0]}'
            ) from error

    def _name(self, split: str) -> str:
        return f'{self.name}_{split}.jsonl'


def _fetched(url: str, path: Path) -> Path:
    """Downloads a file, whole or not at all, and returns its path.

    Not by TFDS's downloader, which takes minutes to give up where there is no network.
    """
    part = path.with_suffix('.part')
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        part.write_bytes(answer.read())
    return part.rename(path)

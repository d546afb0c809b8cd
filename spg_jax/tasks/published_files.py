"""TFDS builders for published problems, whose files are on disk already or are downloaded.

The builder cuts the problems of these files into train, validation and test splits.
"""

import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from spg_jax.errors import one_line
from spg_jax.process.files import write_whole
from spg_jax.tasks.reading import Columns, given_file
from spg_jax.tasks.source import Example, Unavailable

VALIDATION = 256  # problems cut off the published training set
_LEAST_SHARE = 10  # At most one training problem in ten is cut off, if the user's set is small.
TIMEOUT = 30  # seconds without any data until a download is given up
_TEXTS = ('question', 'answer', 'solution')


def cut(train: Sequence[Example], test: Sequence[Example]) -> dict[str, list[Example]]:
    """Returns the problems of each split; no other split holds a test problem.

    The text of a problem alone decides whether it is for validation, so that the validation split
    stays the same for ever, whatever the order of the file.
    """
    test_keys = {_identity(example) for example in test}
    distinct = {_identity(example): example for example in train}
    learnable = {key: example for key, example in distinct.items() if key not in test_keys}
    size = min(VALIDATION, len(learnable) // _LEAST_SHARE)
    validation_keys = set(sorted(learnable)[:size])
    return {
        'train': [example for key, example in learnable.items() if key not in validation_keys],
        'validation': [example for key, example in learnable.items() if key in validation_keys],
        'test': list(test),
    }


def _identity(example: Example) -> str:
    """Returns a hash of the question that does not depend on its white space."""
    return hashlib.sha256(' '.join(example['question'].split()).encode()).hexdigest()


class PublishedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Published train and test files; the test split is the published test.

    `TASK_train.jsonl` and `TASK_test.jsonl`, or files with another of SUFFIXES, are taken from the
    data directory or from TFDS's manual directory. If neither holds them, they are downloaded into
    the data directory.
    """

    VERSION = tfds.core.Version('1.0.0')
    MANUAL_DOWNLOAD_INSTRUCTIONS = 'Put TASK_train.jsonl and TASK_test.jsonl here.'
    URLS: ClassVar[Mapping[str, str]]  # addresses of the published files 'train' and 'test'
    read_published: ClassVar[Callable[[str | Path, Columns], list[Example]]]  # reads such a file
    columns: ClassVar[Columns]  # the keys of a problem in these files

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in _TEXTS}),
            # The place of an example in its split is its identity.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        files = {split: self._file(split, dl_manager) for split in self.URLS}
        try:
            examples = {
                split: self.read_published(path, self.columns) for split, path in files.items()
            }
        except ValueError as error:
            raise Unavailable(f'{error}; mend that file, or move it away') from error
        splits = cut(examples['train'], examples['test'])
        if not splits['validation']:
            raise Unavailable(
                f'{files["train"]}: {len(examples["train"])} problems, expected {_LEAST_SHARE} or '
                'more that are not in the test file; add some'
            )
        return {split: self._generate_examples(part) for split, part in splits.items()}

    def _generate_examples(
        self, examples: Sequence[Example]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        for index, example in enumerate(examples):
            yield index, {name: example[name] for name in _TEXTS}

    def _file(self, split: str, dl_manager: Any) -> Path:
        """Returns the path of a split's published file; downloads the file if it is missing."""
        folders = [Path(self.data_dir_root)]
        try:
            folders.append(Path(dl_manager.manual_dir))
        except AssertionError:  # TFDS raises it where no manual directory exists, as is usual.
            pass
        name = self._name(split)
        for folder in folders:
            if path := given_file(folder, name):
                return path
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


def with_columns(builder: type[PublishedBuilder], columns: Columns) -> type[PublishedBuilder]:
    """Returns the builder for files whose problems have the keys `columns`.

    Problems read by other keys than usual are kept in a folder of their own, so that a change of
    the keys makes them anew.
    """
    if columns == builder.columns:
        return builder
    digest = hashlib.sha256(repr(sorted(columns.items())).encode()).hexdigest()[:12]
    return type(
        builder.__name__,
        (builder,),
        {
            '__module__': builder.__module__,
            '__doc__': builder.__doc__,
            'columns': columns,
            'BUILDER_CONFIGS': [tfds.core.BuilderConfig(name=f'fields_{digest}')],
        },
        skip_registration=True,
    )


def _fetched(url: str, path: Path) -> Path:
    """Downloads a file, whole or not at all, and returns its path.

    TFDS has a downloader, but it takes minutes to give up where there is no network.
    """
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        write_whole(path, answer.read())
    return path

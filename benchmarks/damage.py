"""Ways in which the files of a checkpoint go bad, for benchmarks.faults and the tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

METADATA = '_CHECKPOINT_METADATA'


def flip_bit(file: Path, rng: np.random.Generator) -> None:
    """Flips one random bit of a file that is not empty."""
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)


def largest_file(directory: Path) -> Path:
    """The largest file in a directory and the ones below it."""
    files = [file for file in directory.rglob('*') if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def _cut(checkpoint: Path) -> None:
    file = largest_file(checkpoint)
    file.write_bytes(file.read_bytes()[:100])


def _empty_files(checkpoint: Path) -> None:
    for file in checkpoint.rglob('*'):
        if file.is_file():
            file.write_bytes(b'')


def _empty_directory(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _older_arrays(checkpoint: Path) -> None:
    """Puts the arrays of the checkpoint before it under its metadata; all files are then whole."""
    steps = [int(path.name) for path in checkpoint.parent.iterdir() if path.name.isdigit()]
    older = max(step for step in steps if step < int(checkpoint.name))
    shutil.rmtree(checkpoint / 'state')
    shutil.copytree(checkpoint.with_name(str(older)) / 'state', checkpoint / 'state')


def _other_record(checkpoint: Path) -> None:
    file = checkpoint / METADATA
    metadata = json.loads(file.read_text())
    metadata['custom_metadata']['record']['seconds'] += 1
    file.write_text(json.dumps(metadata))


def _no_digests(checkpoint: Path) -> None:
    file = checkpoint / METADATA
    metadata = json.loads(file.read_text())
    del metadata['custom_metadata']['digest']
    file.write_text(json.dumps(metadata))


# What is wrong: how it is done to the directory of a checkpoint. The record of the checkpoint has
# 'seconds', and 'the arrays are those of the checkpoint before' needs one before it.
OLDER_ARRAYS = 'the arrays are those of the checkpoint before'
DAMAGE: dict[str, Callable[[Path], object]] = {
    'a file is cut': _cut,
    'files are empty': _empty_files,
    'the directory is empty': _empty_directory,
    'the metadata is gone': lambda path: (path / METADATA).unlink(),
    'the metadata is no JSON': lambda path: (path / METADATA).write_text('{'),
    'the metadata is a list': lambda path: (path / METADATA).write_text('[]'),
    'the state is gone': lambda path: shutil.rmtree(path / 'state'),
    'the description of the tree is gone': lambda path: (path / 'state' / '_METADATA').unlink(),
    'the largest file is gone': lambda path: largest_file(path / 'state').unlink(),
    'the largest file is noise': lambda path: largest_file(path / 'state').write_bytes(b'x' * 999),
    OLDER_ARRAYS: _older_arrays,
    'the record is another one': _other_record,
    'there are no digests': _no_digests,
}

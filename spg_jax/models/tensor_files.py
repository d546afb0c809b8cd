"""The tensors of safetensors checkpoints, in one file or in shards with an index."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from spg_jax.errors import check_one_of
from spg_jax.process.files import write_whole
from spg_jax.process.json_files import read_json

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
FLOATS = ('F32', 'BF16', 'F16')  # the types of tensors that can be read
_TYPE_NAMES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}  # numpy's -> safetensors'
_METADATA = {'format': 'pt'}  # transformers and PEFT refuse files without it


class _Index(TypedDict):
    """What is read of model.safetensors.index.json."""

    weight_map: dict[str, str]  # name of a tensor -> name of its file


def open_tensors(directory: Path) -> dict[str, safe_open]:
    """Tensor name -> the open file that holds it. Files are mapped into memory and not read.

    Args:
      directory: holds model.safetensors, or the shards that model.safetensors.index.json lists.

    Raises:
      FileNotFoundError: if there are no weights, or a listed shard does not exist.
      ValueError: for a damaged file or index, an index that names a file outside the directory, and
        for a tensor that is in two shards or missing from the shard that the index names.
    """
    index = directory / INDEX
    if index.is_file():
        shard_of = read_json(index, _Index, 'download it again')['weight_map']
        shards = sorted(set(shard_of.values()))
    elif (directory / WEIGHTS).is_file():
        shard_of, shards = {}, [WEIGHTS]
    else:
        raise FileNotFoundError(
            f'{directory} holds neither {WEIGHTS} nor {INDEX}; expected one of them'
        )
    files = {}
    for shard in shards:
        path = directory / shard
        # The names are what counts: a cache of the Hugging Face Hub holds links to other folders.
        if Path(shard).is_absolute() or '..' in Path(shard).parts:
            raise ValueError(
                f'{index}: weight_map names {shard!r}, which is outside of the checkpoint; '
                'download it again'
            )
        if not path.is_file():
            raise FileNotFoundError(f'{path} does not exist, but {INDEX} lists it; download it')
        shard_files = open_file(path)
        duplicates = sorted(files.keys() & shard_files.keys())
        if duplicates:
            raise ValueError(
                f'{path}: {duplicates[0]!r} is also in another shard; download the checkpoint again'
            )
        files |= shard_files
    for name, shard in shard_of.items():
        if name not in files:
            raise ValueError(
                f'{directory / shard}: {name!r} is missing, but {INDEX} lists it; download it again'
            )
    return files


def open_file(path: Path) -> dict[str, safe_open]:
    """Tensor name -> the open file, which is mapped into memory and not read.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; download it')
    try:
        file = safe_open(path, 'np')
    except SafetensorError as error:
        raise ValueError(
            f'{path} is damaged or not a safetensors file ({error}); download it again'
        ) from None
    return dict.fromkeys(file.keys(), file)


class Tensor(NamedTuple):
    """A tensor to write. Its size is known before its values are fetched."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]  # returns the values; every process has to call it


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Writes tensors as shards of about `shard_bytes` with an index, or as one file if they fit."""
    shards: list[dict[str, Tensor]] = [{}]
    last_shard_bytes = 0
    for name, tensor in tensors.items():
        if last_shard_bytes and last_shard_bytes + _bytes(tensor) > shard_bytes:
            shards.append({})
            last_shard_bytes = 0
        shards[-1][name] = tensor
        last_shard_bytes += _bytes(tensor)
    if len(shards) == 1:
        write_tensors(directory / WEIGHTS, tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f'model-{number:05}-of-{len(shards):05}.safetensors'
        write_tensors(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(_bytes(tensor) for tensor in tensors.values())
    if jax.process_index() == 0:
        index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        write_whole(directory / INDEX, json.dumps(index, indent=1))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file, with at most one of the tensors in host memory at any time.

    The writer of the library needs all tensors at once, so the file is written here: 8 bytes of
    header length, a JSON header and the values. Every process has to call this function; the first
    process writes.

    Raises:
      ValueError: for a tensor of a type that cannot be written.
    """
    header: dict[str, Any] = {'__metadata__': _METADATA}
    offset = 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        check_one_of(f'{path}: the type of {name!r}', dtype.name, _TYPE_NAMES)
        header[name] = {
            'dtype': _TYPE_NAMES[dtype.name],
            'shape': list(tensor.shape),
            'data_offsets': [offset, offset + _bytes(tensor)],
        }
        offset += _bytes(tensor)
    header_bytes = json.dumps(header).encode()
    header_bytes += b' ' * (-len(header_bytes) % 8)  # so that the values start aligned
    is_writer = jax.process_index() == 0
    with path.open('wb') if is_writer else contextlib.nullcontext() as file:
        if is_writer:
            file.write(len(header_bytes).to_bytes(8, 'little') + header_bytes)
        for tensor in tensors.values():
            values = np.ascontiguousarray(tensor.fetch())
            if is_writer:
                file.write(values.reshape(-1).view(np.uint8))  # unlike tobytes, without a copy
            del values  # frees the memory before the next tensor is fetched


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize

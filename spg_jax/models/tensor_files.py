"""The tensors of safetensors checkpoints, in one file or in shards with an index."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
FLOATS = ('F32', 'BF16', 'F16')  # types of tensors that are read
_NAMES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
_METADATA = {'format': 'pt'}  # what transformers and PEFT insist on


def open_tensors(directory: Path) -> dict[str, safe_open]:
    """Tensor name -> the open file that holds it. Files are mapped into memory, not read.

    Args:
      directory: holds model.safetensors, or the shards that model.safetensors.index.json lists.

    Raises:
      FileNotFoundError: when there are no weights, or a listed shard is not there.
      ValueError: for a damaged file or index, a tensor in two shards or not in its own.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            listed = json.loads(index.read_text())['weight_map']
            shards = sorted(set(listed.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{index} has no "weight_map" of tensor to file; download it again'
            ) from None
    elif (directory / WEIGHTS).is_file():
        listed, shards = {}, [WEIGHTS]
    else:
        raise FileNotFoundError(
            f'{directory} holds neither {WEIGHTS} nor {INDEX}; expected one of them'
        )
    files = {}
    for shard in shards:
        path = directory / shard
        if not path.is_file():
            raise FileNotFoundError(f'{path} does not exist, but {INDEX} lists it; download it')
        opened = open_file(path)
        twice = sorted(files.keys() & opened.keys())
        if twice:
            raise ValueError(
                f'{path}: {twice[0]!r} is also in another shard; download the checkpoint again'
            )
        files |= opened
    for name, shard in listed.items():
        if name not in files:
            raise ValueError(
                f'{directory / shard}: {name!r} is missing, but {INDEX} lists it; download it again'
            )
    return files


def open_file(path: Path) -> dict[str, safe_open]:
    """Tensor name -> the open file, mapped into memory and not read.

    Raises:
      FileNotFoundError: when it is not there.
      ValueError: when it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; download it')
    try:
        opened = safe_open(path, 'np')
    except SafetensorError as error:
        raise ValueError(
            f'{path} is damaged or no safetensors file ({error}); download it again'
        ) from None
    return dict.fromkeys(opened.keys(), opened)


class Tensor(NamedTuple):
    """What is to be written: its size is known before its values are fetched."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]  # the values; every process has to ask for them


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Writes tensors as shards of about `shard_bytes` with an index, or as one file if they fit."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled and filled + _bytes(tensor) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _bytes(tensor)
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
        (directory / INDEX).write_text(json.dumps(index, indent=1))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file, with never more than one of the tensors in host memory.

    The library's own writer wants all of them at once; the layout is 8 bytes of header length, a
    JSON header and the values. Every process has to call this, and the first one writes.

    Raises:
      ValueError: for a tensor of a type that is not written.
    """
    header: dict[str, Any] = {'__metadata__': _METADATA}
    offset = 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        if dtype.name not in _NAMES:
            raise ValueError(f'{path}: {name!r} is {dtype.name}; write one of {", ".join(_NAMES)}')
        header[name] = {
            'dtype': _NAMES[dtype.name],
            'shape': list(tensor.shape),
            'data_offsets': [offset, offset + _bytes(tensor)],
        }
        offset += _bytes(tensor)
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # values start aligned
    first = jax.process_index() == 0
    with path.open('wb') if first else contextlib.nullcontext() as file:
        if first:
            file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors.values():
            values = np.ascontiguousarray(tensor.fetch())
            if first:
                file.write(values.reshape(-1).view(np.uint8))  # no copy of it, unlike tobytes
            del values  # before the next is fetched


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize

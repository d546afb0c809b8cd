"""The tensors of a safetensors checkpoint, in one file or in shards with an index."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'


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
        try:
            opened = safe_open(path, 'np')
        except SafetensorError as error:
            raise ValueError(
                f'{path} is damaged or no safetensors file ({error}); download it again'
            ) from None
        for name in opened.keys():
            if name in files:
                raise ValueError(
                    f'{path}: {name!r} is also in another shard; download the checkpoint again'
                )
            files[name] = opened
    for name, shard in listed.items():
        if name not in files:
            raise ValueError(
                f'{directory / shard}: {name!r} is missing, but {INDEX} lists it; download it again'
            )
    return files

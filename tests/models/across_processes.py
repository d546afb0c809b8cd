"""One of two processes that hold a checkpoint together: it reads, checks its shards and writes.

python -m tests.models.across_processes ROOT
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
from numpy.testing import assert_array_equal

from spg_jax.export import export
from spg_jax.models.lora import COLLECTION, LoRA
from spg_jax.models.peft import load_adapter, save_adapter
from spg_jax.models.transformer import Transformer
from spg_jax.models.weights import load_checkpoint, save_checkpoint
from spg_jax.process import distributed
from spg_jax.sharding import abstract_params, make_mesh

TINY = Path(__file__).parents[1] / 'reference' / 'tiny_llada'
SIZES = LoRA(rank=4, alpha=2.0, targets=('query', 'down'))


def adapters_on(mesh, config=None, lora=SIZES):
    """Random adapters, the same on every mesh, of a model or else of the tiny checkpoint."""
    config = dataclasses.replace(config or load_checkpoint(TINY)[0], lora=lora)
    rng = np.random.default_rng(0)

    def place(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, values.__getitem__)

    return jax.tree.map(place, abstract_params(Transformer(config), mesh, collection=COLLECTION))


def check_shards(arrays, expected):
    """Asserts that each device holds its part of the expected values and nothing else."""
    for array, whole in zip(jax.tree.leaves(arrays), jax.tree.leaves(expected), strict=True):
        assert len(array.sharding.device_set) == 8
        for shard in array.addressable_shards:
            assert shard.data.shape == array.sharding.shard_shape(array.shape)
            assert_array_equal(shard.data, whole[shard.index])


def main(root: Path) -> None:
    jax.config.update('jax_disable_most_optimizations', True)  # as in tests/conftest.py
    distributed.start()
    mesh = make_mesh({'fsdp': 4, 'tensor': 2})
    _, _, params = load_checkpoint(TINY, mesh)
    config, _, whole = load_checkpoint(TINY)
    check_shards(params, whole)
    out = root / str(jax.process_index())  # only the first process may write
    save_checkpoint(out, params, TINY, shard_bytes=40_000)
    adapters = adapters_on(mesh, config)
    adapted = dataclasses.replace(config, lora=SIZES)
    save_adapter(out / 'adapter', adapters, adapted, 'base')
    merged = root / 'merged' / str(jax.process_index())
    save_checkpoint(merged, params, TINY, adapters=adapters, lora=SIZES)
    export(root / '0', TINY, root / 'exported', whole=False)  # to one place from both
    _, adapters = load_adapter(root / '0' / 'adapter', config, mesh)
    check_shards(adapters, load_adapter(root / '0' / 'adapter', config)[1])


if __name__ == '__main__':
    main(Path(sys.argv[1]))

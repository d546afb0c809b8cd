"""Weights move one published tensor at a time, between files and the devices of many processes."""

import json
import tracemalloc
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from spg_jax.models import lora, transfer
from spg_jax.models.llada.configuration import read_config
from spg_jax.models.peft import load_adapter
from spg_jax.models.tensor_files import open_tensors
from spg_jax.models.weights import load_checkpoint, save_checkpoint, tensor_shapes
from tests.meshes import mesh_of
from tests.models.across_processes import SIZES, TINY, adapters_on
from tests.processes import finish_all, start_pair


@pytest.fixture(scope='module')
def proportioned(tmp_path_factory):
    """A bfloat16 checkpoint, and the bytes of its largest tensor.

    It has the proportions of LLaDA-8B with each width divided by 32, a quarter of its layers, and
    its vocabulary divided by 64. Its largest tensor is the embedding, with two thirds of the bytes
    of the gate kernels of all 8 layers.
    """
    directory = tmp_path_factory.mktemp('proportioned')
    published = json.loads((TINY / 'config.json').read_text())
    published |= dict(d_model=128, n_layers=8, mlp_hidden_size=384, torch_dtype='bfloat16')
    published |= dict(vocab_size=1976, embedding_size=1976)
    (directory / 'config.json').write_text(json.dumps(published))
    config, _ = read_config(directory / 'config.json')
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        for name, shape in tensor_shapes(config).items()
    }
    save_file(tensors, directory / 'model.safetensors')
    return directory, max(value.nbytes for value in tensors.values())


def test_the_host_never_holds_a_stack_of_layers(proportioned, tmp_path):
    """tracemalloc counts the memory of Python, in which arrays on devices do not appear.

    On eight devices a tensor is read and gathered in pieces, which one device has as one piece.
    """
    directory, largest = proportioned
    mesh = mesh_of(2, 2, 2)

    def move() -> tuple[int, int]:
        """The peak of bytes held while reading, and while writing."""
        tracemalloc.reset_peak()
        _, _, params = load_checkpoint(directory, mesh)
        _, reading = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        save_checkpoint(tmp_path, params, directory)
        return reading, tracemalloc.get_traced_memory()[1]

    move()  # compiles, so that the memory of the compiler does not count below
    tracemalloc.start()
    try:
        reading, writing = move()
    finally:
        tracemalloc.stop()
    assert 0.1 * largest < reading < 2 * largest
    assert writing < 2 * largest


def assert_merged(directory, params, adapters, sizes, rtol=1e-5):
    """Asserts that a checkpoint holds `params`, with adapters merged, in the same types."""
    _, _, merged = load_checkpoint(directory)
    expected = jax.tree.map(lambda x: np.array(x, np.float32), params)
    for target in sizes.targets:
        factors = jax.device_get(adapters['layers'][target][lora.ADAPTER])
        expected['layers'][target]['kernel'] += sizes.scale * factors['a'] @ factors['b']

    def assert_same(merged, params, expected):
        assert merged.dtype == params.dtype
        assert_allclose(merged.astype(np.float32), expected, rtol=rtol, atol=1e-6)

    jax.tree.map(assert_same, merged, params, expected)


def test_adapters_are_merged_one_layer_at_a_time(proportioned, tmp_path, monkeypatch):
    """Beside the parameters, devices never hold more than one tensor, and merge one at a time."""
    directory, largest = proportioned
    config, _, params = load_checkpoint(directory, mesh_of(2, 2, 2))
    sizes = lora.LoRA(rank=8, alpha=4.0)
    adapters = adapters_on(mesh_of(2, 2, 2), config, sizes)
    merged_shapes, live_bytes = [], []

    def recording_merge(kernel, *adapter):
        merged_shapes.append(kernel.shape)
        return merged_kernel(kernel, *adapter)

    def recording_gather(tensor, tiled):
        live_bytes.append(sum(x.nbytes for x in jax.live_arrays()))
        return allgather(tensor, tiled=tiled)

    merged_kernel, allgather = lora.merged_kernel, transfer.multihost_utils.process_allgather
    stand_in = SimpleNamespace(process_allgather=recording_gather)
    monkeypatch.setattr(transfer, 'merged_kernel', recording_merge)
    monkeypatch.setattr(transfer, 'multihost_utils', stand_in)
    before = sum(x.nbytes for x in jax.live_arrays())
    save_checkpoint(tmp_path, params, directory, adapters=adapters, lora=sizes)
    assert {len(shape) for shape in merged_shapes} == {2}
    assert len(live_bytes) == len(tensor_shapes(config))
    assert max(live_bytes) <= before + largest
    monkeypatch.undo()

    assert_merged(tmp_path, params, adapters, sizes, rtol=2**-8)


def test_two_processes_read_and_write_what_neither_holds_whole(tmp_path):
    pair = start_pair('tests.models.across_processes', str(tmp_path))
    for code, _, errors in finish_all(pair):
        assert code == 0, errors
    assert {path.name for path in tmp_path.iterdir()} == {'0', 'merged', 'exported'}
    assert [path.name for path in (tmp_path / 'merged').iterdir()] == ['0']
    files = open_tensors(tmp_path / '0')
    original = load_file(TINY / 'model.safetensors')
    assert files.keys() == original.keys()
    for name, value in original.items():
        assert_array_equal(files[name].get_tensor(name), value)
    config, _, _ = load_checkpoint(TINY)
    for written in (tmp_path / '0' / 'adapter', tmp_path / 'exported'):
        sizes, adapters = load_adapter(written, config)
        assert sizes == SIZES
        jax.tree.map(assert_array_equal, adapters, adapters_on(mesh_of()))
    assert_merged(tmp_path / 'merged' / '0', load_checkpoint(TINY)[2], adapters, SIZES)

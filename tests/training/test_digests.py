"""Digests notice every flipped bit, wherever the arrays live."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from spg_jax import sharding
from spg_jax.training import digests
from spg_jax.training.digests import digest_arrays, non_finite
from tests.meshes import mesh_of

pytestmark = pytest.mark.fast


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        'kernel': rng.normal(size=(2, 8, 4)).astype(np.float32),
        'half': rng.normal(size=(8, 3)).astype(ml_dtypes.bfloat16),
        'mask': rng.random((8,)) < 0.5,
        'step': np.int32(7),
    }


def placed(arrays, mesh=None):
    mesh = mesh or mesh_of()
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    split = {'half', 'mask'}
    return {k: jax.device_put(x, rows if k in split else whole) for k, x in arrays.items()}


def test_a_digest_does_not_depend_on_the_mesh_nor_on_who_sums(monkeypatch):
    """NumPy sums up these arrays, which are small; above its limit the devices do."""
    meshes = [mesh_of(), mesh_of(8, 1, 1), mesh_of(2, 2, 2)]
    codes = jnp.array([-8, -1, 7], jnp.int4)
    on_host = {digest_arrays(placed(tree(), mesh) | {'codes': codes}) for mesh in meshes}
    monkeypatch.setattr(digests, 'HOST_ELEMENTS', -1)
    on_devices = {digest_arrays(placed(tree(), mesh) | {'codes': codes}) for mesh in meshes}
    assert on_host == on_devices and len(on_host) == 1


@pytest.mark.parametrize('name', ['kernel', 'half', 'step'])
def test_every_single_bit_counts(name):
    expected, rng = digest_arrays(placed(tree())), np.random.default_rng(1)
    for _ in range(20):
        damaged = tree()
        words = np.atleast_1d(damaged[name]).copy().reshape(-1).view(np.uint8)
        place, bit = rng.integers(len(words)), rng.integers(8)
        words[place] ^= np.uint8(1 << bit)
        array = words.view(damaged[name].dtype).reshape(np.shape(damaged[name]))
        assert digest_arrays(placed(damaged | {name: array})) != expected


@pytest.mark.parametrize('dtype', [jnp.int4, jnp.uint4])
def test_numbers_of_four_bits_count(dtype):
    """Those of a quantised kernel: each of the 16 values has a digest of its own."""
    values = range(jnp.iinfo(dtype).min, jnp.iinfo(dtype).max + 1)
    assert len({digest_arrays({'codes': jnp.full(3, value, dtype)}) for value in values}) == 16


def test_order_names_types_and_shapes_count():
    arrays = tree()
    swapped = arrays['kernel'].copy()
    swapped[0, 0, :2] = swapped[0, 0, 1::-1]
    variants = [
        arrays,
        arrays | {'kernel': swapped},
        arrays | {'kernel': arrays['kernel'].reshape(2, 4, 8)},
        arrays | {'mask': ~arrays['mask']},
        {name if name != 'kernel' else 'weights': x for name, x in arrays.items()},
        arrays | {'step': np.uint32(7)},
    ]
    digests = {digest_arrays(jax.tree.map(jnp.asarray, each)) for each in variants}
    assert len(digests) == len(variants)


@pytest.mark.parametrize('limit', [digests.HOST_ELEMENTS, -1])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_the_first_array_that_is_not_finite_is_named(monkeypatch, value, limit):
    monkeypatch.setattr(digests, 'HOST_ELEMENTS', limit)
    assert non_finite(placed(tree())) == ''
    arrays = tree()
    arrays['half'][3, 1] = value
    assert non_finite(placed(arrays, mesh_of(8, 1, 1))) == 'half'

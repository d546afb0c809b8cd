"""A training that goes on elsewhere, or further, ends as one that was never cut."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from spg_jax.process.interruption import Interruption
from spg_jax.train import train
from tests import adapted
from tests.meshes import mesh_of

pytestmark = pytest.mark.compiled_as_users_do


class Cut(Interruption):
    """Asks to stop after one update."""

    def requested(self):
        return True


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('going_on')


def config_of(root, steps):
    """A run whose rate warms up in its first update, however many there are."""
    config = adapted.get_config()
    config.update_from_flattened_dict(adapted.prepare(root))
    config.train.steps = steps
    config.optimizer.warmup_fraction = 1 / steps
    return config


def start(config, workdir, mesh, interruption=Interruption):
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        adapted.simplify(patch)
        with interruption() as stop:
            return train(config, workdir, mesh, stop)


def adapters_of(workdir):
    return load_file(workdir / 'best' / 'adapter' / 'adapter_model.safetensors')


@pytest.fixture(scope='module')
def whole(root):
    assert start(config_of(root, 3), root / 'whole', mesh_of())
    return adapters_of(root / 'whole')


def test_a_run_goes_on_on_other_meshes(root, whole):
    """Eight devices, then one, then eight of which parameters are split over four."""
    config = config_of(root, 3)
    assert not start(config, root / 'moved', mesh_of(8, 1, 1), Cut)
    assert not start(config, root / 'moved', mesh_of(), Cut)
    assert start(config, root / 'moved', mesh_of(2, 2, 2))
    moved = adapters_of(root / 'moved')
    assert moved.keys() == whole.keys()
    for name, values in whole.items():
        assert_allclose(moved[name], values, atol=1e-5, err_msg=name)


def test_a_finished_run_that_is_made_longer_keeps_its_warm_up(root, whole):
    config = config_of(root, 2)
    assert start(config, root / 'longer', mesh_of())
    short = adapters_of(root / 'longer')
    config.train.steps = 3
    assert start(config, root / 'longer', mesh_of())
    longer = adapters_of(root / 'longer')
    assert any(np.any(longer[name] != short[name]) for name in short)
    for name, values in whole.items():
        assert_array_equal(longer[name], values, err_msg=name)

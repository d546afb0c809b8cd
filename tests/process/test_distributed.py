"""Several processes compute what one process does, and end together. Whole runs of them are in
tests/test_going_on.py."""

import fcntl

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests import adapted
from tests.across_devices import outcome
from tests.meshes import mesh_of
from tests.processes import finish_all, start_pair, wait_until


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('distributed')
    return root, adapted.prepare(root)


@pytest.fixture(scope='module')
def alone(root):
    return outcome(root[0] / 'published', mesh_of())


def test_nothing_depends_on_where_it_is_computed(root, alone):
    """Imported parameters are equal bit for bit and completions token for token. Logits, and
    adapters after an update with dropout, are equal to 1e-5. The two processes split all three axes
    of the mesh."""
    out = root[0] / 'outcome.npz'
    pair = start_pair(
        *('tests.across_devices', str(root[0] / 'published'), str(out)),
        JAX_DISABLE_MOST_OPTIMIZATIONS='1',  # as here
    )
    for code, _, error in finish_all(pair):
        assert code == 0, error
    found = np.load(out)
    assert set(found) == set(alone)
    assert found['merged'].tolist() == list(range(8))  # the rows that each process had
    for name, values in alone.items():
        if name.startswith(("['params']", "['tokens']")):
            assert_array_equal(found[name], values)
        else:
            assert_allclose(found[name], values, atol=1e-5, err_msg=name)


def test_when_one_process_is_killed_the_other_ends(tmp_path):
    waiting = start_pair('tests.process.waiting', str(tmp_path / 'ready'))
    wait_until((tmp_path / 'ready').exists, *waiting)
    waiting[1].kill()
    (code, _, error), _ = finish_all(waiting)
    assert code != 0 and error


@pytest.mark.compiled_as_users_do
def test_what_stops_one_process_stops_the_other_with_its_reason(root, tmp_path):
    """Only the leader checks whether the directory is free."""
    with (tmp_path / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (code, _, error), (other_code, _, other_error) = finish_all(
            start_pair(*adapted.command(tmp_path, root[1]))
        )
    assert code == 1 and f'error: another process is training in {tmp_path}' in error
    assert other_code == 1
    assert f'error: ended with process 0: another process is training in {tmp_path}' in other_error

"""Several processes compute what one process does, go on where they were cut, and end together."""

import fcntl
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from spg_jax.models.peft import WEIGHTS
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


@pytest.mark.parametrize('where', [(4, 2, 1), 'two processes'])
def test_nothing_depends_on_where_it_is_computed(root, alone, where):
    """Imported parameters are equal bit for bit and completions token for token. Logits, and
    adapters after an update with dropout, are equal to 1e-5. The two processes split all three axes
    of the mesh."""
    if where == 'two processes':
        out = root[0] / 'outcome.npz'
        pair = start_pair(
            *('tests.across_devices', str(root[0] / 'published'), str(out)),
            JAX_DISABLE_MOST_OPTIMIZATIONS='1',  # as here
        )
        for code, _, error in finish_all(pair):
            assert code == 0, error
        found = np.load(out)
    else:
        found = outcome(root[0] / 'published', mesh_of(*where))
    assert set(found) == set(alone)
    assert found['merged'].tolist() == list(range(8))  # the rows that each process had
    for name, values in alone.items():
        if name.startswith(("['params']", "['tokens']")):
            assert_array_equal(found[name], values)
        else:
            assert_allclose(found[name], values, atol=1e-5, err_msg=name)


def training(root: tuple[Path, dict[str, str]], workdir: Path) -> list[subprocess.Popen]:
    """Starts a training of eight updates, each followed by a checkpoint."""
    return start_pair(
        'tests.adapted',
        '--distributed',
        f'--config={adapted.__file__}',
        f'--workdir={workdir}',
        '--config.train.steps=8',
        "--config.lora.targets=('query','down')",
        *(f'--config.{name}={value}' for name, value in root[1].items()),
    )


@pytest.mark.compiled_as_users_do
def test_two_processes_cut_and_killed_end_as_those_left_alone(root, tmp_path):
    """A SIGTERM to one process stops the first start. In the second start one process is killed,
    which ends the other."""
    whole = training(root, tmp_path / 'whole')
    for code, _, error in finish_all(whole):
        assert code == 0, error

    pair = training(root, tmp_path / 'cut')
    wait_until((tmp_path / 'cut' / 'checkpoints' / '1').exists, *pair)
    pair[1].send_signal(signal.SIGTERM)
    (code, out, error), (other_code, other_out, _) = finish_all(pair)
    assert code == other_code == 0, error
    assert 'saved; run the same command to go on' in out and not other_out.count('saved')
    done = max(int(path.name) for path in (tmp_path / 'cut' / 'checkpoints').glob('[0-9]*'))
    assert not (tmp_path / 'cut' / 'result.json').exists(), 'the signal came too late'

    pair = training(root, tmp_path / 'cut')
    wait_until((tmp_path / 'cut' / 'checkpoints' / str(done + 1)).exists, *pair)
    pair[1].kill()
    (code, _, error), _ = finish_all(pair)
    assert code != 0
    assert 'another task died' in error or 'error: ' in error
    assert not (tmp_path / 'cut' / 'result.json').exists(), 'the signal came too late'

    for code, _, error in finish_all(training(root, tmp_path / 'cut')):
        assert code == 0, error
    expected, found = (
        load_file(tmp_path / name / 'best' / 'adapter' / WEIGHTS) for name in ('whole', 'cut')
    )
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert_array_equal(found[name], values)


@pytest.mark.compiled_as_users_do
def test_what_stops_one_process_stops_the_other_with_its_reason(root, tmp_path):
    """Only the leader checks whether the directory is free."""
    with (tmp_path / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (code, _, error), (other_code, _, other_error) = finish_all(training(root, tmp_path))
    assert code == 1 and f'error: another process is training in {tmp_path}' in error
    assert other_code == 1
    assert f'error: ended with process 0: another process is training in {tmp_path}' in other_error

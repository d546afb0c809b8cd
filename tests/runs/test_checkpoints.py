"""Checkpoints are believed only if they are whole: flipped bits and damage of every kind."""

import gc
import itertools
import logging
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from benchmarks.damage import DAMAGE, OLDER_ARRAYS, flip_bit, largest_file
from spg_jax import sharding
from spg_jax.runs.arrays import _ignore_abandoned_reads, abstract
from spg_jax.runs.checkpoints import RunCheckpoints
from tests.meshes import mesh_of
from tests.runs.disks import full_disk


def arrays_of(step, mesh=None):
    """Arrays that compress badly, so that most bytes of a checkpoint are values."""
    rng = np.random.default_rng(step)
    arrays = {'kernel': rng.normal(size=(8, 64)).astype(np.float32), 'step': np.int32(step)}
    placed = sharding.replicated(mesh or mesh_of())
    return jax.tree.map(lambda x: jax.device_put(x, placed), arrays)


def record_of(step):
    return {'seconds': 1.5 * step, 'last_row': {'step': step}}


def target(record, mesh=None):
    return abstract(arrays_of(0, mesh))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Checkpoints of steps 4 and 8; tests damage copies of them."""
    directory = tmp_path_factory.mktemp('whole') / 'checkpoints'
    checkpoints = RunCheckpoints(directory, keep=2)
    for step in (2, 4, 8):
        checkpoints.save(step, arrays_of(step), record_of(step))
    return directory


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'checkpoints')
    return tmp_path / 'checkpoints'


def check_loaded(directory, step):
    found_step, arrays, record = RunCheckpoints(directory, keep=2).load_newest(target)
    assert found_step == step and record == record_of(step)
    jax.tree.map(assert_array_equal, arrays, arrays_of(step))


def test_the_newest_are_kept_and_come_back(whole):
    assert RunCheckpoints(whole, keep=2).steps() == [4, 8]
    check_loaded(whole, 8)


def test_checkpoints_that_a_kept_one_needs_are_kept(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    for step, needed in ((1, []), (2, [1]), (3, [1]), (4, [1]), (5, [4]), (6, [4])):
        checkpoints.save(step, arrays_of(step), record_of(step) | {'needed': needed})
        if step == 4:
            assert checkpoints.steps() == [1, 3, 4]
        if step == 5:  # 4 would need 1, should 5 be damaged
            assert checkpoints.steps() == [1, 4, 5]
    assert checkpoints.steps() == [4, 5, 6]


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2)])
def test_a_checkpoint_comes_back_on_another_mesh(whole, sizes):
    mesh = mesh_of(*sizes)
    _, arrays, _ = RunCheckpoints(whole, keep=2).load_newest(lambda record: target(record, mesh))
    assert arrays['kernel'].sharding.mesh.size == 8
    assert_array_equal(arrays['kernel'], arrays_of(8)['kernel'])


def test_every_flipped_bit_is_noticed(whole, tmp_path):
    """Either the checkpoint is refused, or what comes back is right to the last bit, as it is where
    the bit belongs to a file that nothing reads."""
    rng, refused = np.random.default_rng(0), 0
    files = [path for path in sorted((whole / '8').rglob('*')) if path.stat().st_size]
    files = [path for path in files if path.is_file()]
    for trial in range(40):
        copy = tmp_path / str(trial)
        shutil.copytree(whole / '8', copy / '8')
        file = copy / '8' / files[trial % len(files)].relative_to(whole / '8')
        flip_bit(file, rng)
        try:
            arrays, record = RunCheckpoints(copy, keep=2).load(8, target)
        except ValueError as error:
            assert '\n' not in str(error)
            refused += 1
            continue
        assert record == record_of(8)
        jax.tree.map(assert_array_equal, arrays, arrays_of(8))
    assert refused >= 15


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_newest_falls_back_and_is_set_aside(copied, capsys, damage):
    DAMAGE[damage](copied / '8')
    check_loaded(copied, 4)
    line = capsys.readouterr().out.rstrip('\n')
    assert '\n' not in line and str(copied / '8') in line
    assert line.endswith('set aside as 8.damaged, going on from step 4')
    assert (copied / '8.damaged').is_dir() and not (copied / '8').exists()
    # Another one of the same step goes to another place, and saving deletes neither.
    checkpoints = RunCheckpoints(copied, keep=1)
    checkpoints.save(8, arrays_of(8), record_of(8))
    DAMAGE[damage if damage != OLDER_ARRAYS else 'a file is cut'](copied / '8')
    with pytest.raises(ValueError, match='no older checkpoint is whole either') as error:
        checkpoints.load_newest(target)
    assert '\n' not in str(error.value)
    assert (copied / '8').is_dir() and (copied / '8.damaged').is_dir()


def test_a_save_that_cannot_be_read_back_does_not_count(tmp_path, monkeypatch):
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, arrays_of(1), record_of(1))
    digests = itertools.count()
    monkeypatch.setattr('spg_jax.runs.checkpoints.digest_arrays', lambda arrays: str(next(digests)))
    with pytest.raises(OSError, match='2 could not be saved .*not those that were saved'):
        checkpoints.save(2, arrays_of(2), record_of(2))
    monkeypatch.undo()
    assert checkpoints.steps() == [1, 2]  # the older one stays


def test_what_a_cut_save_left_is_cleared(tmp_path):
    unfinished = tmp_path / '3.orbax-checkpoint-tmp-17'
    unfinished.mkdir()
    assert RunCheckpoints(tmp_path, keep=1).steps() == []
    assert not unfinished.exists()


def test_the_target_is_made_from_the_record(whole):
    seen = []

    def target_of(record):
        seen.append(record)
        return abstract({'kernel': jnp.zeros((8, 64)), 'step': jnp.int32(0)})

    RunCheckpoints(whole, keep=2).load(4, target_of)
    assert seen == [record_of(4)]


def test_a_full_disk_loses_nothing_and_is_one_line(tmp_path, monkeypatch, caplog):
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, arrays_of(1), record_of(1))

    def full(*_, **__):
        logging.getLogger('orbax').error('a traceback\nof many lines')
        raise ValueError('RESOURCE_EXHAUSTED:\nNo space left on device')

    monkeypatch.setattr('spg_jax.runs.checkpoints.ocp.save', full)
    with pytest.raises(OSError, match='2 could not be saved .*No space left on device') as error:
        checkpoints.save(2, arrays_of(2), record_of(2))
    assert '\n' not in str(error.value) and not caplog.records
    monkeypatch.undo()
    check_loaded(tmp_path, 1)


def test_a_disk_that_is_really_full_loses_nothing_and_is_one_line(copied, caplog):
    checkpoints = RunCheckpoints(copied, keep=2)
    with full_disk(500), pytest.raises(OSError, match='9 could not be saved') as error:
        checkpoints.save(9, arrays_of(9), record_of(9))
    assert '\n' not in str(error.value) and not caplog.records
    check_loaded(copied, 8)


@pytest.mark.parametrize('failing', ['record', 'arrays'])
def test_processes_fall_back_together(copied, monkeypatch, failing):
    """Another process cannot read the newest checkpoint; this one can."""
    answers = itertools.chain([1] if failing == 'record' else [0, 1], itertools.repeat(0))
    monkeypatch.setattr(
        'spg_jax.runs.checkpoints.distributed.largest', lambda value: max(value, next(answers))
    )
    check_loaded(copied, 4)
    assert (copied / '8.damaged').is_dir()


def test_a_name_that_cannot_be_read_from_is_no_damage(copied, tmp_path):
    shutil.copytree(copied / '8', tmp_path / 'br[1]' / '8')
    with pytest.raises(ValueError, match='use a path without brackets') as error:
        RunCheckpoints(tmp_path / 'br[1]', keep=2).record(8)
    assert 'damaged' not in str(error.value) and '\n' not in str(error.value)


def test_reads_that_are_abandoned_say_nothing_later(tmp_path, monkeypatch, caplog):
    """One array cannot be read, and Orbax gives up those of the others."""
    rng, reported = np.random.default_rng(0), []
    arrays = {str(i): jnp.asarray(rng.normal(size=(8, 64))) for i in range(2)}
    RunCheckpoints(tmp_path, keep=1).save(1, arrays, {})
    largest_file(tmp_path / '1' / 'state').write_bytes(b'x' * 999)
    monkeypatch.setattr(sys, 'unraisablehook', reported.append)
    _ignore_abandoned_reads.cache_clear()
    with pytest.raises(ValueError, match='cannot be read'):
        RunCheckpoints(tmp_path, keep=1).load(1, lambda _: abstract(arrays))
    gc.collect()
    for logger in ('asyncio', 'orbax'):
        logging.getLogger(logger).error('Task exception was never retrieved')
    assert [record.name for record in caplog.records] == ['orbax']
    closed, other = (
        SimpleNamespace(exc_value=RuntimeError(text), object=None)
        for text in ('Event loop is closed', 'something else')
    )
    code = SimpleNamespace(co_filename='site-packages/orbax/checkpoint/serialization.py')
    read = SimpleNamespace(exc_value=other.exc_value, object=SimpleNamespace(cr_code=code))
    reported.clear()
    for unraisable in (closed, read, other):
        sys.unraisablehook(unraisable)
    assert reported == [other]

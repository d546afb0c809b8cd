"""Paths that a user writes, locks where there are none, and data that may only be read."""

import errno
import fcntl
import os
import pwd
import shutil
from pathlib import Path

import pytest

from spg_jax import tasks
from spg_jax.process import files
from spg_jax.runs.claim import claimed

pytestmark = pytest.mark.fast


def test_a_home_directory_that_is_not_known_is_no_folder_called_tilde(monkeypatch):
    def nobody(_):
        raise KeyError('no such user')

    monkeypatch.delenv('HOME')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', nobody)
    with pytest.raises(ValueError, match="'~/run' names a home directory that is not known here"):
        files.local_path('~/run')
    assert files.user_cache() is None


def test_the_home_of_another_user_is_known_or_refused(monkeypatch):
    root = pwd.getpwuid(0)
    assert files.local_path(f'~{root.pw_name}/run') == Path(root.pw_dir) / 'run'
    with pytest.raises(ValueError, match='names a home directory'):
        files.local_path('~no_such_user/run')


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path):
    files.make_folder(tmp_path / 'a' / 'b', 'never said')
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match=r'file cannot be made \(File exists\); give --out'):
        files.make_folder(tmp_path / 'file', 'give --out')


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_stops_nothing(monkeypatch, tmp_path, capsys, number):
    """Fault G18: what flock says on Lustre without -o flock, and on other file systems."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'flock', flock)
    for use in (lambda: files.locked(tmp_path / 'lock'), lambda: claimed(tmp_path / 'run', {})):
        with use():
            pass
        error = capsys.readouterr().err
        assert 'lock: this file system has no locks' in error and error.count('\n') == 1
    with pytest.raises(OSError):
        monkeypatch.setattr(fcntl, 'flock', lambda *_: os.stat('/nowhere'))
        with files.locked(tmp_path / 'lock'):
            pass


def test_a_lock_keeps_a_second_process_out(tmp_path):
    with (tmp_path / 'lock').open('w') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError), files.locked(tmp_path / 'lock', wait=False):
            pass
    with files.locked(tmp_path / 'lock', wait=False):
        pass


def test_data_that_is_there_is_read_without_a_lock(data_dir, tmp_path):
    """Fault G16. A user may only read the data. Root may write everywhere, so the lock is
    something that nobody can open for writing, and what the folder holds must not change."""
    task = tasks.get('sudoku', 'compact')
    first = task.source('test', data_dir)[0]
    shutil.copytree(data_dir / 'sudoku', tmp_path / 'sudoku')
    (tmp_path / 'lock').mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    folders = [path for path in (tmp_path, *tmp_path.rglob('*')) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert task.source('test', tmp_path)[0] == first
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_path_that_the_locale_cannot_express_is_refused(tmp_path, monkeypatch):
    """Fault F89. Under LC_ALL=C Python has a path with a letter such as ü as these characters,
    which no library takes. The path may be that of the working directory, or a part of it."""
    folder = os.path.join(os.fsencode(tmp_path), b'th \xff')
    os.mkdir(folder)
    for path in (os.fsdecode(folder), f'{os.fsdecode(folder)}/run', '~/run', 'run'):
        if path == '~/run':
            monkeypatch.setenv('HOME', os.fsdecode(folder))
        if path == 'run':
            monkeypatch.chdir(os.fsdecode(folder))
        with pytest.raises(ValueError, match=r'th .udcff.* set LC_ALL=C.UTF-8') as error:
            files.local_path(path, saves=True)
        assert '\n' not in str(error.value)
    assert files.with_home('~/run') == f'{os.fsdecode(folder)}/run'  # an ordinary file can be read


# --- whole files ----------------------------------------------------------------------------------


def test_two_processes_may_write_one_file_at_once(tmp_path, monkeypatch):
    """The second writes all of it while the first waits for the disk."""
    path, fsync = tmp_path / 'result.json', os.fsync

    def other(number):
        fsync(number)
        with monkeypatch.context() as patch:
            patch.setattr(os, 'fsync', fsync)
            patch.setattr(os, 'getpid', lambda: 1)
            files.write_whole(path, 'second')
            assert path.read_text() == 'second'

    monkeypatch.setattr(os, 'fsync', other)
    files.write_whole(path, 'first')
    assert path.read_text() == 'first'
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / 'result.json'
    path.write_text('old')
    monkeypatch.setattr(os, 'fsync', lambda _: os.stat('/nowhere'))
    with pytest.raises(FileNotFoundError):
        files.write_whole(path, 'new')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


# --- caches ---------------------------------------------------------------------------------------


def test_a_cache_loses_what_was_not_used_for_longest(tmp_path):
    for name, used, written in (('a', 1, 5), ('b', 9, 1), ('c', 2, 2), ('d', 3, 3)):
        (tmp_path / name).write_bytes(b'x' * 100)
        os.utime(tmp_path / name, (used, written))
    files.drop_unused(tmp_path, 400)
    assert len(list(tmp_path.iterdir())) == 4
    files.drop_unused(tmp_path, 299)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'b']


def test_a_cache_that_does_not_exist_loses_nothing(tmp_path):
    files.drop_unused(tmp_path / 'none', 0)

"""Files and folders: names that work, files that are whole, and locks."""

import contextlib
import errno
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_STORE = re.compile(r'[a-zA-Z][a-zA-Z0-9+.-]*://')  # gs://, s3://, https:// …
_CONTROL = re.compile(r'[\x00-\x1f\x7f]')
# Orbax reads a checkpoint back by a pattern made of its path, so these characters name other files
# than the ones that it wrote.
_PATTERN = re.compile(r'[][*?\\]')
# What flock says on a file system without locks, such as Lustre mounted without -o flock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def with_home(path: str) -> str:
    """The path that a user wrote, with ~ as the home directory.

    Raises:
      ValueError: one line that says why there is no such file or folder here.
    """
    if _STORE.match(path):
        raise ValueError(
            f'{path!r} is the address of a store, not a folder; mount the store and give the '
            'folder, as launch/README.md does under "A file system for all workers"'
        )
    try:
        return str(Path(path).expanduser()) if path.startswith('~') else path
    except RuntimeError:
        raise ValueError(
            f'{path!r} names a home directory that is not known here; give the path without ~'
        ) from None


def local_path(path: str, saves: bool = False) -> Path:
    """The path of a file or a folder, as `with_home`, if its name is one that libraries can use.

    Args:
      path: a path from a flag or a setting.
      saves: whether checkpoints are saved under the path, whose name must then be one that they
        can be read back from.

    Raises:
      ValueError: one line that says why the path cannot be used.
    """
    expanded = Path(with_home(path))
    absolute = str(expanded.absolute())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f'{absolute!r} has characters that the locale of this process cannot express; set '
            'LC_ALL=C.UTF-8'
        ) from None
    character = _CONTROL.search(path) or (saves and _PATTERN.search(absolute))
    if character:
        raise ValueError(
            f'{path!r} is under a name with {character[0]!r}, from which nothing saved could be '
            'read back; use a path without brackets, *, ?, backslashes and control characters'
        )
    return expanded


def user_cache() -> Path | None:
    """The folder of the user's caches; None if the user has no home directory."""
    if os.environ.get('XDG_CACHE_HOME'):
        return Path(os.environ['XDG_CACHE_HOME'])
    with contextlib.suppress(RuntimeError):
        return Path.home() / '.cache'
    return None


def make_folder(path: Path, remedy: str) -> None:
    """Makes a folder and those above it, unless it exists.

    Args:
      path: of the folder.
      remedy: what to do where it cannot be made.

    Raises:
      ValueError: it cannot be made; the message is one line that ends with the remedy.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'{path} cannot be made ({error.strerror}); {remedy}') from None


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file, which is made if it does not exist.

    A file system that has no locks does not stop the work. One line on standard error then says
    that nothing keeps a second process out.

    Args:
      path: the file.
      wait: whether to wait for another process that holds the lock.

    Raises:
      BlockingIOError: if another process holds the lock, and `wait` is False.
      OSError: if the file cannot be made.
    """
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f'{path}: this file system has no locks ({error.strerror}), so nothing keeps a '
                'second process out; start one at a time',
                file=sys.stderr,
                flush=True,
            )
        yield


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or all of the new, whenever it looks.

    The content goes to a file beside `path`, reaches the disk, and then takes the name. Of several
    processes that write one file at once, the last to finish wins.

    Args:
      path: the file, in a directory that exists.
      content: text, which is written as UTF-8, or bytes.
    """
    unfinished = path.with_name(f'{path.name}.{os.getpid()}.new')
    try:
        with unfinished.open('wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # What went wrong before is the error to report.
            unfinished.unlink()
        raise


def drop_unused(folder: Path, most_bytes: int) -> None:
    """Removes files of a cache, those not used for longest first, until the others fit.

    Other processes may use the cache at the same time. What cannot be removed stays.

    Args:
      folder: holds the files; it need not exist.
      most_bytes: what the files may have together.
    """
    files = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # another process has just removed it
                status = entry.stat()
                # Where reading leaves no trace, the time of writing counts.
                files.append((max(status.st_atime, status.st_mtime), status.st_size, entry.path))
    left = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if left <= most_bytes:
            return
        with contextlib.suppress(OSError):
            os.remove(path)
            left -= size

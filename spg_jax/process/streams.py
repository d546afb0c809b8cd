"""Standard output and error that never stop the work that prints to them.

A terminal is closed, the reader of a pipe ends, a disk is full: each of these makes the next print
fail. A run must outlive that, because the updates since its last checkpoint are worth more than the
lines about them.
"""

import contextlib
import errno
import os
import sys
from typing import Any, TextIO

# These mean that nobody reads any more. Other errors, such as a full disk, lose what somebody
# expects to find.
_NO_READER = (errno.EPIPE, errno.EIO)


class Lasting:
    """A text stream whose writes never fail.

    After the first error the descriptor leads to the null device, so that all others who write to
    it, such as loggers and C++ libraries, go on in silence as well.

    Attributes:
      error: the first error; None as long as everything was written.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text, or drops it if the stream cannot take it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Writes several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream if it still takes anything."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or error
        # A stream that has no descriptor, such as one of a test, has nothing to redirect.
        with contextlib.suppress(OSError, ValueError):
            descriptor, null = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def outlive_readers() -> None:
    """Makes sys.stdout and sys.stderr streams whose writes never fail."""
    for descriptor in range(3):
        # A descriptor that was closed at the start would be given to the next file that is opened,
        # and messages would be written into it.
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, 'w')
        if isinstance(stream, Lasting):
            continue
        if hasattr(stream, 'reconfigure'):  # A path may have characters that a locale has not.
            stream.reconfigure(errors='backslashreplace')
        setattr(sys, name, Lasting(stream))


def check_delivered() -> None:
    """Raises OSError if standard output lost text that somebody expects to find.

    Text for a reader that has ended is not missed by anyone.
    """
    sys.stdout.flush()
    error = getattr(sys.stdout, 'error', None)
    if error and error.errno not in _NO_READER:
        raise OSError(f'standard output lost text ({error.strerror}); nothing else was lost')

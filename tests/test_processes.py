"""A test that gives up on a process ends all that the process began."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest

from tests import processes

pytestmark = pytest.mark.fast

# A program that starts another one and sleeps beside it; both would outlive any test.
FAMILY = (
    'import subprocess, sys; '
    'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]); '
    'print(child.pid, flush=True); child.wait()'
)


def alive(pid: int) -> bool:
    """Whether a process runs: one that was killed and that nobody waits for is none."""
    with suppress(FileNotFoundError):
        return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] != 'Z'
    return False


def family() -> tuple[subprocess.Popen[str], int]:
    """A process, and the id of its child, both at work."""
    process = processes.start([sys.executable, '-c', FAMILY])
    return process, int(process.stdout.readline())


@pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='reads /proc')
@pytest.mark.parametrize('how', ['hangs', 'is left by a test that fails'])
def test_no_process_goes_on_beside_the_rest(how):
    process, child = family()
    assert alive(process.pid) and alive(child)
    if how == 'hangs':
        with pytest.raises(subprocess.TimeoutExpired):
            processes.finish(process, seconds=0.1)
    else:
        processes.end_all()  # as the end of every test does
    processes.wait_until(lambda: not alive(child))
    assert not alive(process.pid)

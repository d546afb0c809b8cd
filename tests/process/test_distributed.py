"""Several processes end together. tests/test_going_on.py compares what they compute with what one
process does."""

import fcntl

import pytest

from tests import adapted
from tests.processes import finish_all, start_pair, wait_until


def test_when_one_process_is_killed_the_other_ends(tmp_path):
    waiting = start_pair('tests.process.waiting', str(tmp_path / 'ready'))
    wait_until((tmp_path / 'ready').exists, *waiting)
    waiting[1].kill()
    (code, _, error), _ = finish_all(waiting)
    assert code != 0 and error


@pytest.mark.compiled_as_users_do
def test_what_stops_one_process_stops_the_other_with_its_reason(tmp_path):
    """Only the leader checks whether the directory is free.

    Fault G31: the processes meet though a proxy leads to the internet, where nothing listens.
    """
    proxies = {name: 'http://127.0.0.1:9' for name in ('http_proxy', 'https_proxy', 'grpc_proxy')}
    workdir = tmp_path / 'run'
    workdir.mkdir()
    with (workdir / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (code, _, error), (other_code, _, other_error) = finish_all(
            start_pair(*adapted.command(workdir, adapted.prepare(tmp_path)), **proxies)
        )
    assert code == 1 and f'error: another process is training in {workdir}' in error
    assert other_code == 1 and 'proxy' not in error + other_error
    assert f'error: ended with process 0: another process is training in {workdir}' in other_error

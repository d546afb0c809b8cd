"""A stream that cannot be written to stops nothing, and only a lost result is an error."""

import os
import subprocess
import sys

import pytest

from spg_jax.process import streams
from tests.processes import REPOSITORY, run

pytestmark = pytest.mark.fast


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, 'w')


def test_writes_after_the_reader_has_ended_are_dropped():
    stream = broken_pipe()
    lasting = streams.Lasting(stream)
    for _ in range(2):
        print('line', file=lasting, flush=True)
    assert isinstance(lasting.error, BrokenPipeError)
    assert os.write(stream.fileno(), b'from a library') == len(b'from a library')
    stream.close()


@pytest.mark.parametrize('full', [True, False])
def test_only_text_for_somebody_is_missed(monkeypatch, full):
    stream = open('/dev/full', 'w') if full else broken_pipe()
    monkeypatch.setattr(sys, 'stdout', streams.Lasting(stream))
    print('result')
    if full:
        with pytest.raises(OSError, match='standard output lost text'):
            streams.check_delivered()
    else:
        streams.check_delivered()
    stream.close()


def program(text: str, shell: str, **variables: str) -> subprocess.CompletedProcess:
    words = ['bash', '-c', f'"$0" -c "$1" {shell}', sys.executable, text]
    return run(words, env=os.environ | {'PYTHONPATH': str(REPOSITORY)} | variables)


def test_a_file_never_gets_the_descriptor_of_a_closed_stream(tmp_path):
    ended = program(
        'from spg_jax.process import streams; import os; streams.outlive_readers(); '
        f'file = open({str(tmp_path / "saved")!r}, "w"); os.write(1, b"message"); '
        'print("message"); os.write(2, b"message"); file.write("content")',
        '>&- 2>&- <&-',
    )
    assert ended.returncode == 0
    assert (tmp_path / 'saved').read_text() == 'content'


def test_a_locale_without_the_letters_of_a_path_stops_no_message():
    ended = program(
        'from spg_jax.process import streams; streams.outlive_readers(); print("th\\u00fc")',
        '',
        LC_ALL='C',
        PYTHONUTF8='0',
        PYTHONCOERCECLOCALE='0',
    )
    assert (ended.returncode, ended.stdout) == (0, 'th\\xfc\n'), ended.stderr

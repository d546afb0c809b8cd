"""One signal asks to save; an echo of it is the same request, a later one stops."""

import signal

import pytest

from spg_jax.process import interruption
from spg_jax.process.interruption import Interruption

pytestmark = pytest.mark.fast


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_a_later_one_acts_as_usual(monkeypatch, number):
    seen = []
    before = signal.signal(number, lambda number, frame: seen.append(number))
    try:
        with Interruption() as asked:
            assert not asked.requested()
            for at in (100.0, 102.9):
                monkeypatch.setattr(interruption.time, 'monotonic', lambda at=at: at)
                signal.raise_signal(number)
                assert asked.requested() and not seen
            monkeypatch.setattr(interruption.time, 'monotonic', lambda: 103.1)
            signal.raise_signal(number)
            assert seen == [number]
        signal.raise_signal(number)
        assert seen == [number, number]
    finally:
        signal.signal(number, before)

"""A signal asks to save. A repeat within seconds is the same request; a later one stops."""

import signal

import pytest

from spg_jax.process import interruption
from spg_jax.process.interruption import Interruption

pytestmark = pytest.mark.fast


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_a_later_one_acts_as_usual(monkeypatch, number):
    handled = []
    previous = signal.signal(number, lambda number, frame: handled.append(number))
    try:
        with Interruption() as guard:
            assert not guard.requested()
            for now in (100.0, 102.9):
                monkeypatch.setattr(interruption.time, 'monotonic', lambda now=now: now)
                signal.raise_signal(number)
                assert guard.requested() and not handled
            monkeypatch.setattr(interruption.time, 'monotonic', lambda: 103.1)
            signal.raise_signal(number)
            assert handled == [number]
        signal.raise_signal(number)
        assert handled == [number, number]
    finally:
        signal.signal(number, previous)

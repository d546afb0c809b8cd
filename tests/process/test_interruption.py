"""A signal asks to save. A repeat within seconds is the same request; a later one stops."""

import io
import signal
import sys

import pytest

from spg_jax.process import interruption, streams
from spg_jax.process.interruption import Interruption

pytestmark = pytest.mark.fast


@pytest.fixture
def no_death():
    """Signals that the code under test leaves alone do not end the tests."""
    numbers = (signal.SIGHUP, signal.SIGUSR1)
    previous = [signal.signal(number, lambda *_: None) for number in numbers]
    yield
    for number, handler in zip(numbers, previous, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize('number', interruption.WARNINGS)
def test_a_warning_is_a_request_however_often_it_comes(monkeypatch, no_death, number):
    with Interruption() as guard:
        for now in (100.0, 200.0):
            monkeypatch.setattr(interruption.time, 'monotonic', lambda now=now: now)
            signal.raise_signal(number)
            assert guard.requested()


def test_a_hangup_that_was_ignored_stays_ignored(no_death):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    with Interruption() as guard:
        signal.raise_signal(signal.SIGHUP)
        assert not guard.requested()


@pytest.mark.parametrize('raised', [BrokenPipeError, RuntimeError('reentrant call')])
def test_a_request_counts_though_nothing_can_be_printed(monkeypatch, no_death, raised):
    class Stream(io.TextIOBase):
        def write(self, text):
            raise raised

    monkeypatch.setattr(sys, 'stdout', streams.Lasting(Stream()))
    with Interruption() as guard:
        signal.raise_signal(signal.SIGUSR1)
        assert guard.requested()


@pytest.mark.parametrize('number', interruption.WARNINGS)
def test_a_warning_does_not_end_the_last_work(number):
    """The report of a run comes after `release`."""
    handled = []
    previous = signal.signal(number, lambda number, frame: handled.append(number))
    try:
        with Interruption() as guard:
            guard.release()
            signal.raise_signal(number)
            assert not guard.requested() and not handled
        signal.raise_signal(number)
        assert handled == [number]
    finally:
        signal.signal(number, previous)


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

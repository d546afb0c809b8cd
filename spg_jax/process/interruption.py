"""Ctrl-C and SIGTERM as a request to save and stop, honoured between two updates."""

import itertools
import os
import signal
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

# JAX lets several processes stop at the same call, counted over the life of the program.
_calls = itertools.count()

REPEAT_SECONDS = 3.0  # schedulers may send one signal by two ways


class Interruption:
    """While entered, SIGINT or SIGTERM is remembered; another, REPEAT_SECONDS later, acts as usual.

    With several processes a signal to any of them stops all, after the same update.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> 'Interruption':
        # SIGTERM to one of several processes is noticed, and passed on, by JAX.
        several = jax.process_count() > 1
        for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the signals their usual meaning again: nothing is left to save."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to save and stop now; to be asked once an update, by every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_calls))
        return self._requested_at is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is not None:
            if now - self._requested_at > REPEAT_SECONDS:
                self.release()
                signal.raise_signal(number)
            return
        self._requested_at = now
        print(
            f'\n{signal.Signals(number).name}: saving after the next update, again to stop at once',
            flush=True,
        )
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

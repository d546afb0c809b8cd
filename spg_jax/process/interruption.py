"""Ctrl-C and SIGTERM as requests to save and stop, which are honoured between two updates."""

import itertools
import os
import signal
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

# With several processes JAX chooses one call of `requested` at which all of them stop. Calls are
# counted over the life of the program.
_calls = itertools.count()

REPEAT_SECONDS = 3.0  # a signal within this time repeats the last: schedulers may send it twice


class Interruption:
    """While it is entered, it remembers SIGINT or SIGTERM instead of letting them end the process.

    A second signal more than REPEAT_SECONDS after the first acts as usual. With several processes
    a signal to any of them stops all of them after the same update.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> 'Interruption':
        # With several processes JAX itself handles SIGTERM, and tells the other processes.
        several = jax.process_count() > 1
        for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the signals their usual meaning again, for when nothing is left to save."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to save and stop now. Every process has to call it once after each update."""
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
        if jax.process_count() > 1:  # JAX tells the other processes of a SIGTERM only.
            os.kill(os.getpid(), signal.SIGTERM)

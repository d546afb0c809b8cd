"""Signals as requests to save and stop, which are honoured between two updates."""

import contextlib
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
# SIGHUP says that the terminal was closed. SIGUSR1 is what Slurm users choose for --signal, so that
# a job hears of its time limit. Neither of them ever asks to stop at once.
WARNINGS = (signal.SIGHUP, signal.SIGUSR1)


class Interruption:
    """While it is entered, signals are remembered instead of letting them end the process.

    These are SIGINT, SIGTERM and WARNINGS. A second SIGINT or SIGTERM more than REPEAT_SECONDS
    after the first signal acts as usual. With several processes a signal to any of them stops all
    of them after the same update.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> 'Interruption':
        numbers = {signal.SIGINT, signal.SIGTERM, *WARNINGS}
        if jax.process_count() > 1:  # JAX itself handles SIGTERM, and tells the other processes.
            numbers.remove(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup asks
            numbers.remove(signal.SIGHUP)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def release(self) -> None:
        """Lets SIGINT and SIGTERM end the process again, for when nothing is left to save.

        WARNINGS are ignored until the context is left. They ask to save, and by themselves they
        would end the process in the middle of its last work.
        """
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if number in WARNINGS else handler)

    def requested(self) -> bool:
        """Whether to save and stop now. Every process has to call it once after each update."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_calls))
        return self._requested_at is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is not None:
            if number not in WARNINGS and now - self._requested_at > REPEAT_SECONDS:
                self.release()
                signal.raise_signal(number)
            return
        self._requested_at = now
        if jax.process_count() > 1:  # JAX tells the other processes of a SIGTERM only.
            os.kill(os.getpid(), signal.SIGTERM)
        advice = '' if number in WARNINGS else ', again to stop at once'
        # The signal may have come in the middle of another print, and a print within a print fails.
        with contextlib.suppress(RuntimeError):
            print(
                f'\n{signal.Signals(number).name}: saving after the next update{advice}', flush=True
            )

"""Ctrl-C and SIGTERM as a request to save and stop, honoured between two updates."""

import signal
from types import FrameType


class Interruption:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; a second one acts as
    usual."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> 'Interruption':
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the signals their usual meaning again: nothing is left to save."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        print(
            f'\n{signal.Signals(number).name}: saving after the next update, again to stop at once',
            flush=True,
        )
        self.release()

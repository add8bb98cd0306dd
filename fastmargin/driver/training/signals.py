"""SIGINT and SIGTERM stop a run after the current step, with a checkpoint.

    SIGINT    exit code 130; a second one stops at once, without a checkpoint of that step
    SIGTERM   exit code 143

The code is 128 + the number of the signal, as in shells. The handlers only note the signal; loop.py asks for it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(SystemExit):
    """A signal has stopped the run. If nobody catches it, `code` is the exit code of the process."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Noted:
    """`number` of the last signal, 0 for none."""

    number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def noted() -> Iterator[Noted]:
    """Notes signals in its body; then restores the handlers. Outside the main thread, where Python allows no handlers,
    it notes nothing."""
    noted = Noted()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, noted.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""SIGINT and SIGTERM stop a run between two steps, once it has saved a checkpoint.

    SIGINT    exit code 130; a second one stops at once, with the checkpoints made so far
    SIGTERM   exit code 143

128 + the number of the signal, as shells have it. A handler does no more than note the signal.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(SystemExit):
    """A signal has stopped the run: its `code` is that of the process, unless someone catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Noted:
    """The signal that was caught, 0 for none."""

    number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def noted() -> Iterator[Noted]:
    """Within it the signals are noted; then they are handled as before. Only a main thread may do so, or has to."""
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

"""What SIGINT and SIGTERM mean to a server in the foreground: the first ends it in order, the second at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal where there is nothing to drain, or a second one. No Exception: nothing may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stopping:
    """``event`` is set by the first signal once ``serving`` is True; before that, and from the second on, a signal
    raises Interrupted in the main thread."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event
        self.serving = False
        self.signalled = False

    def handle(self, number: int, frame: object) -> None:
        if not self.serving or self.signalled:
            raise Interrupted(number)
        self.signalled = True
        self.event.set()


@contextlib.contextmanager
def handled(event: threading.Event) -> Iterator[Stopping]:
    """Handle the signals while inside; in another thread than the main one, leave them alone."""
    stopping = Stopping(event)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, stopping.handle)
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

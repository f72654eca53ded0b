"""Ctrl-C, SIGTERM and SIGHUP: a run is stopped from outside, and says so by its exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WAS_STOPPED = "was stopped by "  # begins what is said of a party, or of the run


class StoppedError(SystemExit):
    """A signal stopped the run. Its exit code is that of a shell, 128 and the number of the signal."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.message = number, message or f"the run {was_stopped_by(number)}"

    def __str__(self) -> str:
        return self.message


def was_stopped_by(number: int) -> str:
    return WAS_STOPPED + ("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)


def heeded() -> set[signal.Signals]:
    """Return those of STOPS that are not ignored, as nohup has SIGHUP."""
    return {number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN}


@contextmanager
def raising() -> Iterator[None]:
    """Raises StoppedError, in the main thread, which alone may listen to signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def block() -> None:
    """Before any thread is started, since all inherit it: only `call_when_stopped` hears the signals."""
    signal.pthread_sigmask(signal.SIG_BLOCK, heeded())


def unblock(*_: object) -> None:
    """In a process that inherits from one that has blocked them: whoever started it may end it by them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def call_when_stopped(
    handle: Callable[[int, bool], None], wait: Callable[[], int] = lambda: signal.sigwait(heeded())
) -> None:
    """Call `handle` with the signal that `wait` returns, and whether it is the second one there.

    In a thread of its own: the main one may wait in C code, where Python handles no signal.
    """

    def listen() -> None:
        for is_second in (False, True):
            handle(wait(), is_second)

    threading.Thread(target=listen, daemon=True).start()


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError(number)

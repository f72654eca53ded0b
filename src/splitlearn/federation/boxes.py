"""What has come from a party and is not read yet, or waits to go to one: in order, and how many bytes it has."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

AHEAD = 2**26  # bytes that a party may send another before it waits for an answer
END = b"end"  # no message: these are JSON, or begin with the magic of a frame
LOOKS = 0.005  # seconds between looks at whether there is room again


class Box:
    """Any thread may put, one gets.

    `put` never waits: a party's own program is held back by what it awaits. Who puts what others send waits for room
    behind it, and so do they then, since nobody reads their stream.

    Arguments:
        most: the bytes that it has room for.
    """

    def __init__(self, most: int) -> None:
        self.most, self.closed = most, False
        self._messages: SimpleQueue[bytes] = SimpleQueue()
        self._lock = threading.Lock()
        self._put = self._got = 0  # bytes

    @property
    def num_bytes(self) -> int:
        return self._put - self._got

    def __len__(self) -> int:
        return self._messages.qsize()

    def put(self, message: bytes) -> None:
        with self._lock:
            self._put += len(message)
        self._messages.put(message)

    def get(self, timeout: float | None = None) -> bytes:
        """Wait for the next message. Raises queue.Empty when none comes in that many seconds."""
        message = self._messages.get(timeout=timeout)
        self._got += len(message)
        return message

    def close(self) -> None:
        """What is in it already can still be got; then END comes."""
        self.closed = True
        self._messages.put(END)

    def wait_for_room(self) -> None:
        while self.num_bytes > self.most and not self.closed:
            time.sleep(LOOKS)

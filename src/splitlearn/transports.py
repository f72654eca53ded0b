"""What carries frames between processes: gRPC streams, or gloo of torch.distributed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from splitlearn.frame import HEADER_BYTES
from splitlearn.layout import Party
from splitlearn.star import Star

FOREVER = timedelta(days=365)  # an Alice may wait long for her turn; that a party is lost shows in the streams
PATIENCE = 5.0  # seconds that the streams have to tell who is lost
UNFINISHED = 64  # frames that may be under way before their sender waits


class Streams:
    """Frames on the streams that every party has to the hub. A message is a frame."""

    def __init__(self, star: Star) -> None:
        self.star = star
        self.message = memoryview(b"")

    def send(self, dst: Party, head: bytes, payload: memoryview | bytes) -> None:
        self.star.send(dst, b"".join((head, payload)))

    def receive_head(self, src: Party) -> bytes:
        self.message = memoryview(self.star.inbox[src].get())
        return bytes(self.message[:HEADER_BYTES])

    def receive_payload(self, src: Party, num_bytes: int) -> memoryview:
        return self.message[HEADER_BYTES:]


class Gloo:
    """Frames from process to process by torch.distributed, in the clear: for a network that one trusts.

    A message longer than what is posted for it would abort the process, so the header always goes first.

    Arguments:
        party: whose process this is; parties: all, the same list everywhere.
        store: where they meet; host: this host's address in their network, the only one that is listened on.
    """

    def __init__(self, party: Party, parties: Sequence[Party], store: dist.Store, host: str) -> None:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = FOREVER
        self.ranks = {other: rank for rank, other in enumerate(parties)}
        self.group: Any = dist.ProcessGroupGloo(store, self.ranks[party], len(parties), options)
        self.unfinished: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, dst: Party, head: bytes, payload: memoryview | bytes) -> None:
        for part in (head, payload):
            if len(part):
                memory = torch.frombuffer(bytearray(part), dtype=torch.uint8)
                self.unfinished.append((self.group.send([memory], self.ranks[dst], 0), memory))
        while len(self.unfinished) > UNFINISHED:
            self.unfinished.popleft()[0].wait()

    def receive_head(self, src: Party) -> bytes:
        return bytes(self._receive(src, HEADER_BYTES))

    def receive_payload(self, src: Party, num_bytes: int) -> memoryview:
        return self._receive(src, num_bytes) if num_bytes else memoryview(b"")

    def close(self) -> None:
        while self.unfinished:
            self.unfinished.popleft()[0].wait()

    def _receive(self, src: Party, num_bytes: int) -> memoryview:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        try:
            self.group.recv([memory], self.ranks[src], 0).wait()
        except RuntimeError:
            time.sleep(PATIENCE)  # the streams know who is lost, and end this process
            raise
        return memory.numpy().data

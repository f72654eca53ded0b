"""What carries frames between processes: gRPC streams, or gloo of torch.distributed, with NCCL between GPUs."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from splitlearn.errors import InputError, outside
from splitlearn.federation.frame import HEADER_BYTES
from splitlearn.federation.streams import Streams
from splitlearn.layout import Party

FOREVER = timedelta(days=365)  # an Alice may wait long for her turn; that a party is lost shows in the streams
SMALL = 2**18  # bytes of a payload that travels with its header
AHEAD = 4  # frames of each party for which memory is posted: as many micro-batches may come in one go
REACHED = 15.0  # seconds in which any two parties must connect
MEETING = timedelta(seconds=60)  # in which all come to where they meet
PATIENCE = 5.0  # seconds that the streams have to tell who is lost
UNFINISHED, UNFINISHED_BYTES = 64, 2**27  # of messages that may be under way before their sender waits


class Transport:
    """Brings frames from party to party, in the order in which they were sent.

    A tensor on a device of the type `direct` goes as it is, beside its header, to a device of the same type.
    """

    direct = ""  # none

    def send(self, dst: Party, head: bytes, payload: memoryview | bytes) -> None:
        """Does not wait until `dst` has taken it."""
        raise NotImplementedError

    def receive_head(self, src: Party) -> bytes:
        """Wait for the next frame of `src`; return its header."""
        raise NotImplementedError

    def receive_payload(self, src: Party, num_bytes: int) -> bytearray | memoryview | bytes:
        """Return the payload that belongs to the last header."""
        raise NotImplementedError

    def send_beside(self, dst: Party, head: bytes, tensor: Tensor) -> None:
        """Send a header and a tensor, which may change afterwards."""
        raise NotImplementedError

    def receive_beside(self, src: Party, tensor: Tensor) -> None:
        """Fill `tensor` with the one that belongs to the last header."""
        raise NotImplementedError


class Grpc(Transport):
    """Frames on the streams that every party has to the hub. A message is a frame."""

    def __init__(self, star: Streams) -> None:
        self.star = star
        self.message = memoryview(b"")

    def send(self, dst: Party, head: bytes, payload: memoryview | bytes) -> None:
        self.star.send(dst, b"".join((head, payload)))

    def receive_head(self, src: Party) -> bytes:
        self.message = memoryview(self.star.inbox[src].get())
        return bytes(self.message[:HEADER_BYTES])

    def receive_payload(self, src: Party, num_bytes: int) -> memoryview:
        return self.message[HEADER_BYTES:]


class Gloo(Transport):
    """Frames from process to process by torch.distributed, in the clear: for a network that one trusts.

    A message longer than the memory that is posted for it would abort the process. So what is posted is always as long
    as a header with a small payload, which travel as one; a large payload follows once its header was checked.

    Arguments:
        party: whose process this is; parties: all, the same list everywhere.
        store: where they meet; host: this host's address in their network, the only one that is listened on.
        pinned: receive into pinned memory, from which a GPU copies fastest.

    Raises InputError that names two parties who cannot connect.
    """

    def __init__(
        self, party: Party, parties: Sequence[Party], store: dist.Store, host: str, pinned: bool = False
    ) -> None:
        check_ways(party, parties, store, host)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = FOREVER
        self.pinned = pinned
        self.ranks = {other: rank for rank, other in enumerate(parties)}
        self.group: Any = dist.ProcessGroupGloo(store, self.ranks[party], len(parties), options)
        self.unfinished: deque[tuple[dist.Work, Tensor]] = deque()
        self.under_way = 0  # bytes of these
        self.message = memoryview(b"")
        self.posted: dict[Party, deque[tuple[dist.Work, Tensor]]] = {}
        for other in parties:
            if other != party:
                self.posted[other] = deque(self._post(other, HEADER_BYTES + SMALL) for _ in range(AHEAD))

    def send(self, dst: Party, head: bytes, payload: memoryview | bytes) -> None:
        parts = [bytearray().join((head, payload))] if len(payload) <= SMALL else [bytearray(head), bytearray(payload)]
        with _patience():
            for tag, part in enumerate(parts):
                memory = torch.frombuffer(part, dtype=torch.uint8)
                self._keep(self.group.send([memory], self.ranks[dst], tag), memory)

    def receive_head(self, src: Party) -> bytes:
        posted = self.posted[src]
        with _patience():
            while len(posted) < AHEAD:  # here, where there is time, and not behind the wait
                posted.append(self._post(src, HEADER_BYTES + SMALL))
            work, memory = posted.popleft()
            work.wait()
        self.message = memory.numpy().data
        return bytes(self.message[:HEADER_BYTES])

    def receive_payload(self, src: Party, num_bytes: int) -> memoryview:
        if num_bytes <= SMALL:
            return self.message[HEADER_BYTES : HEADER_BYTES + num_bytes]
        with _patience():
            work, memory = self._post(src, num_bytes, tag=1)
            work.wait()
        return memory.numpy().data

    def _keep(self, work: dist.Work, memory: Tensor) -> None:
        """Keep what is under way; who sends too much at once waits for the first of it, with NCCL on the GPU."""
        self.unfinished.append((work, memory))
        self.under_way += memory.nbytes
        while len(self.unfinished) > UNFINISHED or self.under_way > UNFINISHED_BYTES:
            work, memory = self.unfinished.popleft()
            work.wait()
            self.under_way -= memory.nbytes

    def _post(self, src: Party, num_bytes: int, tag: int = 0) -> tuple[dist.Work, Tensor]:
        """Lay memory out for a message; posted ahead, it saves gloo a round trip."""
        memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pinned)
        return self.group.recv([memory], self.ranks[src], tag), memory


class Nccl(Gloo):
    """Headers by gloo, and tensors on a GPU straight to the receiver's by NCCL, without a checksum.

    NCCL takes a GPU for each party, and wants the tensor's size at both ends, which its header has told before.

    Arguments:
        meeting: what Gloo takes; group: a process group of the same ranks; device: this party's, of the group's type.
    """

    def __init__(self, *meeting: Any, group: Any, device: torch.device) -> None:
        super().__init__(*meeting)
        self.beside, self.direct = group, device.type
        self._meet(torch.zeros(1, dtype=torch.uint8, device=device))

    def send_beside(self, dst: Party, head: bytes, tensor: Tensor) -> None:
        own = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.send(dst, head, b"")
        with _patience():
            self._keep(self.beside.send([_as_bytes(own)], self.ranks[dst], 0), own)

    def receive_beside(self, src: Party, tensor: Tensor) -> None:
        with _patience():
            self.beside.recv([_as_bytes(tensor)], self.ranks[src], 0).wait()

    def _meet(self, token: Tensor) -> None:
        """Send everybody a byte and receive one: NCCL connects two ranks by their first, and waits for both.

        Else who sends for the first time would wait until it is her turn, and fail after a minute.
        """
        own = self.beside.rank()
        for first, second in combinations(range(len(self.ranks)), 2):  # in the same order everywhere, so nobody locks
            if own == first:
                self.beside.send([token], second, 0).wait()
                self.beside.recv([token], second, 0).wait()
            elif own == second:
                self.beside.recv([token], first, 0).wait()
                self.beside.send([token], first, 0).wait()


def check_ways(party: Party, parties: Sequence[Party], store: dist.Store, host: str) -> None:
    """Connect to every other party once, while all do. Raises InputError, at all of them, that names two who cannot.

    gloo itself would wait for ever for two who cannot reach each other, and tell nobody.
    """
    with socket.create_server((host, 0), backlog=len(parties)) as listener:
        store.set(f"at/{party}", json.dumps(listener.getsockname()))
        store.set(f"met/{party}", _fault(party, parties, store))
        store.wait([f"met/{other}" for other in parties], FOREVER)  # that one is lost shows in the streams
    if fault := next(filter(None, (store.get(f"met/{other}").decode() for other in parties)), None):
        raise InputError(
            f"{outside(fault)}, and over gloo every two parties must: open the way between their hosts, or take "
            "wire=grpc, by which all connect to the hub alone"
        )


def _fault(party: Party, parties: Sequence[Party], store: dist.Store) -> str:
    """With whom `party` cannot connect, in words; nothing where it can with all."""
    for other in parties:
        try:
            store.wait([f"at/{other}"], MEETING)
            host, port = json.loads(store.get(f"at/{other}"))
            socket.create_connection((host, port), REACHED).close()
        except (OSError, RuntimeError) as error:
            return f"{party} cannot connect to {other} ({str(error).partition(chr(10))[0]})"
    return ""


def _as_bytes(tensor: Tensor) -> Tensor:
    """Of a contiguous tensor; NCCL does not know every dtype."""
    return tensor.flatten().view(torch.uint8)


@contextmanager
def _patience() -> Iterator[None]:
    """A broken connection is an error here at once; the streams know who is lost, and end this process."""
    try:
        yield
    except RuntimeError:
        time.sleep(PATIENCE)
        raise

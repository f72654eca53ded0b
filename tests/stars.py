"""A hub and members on loopback, in threads of one process or in processes of their own."""

from __future__ import annotations

import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from splitlearn.certificates import Identity
from splitlearn.federation.frame import FrameError, Header, pack
from splitlearn.federation.hub import Hub
from splitlearn.federation.remote_wire import RemoteWire
from splitlearn.federation.streams import Greeting, Member, Streams
from splitlearn.federation.wiring import GlooWiring

PARTIES = ("bob", "alice0", "alice1")
RUN = bytes(range(16))
LIMIT = 2**20  # bytes of a message
PATIENCE = 15.0  # seconds for what should take none, on a machine that has other work, too


def framed(
    src: str, dst: str, sequence: int = 1, payload: bytes = b"payload", parties: Sequence[str] = PARTIES
) -> bytes:
    who = parties.index(src), parties.index(dst)
    header = Header(RUN, "control", *who, sequence, torch.uint8, (len(payload),), len(payload))
    return pack(header, payload) + payload


class Ends:
    """Makes hubs and members, and ends them. `lost[party]` has what that party is told, as (party, why, when)."""

    def __init__(self) -> None:
        self.stars: list[Streams] = []
        self.lost: dict[str, queue.Queue] = {}
        self.pool = ThreadPoolExecutor(16)

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for star in self.stars:
            for out in star.outbox.values():
                out.close()
            star.server.stop(0) if isinstance(star, Hub) else star.channel.close()
        self.pool.shutdown()

    def hub(
        self, party: str = "bob", address: str = "127.0.0.1:0", identity: Identity | None = None, timeout: float = 20
    ) -> Hub:
        self.stars.append(star := Hub(party, address, identity, LIMIT, timeout, self._heard_by(party)))
        return star

    def member(
        self,
        party: str,
        port: int,
        identity: Identity | None = None,
        timeout: float = 20,
        hub: str = "bob",
        host: str = "127.0.0.1",
        proxy: str | None = None,
    ) -> Member:
        address, heard = f"{host}:{port}", self._heard_by(party)
        self.stars.append(star := Member(party, hub, address, identity, LIMIT, timeout, heard, proxy))
        return star

    def meet(
        self,
        parties: Sequence[str] = PARTIES,
        identities: Mapping[str, Identity] | None = None,
        timeout: float = 20,
        welcome: Callable[[Hub], Greeting] = lambda hub: {},
        elsewhere: Sequence[str] = (),
        begin: Callable[[int], None] = lambda port: None,
    ) -> tuple[dict[str, Any], Greeting]:
        """A hub and all members, joined, and the welcome; `begin` starts those `elsewhere`, who join by themselves."""
        first, *others = parties
        known = identities or {}
        hub = self.hub(first, identity=known.get(first), timeout=timeout)
        members = {p: self.member(p, hub.port, known.get(p), timeout) for p in others if p not in elsewhere}
        joining = [self.pool.submit(member.join, {"party": p}, 2 * PATIENCE) for p, member in members.items()]
        begin(hub.port)
        hub.gather(parties, lambda greeting: None, 6 * PATIENCE)
        said = {"party": first, "parties": list(parties), **welcome(hub)}
        hub.welcome(said)
        for one in joining:
            assert one.result(PATIENCE) == said
        return {first: hub, **members}, said

    def _heard_by(self, party: str) -> Callable[[str, str], None]:
        heard = self.lost.setdefault(party, queue.Queue())
        return lambda lost, why: heard.put((lost, why, time.monotonic()))


def load(folder: Path, *parties: str) -> dict[str, Identity]:
    return {party: Identity.load(folder / party, party) for party in parties}


def live(party: str, port: int, folder: Path | None, timeout: float, report: Connection, busy: float = 0) -> None:
    """A process of a party. Bob tells his port, and waits for the others; they join.

    All report that they have joined, and, if they are to be `busy` without a pause, how long they were. Then they wait.
    """
    torch.set_num_threads(1)
    identity = None if folder is None else Identity.load(folder / party, party)
    terms = identity, LIMIT, timeout, lambda lost, why: None
    if party == "bob":
        hub = Hub(party, "127.0.0.1:0", *terms)
        report.send(hub.port)
        hub.gather(PARTIES, lambda greeting: None, 2 * PATIENCE)
        hub.welcome({"party": party, "parties": list(PARTIES)})
    else:
        Member(party, "bob", f"127.0.0.1:{port}", *terms).join({"party": party}, PATIENCE)
    report.send("joined")
    if busy:
        report.send(_compute(busy))
    threading.Event().wait()


def gloo_receiver(port: int, report: Connection) -> None:
    """A process of alice0, who awaits a gradient of 3x4 from bob, and reports what came of it."""
    torch.set_num_threads(1)
    member = Member("alice0", "bob", f"127.0.0.1:{port}", None, LIMIT, 20, lambda lost, why: None)
    welcome = member.join({"party": "alice0"}, PATIENCE)
    wire = RemoteWire("alice0")
    wire.connect(GlooWiring().transport(member, welcome, wire.device), welcome["parties"], RUN)
    try:
        wire.carry(torch.empty(3, 4, device="meta"), "bob", "alice0", "gradient")
    except FrameError as error:
        report.send(f"FrameError: {error}")
    else:
        report.send("arrived")


def _compute(seconds: float) -> float:
    """Let no other thread of Python run for about that long; return for how long it was."""
    began = time.monotonic()
    sum(range(10**6))
    size = int(10**6 * seconds / (time.monotonic() - began))
    began = time.monotonic()
    sum(range(size))
    return time.monotonic() - began


class Proxy:
    """A TCP proxy to a port of this host, which keeps all bytes that pass; each way so many per second at most."""

    def __init__(self, port: int, bytes_per_second: float = math.inf) -> None:
        self.target, self.seen, self.bytes_per_second = port, bytearray(), bytes_per_second
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near = self.listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while chunk := source.recv(2**16):
                time.sleep(len(chunk) / self.bytes_per_second)
                self.seen += chunk
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

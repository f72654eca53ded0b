"""The streams between processes: every party has one to the hub, who passes on what is not for him.

        alice0 ----\
        alice1 ----- bob      Bob listens, the others only connect outward. What alice0 hands to alice1 goes through
        carol  ----/          Bob, who sees the header alone where it is sealed.

A stream begins with greetings, which both sides check before the first mini-batch. It ends by farewell; a stream that
breaks, or whose other end does not answer pings, means that a party is lost, and the hub tells all.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from splitlearn.certificates import Identity
from splitlearn.errors import InputError, outside
from splitlearn.federation.boxes import AHEAD, END, Box
from splitlearn.federation.frame import HEADER_BYTES, FrameError, unpack
from splitlearn.federation.probe import Fault, find_fault, named, split
from splitlearn.layout import Party

SERVICE, METHOD = "splitlearn.Streams", "Join"
SLACK = 2**22  # bytes: greetings
HANDSHAKE = 10_000  # milliseconds until a connection that says nothing is closed
LARGEST_NOTE = 2**16  # bytes of a loss, a farewell, or what is agreed on when a party is stopped
SHOWN = 80  # characters of what has no sense
IN_FLIGHT = 2**20  # bytes, about: the answer to a ping waits behind them, and they bound the rate on a long way
FIRST, EVERY = 0.5, 3.0  # seconds between looks at why the hub is not reached
UNKNOWN = 20.0  # seconds after which a host's name that is not known is taken for a wrong one
NONE = Fault("")
Greeting = dict[str, Any]
Lost = Callable[[Party, str], None]
"""(party, why): called once, in any thread, when a party is lost. The other streams are of no use afterwards."""


class AgainError(InputError):
    """Why `lost` party's absence, before all have come, ends a join that may be tried again."""

    def __init__(self, message: str, lost: Party) -> None:
        super().__init__(message)
        self.lost = lost


class DifferenceError(InputError):
    """What makes a greeting come in vain until its party is started with something else.

    She is asked `ask` before she is told, unless it is None; `explain` makes the message of her answer.
    """

    def __init__(self, message: str, ask: Any = None, explain: Callable[[Any], str] = str) -> None:
        super().__init__(message)
        self.ask, self.explain = ask, explain


def read_json(message: bytes, what: str) -> dict[str, Any]:
    """Return what another party has told. Raises InputError for what is no JSON object of a greeting's size."""
    if len(message) > SLACK:
        raise InputError(f"{what} of {len(message)} bytes must be of at most {SLACK}")
    try:
        told = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} cannot be read: {outside(error, SHOWN)}") from None
    if not isinstance(told, dict):
        raise InputError(f"{what} is {outside(message[:SHOWN], SHOWN)}, which has no sense")
    return told


class Streams:
    """What hub and member have in common. `inbox` has the frames of each sender in order.

    `limit` is the most bytes of a frame. Who sends no more ahead of an answer than it may never fills a box.
    """

    leads = False  # whether this is the hub

    def __init__(self, party: Party, limit: int, on_lost: Lost) -> None:
        self.party, self.on_lost = party, on_lost
        self.largest = limit + SLACK  # bytes of a message
        self.parties: Sequence[Party] = ()
        self.inbox: dict[Party, Box] = {}
        self.outbox: dict[Party, Box] = {}
        self.done: set[Party] = set()  # who has said farewell
        self.heed: Callable[[dict[str, Any], Party], None] = lambda note, peer: None  # hears every other note
        self.leaving = False  # a farewell counts only at the end, when this end has begun to leave, too
        self._failed = threading.Lock()

    def send(self, dst: Party, message: bytes) -> None:
        """Does not wait until `dst` has it."""
        raise NotImplementedError

    def close(self, timeout: float) -> None:
        """Say farewell, and wait until the others have."""
        raise NotImplementedError

    def tell(self, note: dict[str, Any]) -> None:
        """To who is at the other end, which at the hub are all."""
        for out in self.outbox.values():
            out.put(json.dumps(note).encode())

    def give_up(self, why: str) -> None:
        """Tell all that this party cannot go on."""
        self.tell({"lost": self.party, "why": outside(why)})

    def lose(self, party: Party, why: str) -> None:
        """Tell all that a party is lost, which counts once."""
        if self._failed.acquire(blocking=False):
            for other, out in list(self.outbox.items()):
                if other != party:
                    out.put(json.dumps({"lost": party, "why": why}).encode())
            self.on_lost(party, why)

    def _take(self, message: bytes, peer: Party) -> None:
        """Sort in a message that has arrived from `peer`."""
        if message[:1] != b"{":
            self._deliver(message, peer)
            return
        if len(message) > LARGEST_NOTE:
            raise FrameError(f"a note of {len(message)} bytes must be of at most {LARGEST_NOTE}")
        try:
            note = json.loads(message)
            loss = self._loss(note, peer) if "lost" in note else None
            if loss is None:
                self.heed(note, peer)
        except (ValueError, KeyError, RecursionError) as error:
            raise FrameError(f"a note cannot be read: {outside(repr(error), SHOWN)}") from error
        if loss is not None:
            self.lose(loss[0], outside(loss[1]))
        elif note.get("farewell"):
            self.done.add(peer)

    def _loss(self, note: dict[str, Any], peer: Party) -> tuple[Party, str]:
        """Who is lost, and why, by what `peer` says."""
        raise NotImplementedError

    def _deliver(self, message: bytes, peer: Party) -> None:
        raise NotImplementedError

    def _route(self, message: bytes) -> tuple[Party, Party]:
        header = unpack(message[:HEADER_BYTES])
        if max(header.sender, header.receiver) >= len(self.parties):
            raise FrameError(f"frame: parties {header.sender} and {header.receiver} must be below {len(self.parties)}")
        return self.parties[header.sender], self.parties[header.receiver]


class Member(Streams):
    """An end that connects outward, to the hub `hub` at `address`, by way of `proxy` where that is a URL."""

    def __init__(
        self,
        party: Party,
        hub: Party,
        address: str,
        identity: Identity | None,
        limit: int,
        timeout: float,
        on_lost: Lost,
        proxy: str | None = None,
    ) -> None:
        super().__init__(party, limit, on_lost)
        self.hub, self.address, self.identity, self.proxy = hub, address, identity, proxy
        self.say: Callable[[str], None] = lambda text: None  # to whoever watches
        self.answer: Callable[[Any], Any] = lambda ask: None  # to what the hub asks before it refuses
        by_way = [("grpc.enable_http_proxy", 0)] if proxy is None else [("grpc.http_proxy", proxy)]
        settings = [*options(limit, timeout), *by_way]
        if identity is None:
            self.channel = grpc.insecure_channel(address, settings)
        else:
            credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)
            shown = ("grpc.ssl_target_name_override", hub)
            self.channel = grpc.secure_channel(address, credentials, [*settings, shown])

    @property
    def local_host(self) -> str:
        """The address of this host as the hub's network sees it."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(split(self.address))
            return probe.getsockname()[0]

    def join(
        self, greeting: Greeting, timeout: float, check: Callable[[Greeting], None] = lambda welcome: None
    ) -> Greeting:
        """Greet, and wait until all have; return the hub's welcome.

        Raises InputError where the hub is not reached or refuses, and where `check` does so for its welcome; AgainError
        where a party is lost meanwhile, or an earlier process of this one has not been missed yet.
        """
        self._reach(timeout)
        out = self.outbox[self.hub] = Box(self.largest)
        out.put(json.dumps(greeting).encode())
        self.call = self.channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(out.get, END))
        welcome = self._hear()
        if "ask" in welcome:
            out.put(json.dumps({"answer": self.answer(welcome["ask"])}).encode())
            welcome = self._hear()
        if "lost" in welcome:
            lost, why = outside(welcome["lost"], SHOWN), outside(welcome.get("why", ""))
            raise AgainError(f"{lost} was lost before all had come: {why}", lost)
        check(welcome)
        self.parties = welcome["parties"]
        self.inbox = {party: Box(AHEAD + self.largest) for party in self.parties}
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return welcome

    def _reach(self, timeout: float) -> None:
        """Wait until the hub answers, and say what is in the way meanwhile. Raises InputError where it does not."""
        ready, began, wait, fault, said = grpc.channel_ready_future(self.channel), time.monotonic(), FIRST, NONE, NONE
        ca = None if self.identity is None else self.identity.ca
        while True:
            try:
                return ready.result(max(0.0, min(wait, began + timeout - time.monotonic())))
            except grpc.FutureTimeoutError:
                wait, before = EVERY, fault
            fault = find_fault(self.address, self.hub, ca, self.proxy)
            if (
                fault.why and fault != said and (fault == before or fault.lasts)
            ):  # once may be the moment in which the hub starts
                self.say(f"{fault.why}; tries again")
                said = fault
            spent = time.monotonic() - began
            if spent > timeout or (fault.lasts and spent > UNKNOWN):
                raise InputError(self._unreached(fault, min(spent, timeout)))

    def _unreached(self, fault: Fault, seconds: float) -> str:
        why = fault.why or f"start {self.hub}, check address and certificates, or raise `engine.join_timeout`"
        if self.proxy is not None:
            without = f"`no_proxy={split(self.address)[0]}` goes without"
            why = f"{why} (the way goes by the environment's proxy {named(self.proxy)}: {without})"
        return f"{self.hub} does not answer at `engine.address` (={self.address}) within {seconds:.0f} s: {why}"

    def _hear(self) -> Greeting:
        """Return what the hub says next. Raises InputError where it refuses, or is no hub."""
        try:
            return read_json(next(self.call), f"the answer of {self.hub}")
        except StopIteration:
            raise AgainError(f"{self.hub} ended before all had come", self.hub) from None
        except grpc.RpcError as error:
            why = outside(error.details() or error.code().name)
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                told = f"what listens at `engine.address` (={self.address}) is another service of gRPC"
                raise InputError(f"{told} ({why}): name the one of {self.hub}") from None
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                told = f"{self.hub} ended, or does not answer, before all had come ({why})"
                raise AgainError(told, self.hub) from None
            if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                raise AgainError(f"{self.hub} refused {self.party}: {why}", self.party) from None
            raise InputError(f"{self.hub} refused {self.party}: {why}") from None

    def send(self, dst: Party, message: bytes) -> None:
        self.outbox[self.hub].put(message)

    def close(self, timeout: float) -> None:
        self.leaving = True
        self.outbox[self.hub].put(b'{"farewell": true}')
        self.reader.join(timeout)
        self.channel.close()

    def drop(self) -> None:
        """End the stream without a word."""
        for out in self.outbox.values():
            out.close()
        self.channel.close()

    def _read(self) -> None:
        try:
            for message in self.call:
                self._take(message, self.hub)
        except FrameError as error:
            self.lose(self.hub, f"sent what was refused: {error}")
        except grpc.RpcError as error:
            if not self.leaving:
                self.lose(self.hub, f"its process ended, or does not answer ({error.code().name})")
        else:
            if not self.leaving:
                self.lose(self.hub, "left before all had said farewell")

    def _loss(self, note: dict[str, Any], peer: Party) -> tuple[Party, str]:
        if note["lost"] not in self.parties:
            raise ValueError(f"{note['lost']!r} is no party")
        return note["lost"], note["why"]

    def _deliver(self, message: bytes, peer: Party) -> None:
        sender, receiver = self._route(message)
        if receiver != self.party:
            raise FrameError(f"frame: `receiver` (={receiver}) must be {self.party}")
        box = self.inbox[sender]
        box.put(message)
        if box.num_bytes > box.most:  # of one stream all must be read: what others send comes behind
            why = f"{sender} has sent {box.num_bytes} bytes ahead, and may send {box.most}"
            self.lose(sender, why)
            raise FrameError(why)


def options(limit: int, timeout: float) -> list[tuple[str, int]]:
    """Pings find a frozen peer within `timeout` seconds; a server must not mind being pinged.

    A ping goes behind the data that is under way. So that a party which sends over a slow link is not taken for frozen,
    little is under way at a time, whatever gRPC measures of the link (it would let that grow as on a fast one): 1 MiB
    takes 10 s at 100 kB/s, and a ping may take 18 of the 30 seconds of `engine.timeout`.
    """
    ping, answer = max(1, int(timeout * 300)), max(1, int(timeout * 600))
    largest = min(limit + SLACK, 2**31 - 1)  # gRPC counts in int32
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", largest),
        ("grpc.max_reconnect_backoff_ms", 1000),  # who waits for the hub asks again every second, not every two minutes
        ("grpc.keepalive_time_ms", ping),
        ("grpc.keepalive_timeout_ms", answer),
        ("grpc.http2.ping_timeout_ms", answer),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", IN_FLIGHT),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", ping // 2),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE),
        ("grpc.so_reuseport", 0),  # a second hub at one address must fail
    ]

"""The end of the streams that listens."""

from __future__ import annotations

import json
import resource
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from splitlearn.certificates import Identity, check_certificate
from splitlearn.errors import InputError, outside
from splitlearn.federation.boxes import AHEAD, END, Box
from splitlearn.federation.frame import FrameError
from splitlearn.federation.probe import why_not_bound
from splitlearn.federation.streams import (
    METHOD,
    SERVICE,
    SHOWN,
    AgainError,
    DifferenceError,
    Greeting,
    Lost,
    Streams,
    options,
    read_json,
)
from splitlearn.layout import Party

MOST_STREAMS = 4096  # a thread each, made when it is needed
TO_GREET = 20.0  # seconds from a stream's beginning to its greeting


class Hub(Streams):
    """The end that listens.

    Arguments:
        party: whose it is; address: `HOST:PORT`, of which port 0 takes any that is free.
        identity: certificate and key for mutual TLS; None talks in the clear.
        limit: the most bytes of a message; timeout: seconds after which a party that does not answer is lost.

    Raises InputError when the address cannot be listened on.
    """

    leads = True

    def __init__(
        self, party: Party, address: str, identity: Identity | None, limit: int, timeout: float, on_lost: Lost
    ) -> None:
        super().__init__(party, limit, on_lost)
        self.identity = identity
        self.host = address.rpartition(":")[0]
        self.joined: dict[Party, Greeting] = {}
        self.complete = False  # all have come
        self.refusals: deque[str] = deque(maxlen=100)  # the newest
        self.unfit: DifferenceError | None = None  # of the first party that came in vain
        self.patient = True  # whether such a party is waited for, too, and who is lost before all have come
        self.say: Callable[[str], None] = lambda text: None  # to whoever watches who comes
        self.changed = threading.Condition()
        self.check: Callable[[Greeting], None] | None = None
        self.greeting: set[str] = set()  # names of certificates whose streams have not been admitted yet
        _raise_descriptors()
        self.server = grpc.server(
            ThreadPoolExecutor(MOST_STREAMS), options=options(limit, timeout), maximum_concurrent_rpcs=MOST_STREAMS
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        self.port = self._listen(address)
        self.server.start()

    def gather(
        self, parties: Sequence[Party], check: Callable[[Greeting], None], timeout: float
    ) -> dict[Party, Greeting]:
        """Wait until all have greeted in a way that `check` does not raise InputError for; return what they said.

        Raises InputError when some do not come in time and, unless `patient`, as soon as one came for whom `check`
        raises DifferenceError.
        """
        self.say(f"listens at {self.host}:{self.port}, waits for {', '.join(p for p in parties if p != self.party)}")
        with self.changed:
            self.parties, self.check = parties, check
            self.changed.notify_all()
            over = self.changed.wait_for(lambda: self._hopeless or len(self.joined) == len(parties) - 1, timeout)
            if self._hopeless:
                waits = "with `engine.on_failure=wait` it would, for that party to be started again"
                raise InputError(f"{self.unfit} ({self.party} waits no longer; {waits})")
            if not over:
                missing = [party for party in parties if party != self.party and party not in self.joined]
                refused = f" (refused: {self.refusals[-1]})" if self.refusals else ""
                raise InputError(
                    f"{', '.join(missing)} did not come within {timeout:.0f} s{refused}: start them with the same "
                    "command and `engine.party=`, or raise `engine.join_timeout`"
                )
            self.complete = True
            return dict(self.joined)

    @property
    def _hopeless(self) -> bool:
        return self.unfit is not None and not self.patient

    def welcome(self, greeting: Greeting) -> None:
        for out in self.outbox.values():
            out.put(json.dumps(greeting).encode())

    def send(self, dst: Party, message: bytes) -> None:
        self.outbox[dst].put(message)

    def close(self, timeout: float) -> None:
        """Wait until all have said farewell, and close."""
        self.leaving = True
        with self.changed:
            self.changed.wait_for(lambda: len(self.done) == len(self.outbox), timeout)
        for out in self.outbox.values():
            out.close()
        self.server.stop(1.0).wait()

    def _listen(self, address: str) -> int:
        try:
            if self.identity is None:
                port = self.server.add_insecure_port(address)
            else:
                pair = [(self.identity.key, self.identity.certificate)]
                port = self.server.add_secure_port(
                    address, grpc.ssl_server_credentials(pair, self.identity.ca, require_client_auth=True)
                )
        except RuntimeError:
            port = 0
        if not port:
            why = why_not_bound(address)
            raise InputError(
                f"`engine.address` (={address}) cannot be listened on ({why}): take a free port of this host"
            )
        return port

    def _serve(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        name = ""
        try:
            name = self._begin(context)
            greeting = read_json(_next_in_time(incoming, context), "a greeting")
            party = yield from self._admit(greeting, name, incoming, context)
        except (InputError, KeyError, RecursionError) as error:
            why = outside(f"a greeting has no {error}" if isinstance(error, KeyError) else error)
            self.refusals.append(why)
            self.say(f"refused: {why}")
            again = isinstance(error, AgainError)
            context.abort(grpc.StatusCode.ALREADY_EXISTS if again else grpc.StatusCode.FAILED_PRECONDITION, why)
        finally:
            with self.changed:
                self.greeting.discard(name)
        out = self.outbox[party]
        if not context.add_callback(lambda: self._ended(party, out)):  # it ended while it waited to be admitted
            self._ended(party, out)
        threading.Thread(target=self._read, args=(party, incoming), daemon=True).start()
        while (message := out.get()) != END:
            yield message

    def _begin(self, context: grpc.ServicerContext) -> str:
        """Return the name of the stream's certificate, empty in the clear. Raises InputError before anything is read.

        A thread waits for one stream of each name at most, and for none of a name without a part in the run.
        """
        if self.identity is None:
            return ""
        shown = context.auth_context()
        name = ", ".join(each.decode(errors="replace") for each in shown.get("x509_common_name", []))
        check_certificate(shown["x509_pem_cert"][0], self.identity.ca, name, self.identity.revoked)
        with self.changed:
            self._check_name(name)
            if name in self.greeting or name in self.joined:
                raise _played(name)
            self.greeting.add(name)
        return name

    def _check_name(self, party: Party) -> None:
        if self.parties and (party not in self.parties or party == self.party):
            rule = f"must be one of {', '.join(p for p in self.parties if p != self.party)}"
            raise InputError(f"{_as_party(party)} {rule}: {self.party} is here already")

    def _admit(
        self, greeting: Greeting, name: str, incoming: Iterator[bytes], context: grpc.ServicerContext
    ) -> Generator[bytes, None, Party]:
        """Return who has come; yields what she is asked before she is refused."""
        party = greeting["party"]
        if self.identity is not None and name != party:
            shown, said = outside(name, SHOWN), outside(party, SHOWN)
            raise InputError(f"the certificate speaks for {shown}, not for {said}")
        with self.changed:
            self.changed.wait_for(lambda: self.check is not None)
            self._check_name(party)
            if party in self.joined:
                raise _played(party)
            assert self.check is not None
            differs = _caught(self.check, greeting)
            if differs is None:
                self.outbox[party], self.inbox[party] = Box(self.largest), Box(AHEAD + self.largest)
                self.joined[party] = greeting
                self.say(f"{party} has come")
                self.changed.notify_all()
                return party
        if differs.ask is not None:
            yield json.dumps({"ask": differs.ask}).encode()
            answer = read_json(_next_in_time(incoming, context), f"the answer of {party}").get("answer")
            differs = DifferenceError(differs.explain(answer))
        with self.changed:
            self.unfit = self.unfit or differs
            self.changed.notify_all()
        raise differs

    def _read(self, party: Party, incoming: Iterator[bytes]) -> None:
        try:
            for message in incoming:
                self._take(message, party)
        except FrameError as error:
            self.lose(party, f"sent what was refused: {error}")
        except Exception:  # the stream broke, of which `_ended` hears
            pass

    def _deliver(self, message: bytes, peer: Party) -> None:
        sender, receiver = self._route(message)
        if sender != peer:
            raise FrameError(f"frame: `sender` (={sender}) must be {peer}, whose stream this is")
        box = self.inbox[sender] if receiver == self.party else self.outbox[receiver]
        box.put(message)
        box.wait_for_room()  # and nobody reads the sender's stream meanwhile, so that gRPC holds the sender back

    def _loss(self, note: dict[str, Any], peer: Party) -> tuple[Party, str]:
        return peer, note["why"]  # nobody speaks for another

    def _ended(self, party: Party, out: Box) -> None:
        with self.changed:
            self.changed.notify_all()
        out.close()
        if self.outbox.get(party) is not out:
            return
        self.inbox[party].closed = True  # nobody waits for room in it any more
        if not (self.leaving and party in self.done):
            self.lose(party, "its process ended, or does not answer")

    def lose(self, party: Party, why: str) -> None:
        with self.changed:
            if self.patient and not self.complete:
                if self.joined.pop(party, None) is not None:
                    self.outbox.pop(party).close()
                    self.done.discard(party)
                    self.say(f"{party} has gone again: {why}")
                return
        super().lose(party, why)

    def _take(self, message: bytes, peer: Party) -> None:
        super()._take(message, peer)
        if peer in self.done:
            with self.changed:
                self.changed.notify_all()


def _next_in_time(incoming: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    """Return the next message of who is not admitted yet, whose stream ends when it does not come."""
    deadline = threading.Timer(TO_GREET, context.cancel)
    deadline.daemon = True
    deadline.start()
    try:
        return next(incoming, b"")
    finally:
        deadline.cancel()


def _as_party(name: object) -> str:
    return f"`engine.party` (={outside(name, SHOWN)})"


def _played(name: Party) -> AgainError:
    return AgainError(f"{_as_party(name)} is played by another process already: end that one first", name)


def _caught(check: Callable[[Greeting], None], greeting: Greeting) -> DifferenceError | None:
    try:
        check(greeting)
    except DifferenceError as differs:
        return differs
    return None


def _raise_descriptors() -> None:
    """Every connection takes a file descriptor, a stranger's too: as many as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

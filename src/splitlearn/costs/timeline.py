"""When the messages of a round are sent and arrive, if what they cost is the time on the link.

Two Alices, each with two mini-batches, between the same two means; `act` and `grad` fill the time they take:

    link.serves=one   alice0 -> bob   |act|   |       |act|   |
                      bob -> alice0   |   |gra|       |   |gra|
                      alice1 -> bob           |act|   |       |act|   |
                      bob -> alice1           |   |gra|       |   |gra|

    link.serves=all   alice0 -> bob   |act|   |act|   |
                      bob -> alice0   |   |gra|   |gra|
                      alice1 -> bob   |act|   |act|   |
                      bob -> alice1   |   |gra|   |gra|

Alices who hand on are serial in either case.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

from splitlearn.costs.link import Link
from splitlearn.layout import Party
from splitlearn.ledger import is_alice
from splitlearn.wire import SERVER

MOVING = ("weights", "weight_gradient", "optimizer_state")


class Exchange(NamedTuple):
    """Messages `(src, dst, bytes)` in order: all of a mini-batch, or the one in which weights move.

    `alice` is whose mini-batch or weights these are; `ends_round` marks the last mini-batch before a mean is made.
    """

    alice: Party
    messages: list[tuple[Party, Party, int]]
    moves: bool = False
    ends_round: bool = False

    @property
    def servers(self) -> list[Party]:
        """Who takes part and is no Alice."""
        parties = dict.fromkeys(party for src, dst, _ in self.messages for party in (src, dst))
        return [party for party in parties if not is_alice(party)]


class Diary:
    """The messages that a ledger counts, in order, by exchange.

    What one party sends another without waiting in between, such as a network's weights, is one message.
    """

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def begin(self, alice: Party, ends_round: bool) -> None:
        """What comes now is of a new mini-batch of `alice`, until weights move."""
        self.exchanges.append(Exchange(alice, [], ends_round=ends_round))

    def write(self, src: Party, dst: Party, kind: str, num_bytes: int) -> None:
        if kind in MOVING and not self._goes_on(src, dst):
            self.exchanges.append(Exchange(dst if src == SERVER else src, [], moves=True))
        messages = self.exchanges[-1].messages
        if messages and messages[-1][:2] == (src, dst):
            num_bytes += messages.pop()[2]
        messages.append((src, dst, num_bytes))

    def _goes_on(self, src: Party, dst: Party) -> bool:
        last = self.exchanges[-1] if self.exchanges else None
        return last is not None and last.moves and last.messages[-1][:2] == (src, dst)


class Timeline:
    """Plays exchanges over a link.

    A message leaves when its sender has all that it received in this thread before, the connection is free and, if the
    server serves one Alice at a time, all earlier exchanges with this server are over. First come, first served.

    Arguments:
        link: between each two parties.
        serial: one Alice begins where another has ended; otherwise each Alice is a thread of her own.
        in_order: servers with but one set of weights, so that they serve in the order of training, whatever `link`
            says: every mini-batch starts from what the one before it has left.
    """

    def __init__(self, link: Link, serial: bool = False, in_order: Collection[Party] = ()) -> None:
        self.link, self.serial, self.in_order = link, serial, in_order

    def seconds(self, exchanges: Sequence[Exchange]) -> float:
        """Return when the last message of a round arrives, all parties being ready at 0."""
        self.ready: dict[tuple[Party, Party], float] = defaultdict(float)  # by thread and party
        self.free: dict[Any, float] = defaultdict(float)  # connections and servers
        for exchange in self._served(exchanges):
            self._play(exchange)
        return max(self.ready.values(), default=0.0)

    def _served(self, exchanges: Sequence[Exchange]) -> Iterator[Exchange]:
        """Yield exchanges as they are served; each must be played before the next is asked for."""
        threads: dict[Party, deque[int]] = defaultdict(deque)
        for i, exchange in enumerate(exchanges):
            if exchange.messages:
                threads[self._thread(exchange)].append(i)
        bound = deque(i for i, exchange in enumerate(exchanges) if self._is_bound(exchange))
        asking = [(0.0, mine.popleft()) for mine in threads.values()]  # a heap: the next of each thread
        early: dict[int, float] = {}  # when those asked whose turn has not come
        while asking:
            asked, i = heappop(asking)
            if self._is_bound(exchanges[i]) and i != bound[0]:
                early[i] = asked
                continue
            yield exchanges[i]
            if self._is_bound(exchanges[i]):
                bound.popleft()
                if bound and bound[0] in early:
                    heappush(asking, (early.pop(bound[0]), bound[0]))
            if mine := threads[self._thread(exchanges[i])]:
                heappush(asking, (self._asks(exchanges[mine[0]]), mine.popleft()))

    def _thread(self, exchange: Exchange) -> Party:
        return "alices" if self.serial else exchange.alice

    def _is_bound(self, exchange: Exchange) -> bool:
        return any(server in self.in_order for server in exchange.servers)

    def _asks(self, exchange: Exchange) -> float:
        """When the first message could leave, were nobody else served."""
        return self.ready[self._thread(exchange), exchange.messages[0][0]]

    def _play(self, exchange: Exchange) -> None:
        thread = self._thread(exchange)
        busy = [server for server in exchange.servers if self.link.serves == "one" or server in self.in_order]
        served = ends = max((self.free[server] for server in busy), default=0.0)
        for src, dst, num_bytes in exchange.messages:
            leaves = max(served, self.ready[thread, src], self.free[src, dst])
            self.free[src, dst] = leaves + self.link.occupied(num_bytes)
            arrives = leaves + self.link.seconds(num_bytes)
            self.ready[thread, dst] = max(self.ready[thread, dst], arrives)
            ends = max(ends, arrives)
        self.free.update(dict.fromkeys(busy, ends))


def in_rounds(exchanges: Sequence[Exchange]) -> list[list[Exchange]]:
    """Split exchanges where means are made: behind a mini-batch that ends a round, and what then goes to the server.

    The last list is of the round that has not ended, and may be empty.
    """
    rounds: list[list[Exchange]] = [[]]
    ended = False
    for exchange in exchanges:
        if ended and not (exchange.moves and exchange.messages[0][1] == SERVER):
            rounds.append([])
            ended = False
        rounds[-1].append(exchange)
        ended = ended or exchange.ends_round
    return [*rounds, []] if ended else rounds

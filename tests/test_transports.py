"""Before gloo connects every two parties, it is known that they can; where they meet, nobody else comes."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
from stars import PARTIES, PATIENCE, Ends
from torch import distributed as dist

from splitlearn.errors import InputError
from splitlearn.federation.transports import check_ways
from splitlearn.federation.wiring import GlooWiring


def blocked(store: dist.Store, other: str) -> SimpleNamespace:
    """The store as one sees it whose way to `other` is barred."""

    def get(key: str) -> bytes:
        return json.dumps(["127.0.0.1", 9]).encode() if key == f"at/{other}" else store.get(key)

    return SimpleNamespace(set=store.set, wait=store.wait, get=get)


def tried(stores: dict[str, object]) -> list[str]:
    """What the parties are told, each once."""
    with ThreadPoolExecutor(len(stores)) as pool:
        ways = [pool.submit(check_ways, party, list(stores), store, "127.0.0.1") for party, store in stores.items()]
        return sorted({str(way.exception(2 * PATIENCE)) for way in ways})


def test_all_who_reach_each_other_go_on():
    assert tried(dict.fromkeys(PARTIES, dist.HashStore())) == ["None"]


def test_two_alices_who_cannot_reach_each_other_are_named_at_all():
    store = dist.HashStore()
    (told,) = tried({"bob": store, "alice0": blocked(store, "alice1"), "alice1": store})
    assert told.startswith("alice0 cannot connect to alice1 ([Errno 111] Connection refused), and over gloo every two")


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr("splitlearn.federation.transports.MEETING", timedelta(seconds=1))
    store = dist.HashStore()
    store.set("met/alice0", "")
    with pytest.raises(InputError, match=r"^bob cannot connect to alice0 \("):
        check_ways("bob", ["bob", "alice0"], store, "127.0.0.1")


def test_the_store_listens_where_the_hub_does_and_nowhere_else():
    with Ends() as ends:
        wiring = GlooWiring()
        port = wiring.offer(ends.hub())["store"]
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), PATIENCE)

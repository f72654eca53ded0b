"""The streams bring frames to whom they are for, from who they say they are from, and tell when somebody is lost."""

import itertools
import json
import os
import re
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from commands import CONTEXT
from cryptography import x509
from federated import until
from stars import LIMIT, PARTIES, PATIENCE, Ends, Proxy, framed, live, load

from splitlearn.certificates import Identity, make_certificates
from splitlearn.errors import InputError
from splitlearn.federation.hub import Hub
from splitlearn.federation.streams import LARGEST_NOTE, METHOD, SERVICE, SLACK, AgainError, DifferenceError, options

PAIRS = list(itertools.permutations(PARTIES, 2))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Certificates of two CAs, `ours` and `theirs`."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates([*PARTIES, "mallory"], folder / "ours")
    make_certificates(["bob", "alice0"], folder / "theirs")
    return folder


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Ends() as ends:
        yield ends


def gathering(ends: Ends, hub: Hub, parties=("bob", "alice0"), check=lambda greeting: None, timeout=PATIENCE) -> Future:
    """The hub waits for all, and welcomes them, in a thread."""

    def gather():
        greetings = hub.gather(parties, check, timeout)
        hub.welcome({"party": hub.party, "parties": list(parties)})
        return greetings

    return ends.pool.submit(gather)


def heard(ends: Ends, party: str, timeout: float = 2) -> tuple[str, str]:
    return ends.lost[party].get(timeout=timeout)[:2]


def nobody_is_lost(ends: Ends) -> bool:
    return all(lost.empty() for lost in ends.lost.values())


# ---- Greetings


def test_the_hub_hears_all_greetings_and_all_hear_its_welcome(ends):
    hub = ends.hub()
    hears = gathering(ends, hub, PARTIES)
    said = [{"party": party, "rows": 7} for party in ("alice0", "alice1")]
    joins = [ends.pool.submit(ends.member(greeting["party"], hub.port).join, greeting, PATIENCE) for greeting in said]
    assert [join.result(PATIENCE) for join in joins] == 2 * [{"party": "bob", "parties": list(PARTIES)}]
    assert hears.result(PATIENCE) == {"alice0": said[0], "alice1": said[1]}


def test_a_member_who_comes_first_waits_for_the_hub(ends):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = ends.pool.submit(ends.member("alice0", port).join, {"party": "alice0"}, 3 * PATIENCE)
    time.sleep(0.2)
    hub = ends.hub(address=f"127.0.0.1:{port}")
    hub.gather(["bob", "alice0"], lambda greeting: None, 3 * PATIENCE)
    hub.welcome({"party": "bob", "parties": ["bob", "alice0"]})
    assert join.result(PATIENCE)["party"] == "bob"


def test_an_address_in_use_is_refused(ends):
    port = ends.hub().port
    with pytest.raises(InputError, match=rf"`engine.address` \(=127.0.0.1:{port}\) cannot be listened on"):
        ends.hub(address=f"127.0.0.1:{port}")


def test_an_address_of_another_host_is_refused(ends):
    with pytest.raises(InputError, match=r"`engine.address` \(=192.0.2.1:0\) cannot be listened on"):
        ends.hub(address="192.0.2.1:0")


@pytest.mark.parametrize("party", ["dave", "bob"])
def test_a_party_that_is_not_in_the_list_and_a_second_hub_are_refused(ends, party):
    hub = ends.hub()
    hears = gathering(ends, hub)
    with pytest.raises(InputError, match=rf"bob refused {party}: `engine.party` \(={party}\) must be one of alice0"):
        ends.member(party, hub.port).join({"party": party}, PATIENCE)
    ends.member("alice0", hub.port).join({"party": "alice0"}, PATIENCE)
    assert list(hears.result(PATIENCE)) == ["alice0"]


def test_the_second_process_of_a_party_is_refused_and_the_first_stays(ends):
    stars, _ = ends.meet()
    with pytest.raises(AgainError, match=r"`engine.party` \(=alice0\) is played by another process already") as refused:
        ends.member("alice0", stars["bob"].port).join({"party": "alice0"}, PATIENCE)
    assert refused.value.lost == "alice0"  # her other process
    stars["alice0"].send("bob", framed("alice0", "bob"))
    assert stars["bob"].inbox["alice0"].get(timeout=PATIENCE) == framed("alice0", "bob")
    assert nobody_is_lost(ends)


def test_who_is_missing_is_named_and_after_how_long(ends):
    hub = ends.hub()
    ends.pool.submit(ends.member("alice0", hub.port).join, {"party": "alice0"}, PATIENCE)
    with pytest.raises(InputError, match=r"^alice1, carol did not come within 1 s: .*`engine.join_timeout`$"):
        hub.gather([*PARTIES, "carol"], lambda greeting: None, 1)


def test_a_member_is_told_that_nobody_listens(ends):
    rule = r"^bob does not answer at `engine.address` \(=127.0.0.1:9\) within 1 s: nobody listens at 127.0.0.1:9: start"
    with pytest.raises(InputError, match=rule):
        ends.member("alice0", 9).join({"party": "alice0"}, 1)


def test_a_member_hears_why_the_hub_refuses_its_greeting(ends):
    def check(greeting):
        if greeting["rows"] != 7:
            raise InputError(f"`rows` is 7 at bob and {greeting['rows']} at alice0")

    hub = ends.hub()
    hears = gathering(ends, hub, check=check)
    with pytest.raises(InputError, match=r"^bob refused alice0: `rows` is 7 at bob and 8 at alice0$"):
        ends.member("alice0", hub.port).join({"party": "alice0", "rows": 8}, PATIENCE)
    ends.member("alice0", hub.port).join({"party": "alice0", "rows": 7}, PATIENCE)
    assert hears.result(PATIENCE) == {"alice0": {"party": "alice0", "rows": 7}}


def test_those_who_wait_hear_that_the_hub_gives_up(ends):
    hub = ends.hub()
    join = ends.pool.submit(ends.member("alice0", hub.port).join, {"party": "alice0"}, PATIENCE)
    with pytest.raises(InputError, match="alice1 did not come"):
        hub.gather(PARTIES, lambda greeting: None, 0.5)
    hub.give_up("alice1 did not come")
    with pytest.raises(InputError, match=r"^bob was lost before all had come: alice1 did not come$"):
        join.result(PATIENCE)


@pytest.mark.parametrize("greeting", [b"", b"GET / HTTP/1.1", b"[]", b'{"name": "alice0"}', b'{"party": []}', b"\xff"])
def test_a_greeting_that_is_none_is_refused_and_the_hub_goes_on(ends, greeting):
    hub = ends.hub()
    hears = gathering(ends, hub)
    with grpc.insecure_channel(f"127.0.0.1:{hub.port}") as channel, pytest.raises(grpc.RpcError) as refused:
        next(channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([greeting]), timeout=PATIENCE))
    assert refused.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    ends.member("alice0", hub.port).join({"party": "alice0"}, PATIENCE)
    assert list(hears.result(PATIENCE)) == ["alice0"]


def answer(port: int, *greetings: bytes) -> grpc.RpcError:
    """Greet by these bytes; return what comes of it."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
        list(channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(greetings), timeout=PATIENCE))
    return refused.value


@pytest.mark.parametrize(
    ("greeting", "why"),
    [
        (
            b'{"party": "alice0", "more": "' + bytes(SLACK) + b'"}',
            r"a greeting of \d+ bytes must be of at most 4194304",
        ),
        (b'{"party": "\xff' + bytes(2**20) + b'"}', "a greeting cannot be read: .{,100}"),
        (b"[" * 2**20, "a greeting cannot be read: .{,100}"),
        (
            json.dumps({"party": "x\x1b[31m\r\nbob: all is well" + 2**20 * "!"}).encode(),
            r".*x\\x1b\[31m\\r\\nbob: all.*",
        ),
        (b'{"party": "' + "\u202e\u2028".encode() + b'"}', r".*\\u202e\\u2028.*"),
        (b'{"party": {"a": ["' + bytes(2**20) + b'"]}}', ".*"),
    ],
    ids=["too long", "not text", "deep", "commands of a terminal", "marks of direction", "no name"],
)
def test_what_a_stranger_writes_is_cut_and_escaped(ends, greeting, why):
    hub, said = ends.hub(), []
    hears, hub.say = gathering(ends, hub), said.append
    error = answer(hub.port, greeting)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    for text in (error.details(), hub.refusals[-1], said[-1].removeprefix("refused: ")):
        assert re.fullmatch(why, text)
        assert text.isprintable()
        assert len(text) < 700
    ends.member("alice0", hub.port).join({"party": "alice0"}, PATIENCE)
    assert list(hears.result(PATIENCE)) == ["alice0"]


@pytest.mark.parametrize("says", [b"[]", b"\xff", b'"bob"', b"{", b'{"lost": "b\\u001b[2J", "why": ["x\\n"]}'])
def test_a_hub_that_says_nonsense_is_told_of_in_one_line(ends, says):
    hub = ends.hub()
    join = ends.pool.submit(ends.member("alice0", hub.port).join, {"party": "alice0"}, PATIENCE)
    hub.gather(["bob", "alice0"], lambda greeting: None, PATIENCE)
    hub.outbox["alice0"].put(says)
    with pytest.raises(InputError, match=r"the answer of bob|b\\x1b\[2J was lost before all had come") as refused:
        join.result(PATIENCE)
    assert str(refused.value).isprintable()


def differing(greeting):
    if greeting["rows"] != 7:
        raise DifferenceError("alice0 has other rows", ask="which?", explain=lambda told: f"alice0 has {told} rows")


def test_the_hub_asks_before_it_refuses_and_says_what_it_heard(ends):
    hub = ends.hub()
    hears = gathering(ends, hub, check=differing)
    member = ends.member("alice0", hub.port)
    member.answer = lambda ask: f"{ask} 8"
    with pytest.raises(InputError, match=r"^bob refused alice0: alice0 has which\? 8 rows$"):
        member.join({"party": "alice0", "rows": 8}, PATIENCE)
    ends.member("alice0", hub.port).join({"party": "alice0", "rows": 7}, PATIENCE)
    assert list(hears.result(PATIENCE)) == ["alice0"]


def test_a_hub_that_is_not_patient_waits_for_nobody_who_comes_in_vain(ends):
    hub = ends.hub()
    hub.patient = False
    hears = gathering(ends, hub, PARTIES, check=differing, timeout=10 * PATIENCE)
    with pytest.raises(InputError, match="must be one of alice0, alice1"):
        ends.member("dave", hub.port).join({"party": "dave"}, PATIENCE)
    with pytest.raises(InputError, match="a greeting has no 'rows'"):
        ends.member("alice0", hub.port).join({"party": "alice0"}, PATIENCE)
    assert not hears.done()
    with pytest.raises(InputError, match="bob refused alice0: alice0 has None rows"):
        ends.member("alice0", hub.port).join({"party": "alice0", "rows": 8}, PATIENCE)
    with pytest.raises(InputError, match=r"^alice0 has None rows \(bob waits no longer; with `engine.on_failure=wait`"):
        hears.result(PATIENCE)


def test_who_waits_hears_that_the_hub_has_ended(ends):
    hub = ends.hub()
    join = ends.pool.submit(ends.member("alice0", hub.port).join, {"party": "alice0"}, PATIENCE)
    with pytest.raises(InputError, match="alice1 did not come"):
        hub.gather(PARTIES, lambda greeting: None, 0.5)
    hub.server.stop(0)
    with pytest.raises(InputError, match=r"^bob ended, or does not answer, before all had come"):
        join.result(PATIENCE)


def test_another_service_of_grpc_is_told_from_the_hub(ends):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(
        InputError, match=rf"what listens at .*:{port}\) is another service of gRPC .*: name the one of"
    ):
        ends.member("alice0", port).join({"party": "alice0"}, PATIENCE)
    server.stop(0)


def test_a_hundred_parties_may_come(ends):
    alices = [f"alice{i}" for i in range(100)]
    hub = ends.hub()
    outs = {alice: SimpleQueue() for alice in alices}
    with grpc.insecure_channel(f"127.0.0.1:{hub.port}") as channel:
        calls = [channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(out.get, None)) for out in outs.values()]
        for alice, out in outs.items():
            out.put(json.dumps({"party": alice}).encode())
        try:
            assert len(hub.gather(["bob", *alices], lambda greeting: None, 2)) == 100
        finally:
            for call, out in zip(calls, outs.values(), strict=True):
                call.cancel()
                out.put(None)


@pytest.mark.parametrize("limit", [2**31, 2**33])
def test_weights_of_many_gigabytes_do_not_break_the_options(limit):
    assert all(value < 2**31 for _, value in options(limit, 30))


# ---- Frames


def test_frames_arrive_in_order_from_everybody_to_everybody(ends):
    stars, _ = ends.meet()
    for sequence in range(1, 101):
        for src, dst in PAIRS:
            stars[src].send(dst, framed(src, dst, sequence, f"{src} to {dst}: {sequence}".encode()))
    for src, dst in PAIRS:
        arrived = [stars[dst].inbox[src].get(timeout=PATIENCE) for _ in range(100)]
        assert arrived == [framed(src, dst, i, f"{src} to {dst}: {i}".encode()) for i in range(1, 101)]
    assert nobody_is_lost(ends)


def flooded(ends, dst: str, messages: int = 40, **more) -> dict:
    """alice0 sends so many messages of 1 MiB at once, which nobody awaits."""
    stars, _ = ends.meet(**more)
    for sequence in range(1, messages + 1):
        stars["alice0"].send(dst, framed("alice0", dst, sequence, bytes(LIMIT)))
    return stars


def test_who_sends_ahead_to_the_hub_is_held_back_and_nothing_is_lost(ends, monkeypatch):
    monkeypatch.setattr("splitlearn.federation.hub.AHEAD", LIMIT)
    stars = flooded(ends, "bob")
    box = stars["bob"].inbox["alice0"]
    time.sleep(1)
    assert box.most == 2 * LIMIT + SLACK
    assert box.most < box.num_bytes <= box.most + LIMIT + 128
    assert stars["alice0"].outbox["bob"].num_bytes > 20 * LIMIT  # the rest is still with her
    stars["alice1"].send("bob", framed("alice1", "bob"))
    assert stars["bob"].inbox["alice1"].get(timeout=PATIENCE) == framed("alice1", "bob")
    for sequence in range(1, 41):
        assert box.get(timeout=PATIENCE) == framed("alice0", "bob", sequence, bytes(LIMIT))
    assert nobody_is_lost(ends)


def test_who_sends_a_member_more_than_she_may_is_named_by_her(ends, monkeypatch):
    monkeypatch.setattr("splitlearn.federation.streams.AHEAD", LIMIT)
    stars = flooded(ends, "alice1")
    lost, why = heard(ends, "alice1", PATIENCE)
    box = stars["alice1"].inbox["alice0"]
    assert lost == "alice0"
    assert why == f"alice0 has sent {box.num_bytes} bytes ahead, and may send {2 * LIMIT + SLACK}"
    assert heard(ends, "bob") == ("alice1", why)  # who says so
    time.sleep(0.5)
    assert box.num_bytes <= box.most + LIMIT + 128


def test_what_waits_at_the_hub_for_a_slow_member_is_bounded_and_comes(ends):
    hub = ends.hub()
    hears = gathering(ends, hub, PARTIES)
    ports = {"alice0": hub.port, "alice1": Proxy(hub.port, 10e6).port}
    members = {party: ends.member(party, port) for party, port in ports.items()}
    joins = [ends.pool.submit(member.join, {"party": party}, PATIENCE) for party, member in members.items()]
    [join.result(PATIENCE) for join in [*joins, hears]]
    for sequence in range(1, 31):
        members["alice0"].send("alice1", framed("alice0", "alice1", sequence, bytes(LIMIT)))
    out, most = hub.outbox["alice1"], 0
    while len(members["alice1"].inbox["alice0"]) < 30 and nobody_is_lost(ends):
        most = max(most, out.num_bytes)
        time.sleep(0.01)
    assert nobody_is_lost(ends)
    assert out.most < most <= out.most + LIMIT + 128 == LIMIT + SLACK + LIMIT + 128


def test_a_message_may_be_as_long_as_the_limit(ends):
    stars, _ = ends.meet()
    for src, dst in PAIRS:
        stars[src].send(dst, framed(src, dst, payload=bytes(LIMIT)))
        assert len(stars[dst].inbox[src].get(timeout=PATIENCE)) == LIMIT + 128
    assert nobody_is_lost(ends)


STRANGER = (*PARTIES, "dave")
REFUSED = {
    "of another sender": (framed("alice1", "bob"), r"`sender` \(=alice1\) must be alice0, whose stream this is"),
    "of the hub": (framed("bob", "alice1"), r"`sender` \(=bob\) must be alice0"),
    "of nobody": (framed("dave", "bob", parties=STRANGER), "parties 3 and 0 must be below 3"),
    "for nobody": (framed("alice0", "dave", parties=STRANGER), "parties 1 and 3 must be below 3"),
    "empty": (b"", "`length`"),
    "too short": (framed("alice0", "bob")[:127], "`length`"),
    "of another protocol": (b"GET / HTTP/1.1" + bytes(200), "`magic`"),
    "half a note": (b'{"farewell": ', ""),
    "a note of bytes": (b"{\xff", ""),
    "a loss without why": (b'{"lost": "alice0"}', ""),
    "a note that is too long": (
        b'{"lost": "alice0", "why": "' + LARGEST_NOTE * b" " + b'"}',
        r"a note of \d+ bytes must",
    ),
}


@pytest.mark.parametrize(("message", "why"), REFUSED.values(), ids=REFUSED)
def test_who_sends_what_is_refused_is_lost_and_all_hear_of_it(ends, message, why):
    stars, _ = ends.meet()
    stars["alice0"].send("bob", message)
    for party in ("bob", "alice1"):
        lost, said = heard(ends, party)
        assert lost == "alice0"
        assert re.match(f"sent what was refused: .*{why}", said)
    assert len(stars["bob"].inbox["alice1"]) == len(stars["alice1"].inbox["bob"]) == 0


def test_nobody_can_say_that_somebody_else_is_lost(ends):
    stars, _ = ends.meet()
    stars["alice0"].send("bob", b'{"lost": "alice1", "why": "alice0 says so"}')
    assert heard(ends, "bob")[0] == "alice0"


@pytest.mark.parametrize(
    "message",
    [
        framed("alice1", "bob"),
        framed("dave", "alice0", parties=STRANGER),
        *(b"", bytes(128), b"{", b'{"lost": "alice1"}', b'{"lost": 1, "why": ""}', b'{"lost": "x\\n", "why": ""}'),
        b'{"lost": "alice1", "why": "' + LARGEST_NOTE * b" " + b'"}',
    ],
    ids=[
        *("for another", "of nobody", "empty", "zeros", "half a note", "a loss without why", "the loss of a number"),
        *("the loss of nobody", "a note that is too long"),
    ],
)
def test_a_hub_that_sends_what_is_refused_is_lost(ends, message):
    stars, _ = ends.meet()
    stars["bob"].outbox["alice0"].put(message)
    lost, why = heard(ends, "alice0")
    assert lost == "bob"
    assert "sent what was refused" in why


def test_why_somebody_gives_up_is_cut_and_escaped(ends):
    stars, _ = ends.meet()
    stars["alice0"].outbox["bob"].put(json.dumps({"lost": "alice0", "why": "\x1b[2J\n" + 60000 * "x"}).encode())
    for party in ("bob", "alice1"):
        who, why = heard(ends, party)
        assert who == "alice0"
        assert why.startswith(r"\x1b[2J\nxxx")
        assert len(why) < 700


def test_a_long_reason_is_cut_so_that_it_is_heard(ends):
    stars, _ = ends.meet()
    stars["alice0"].give_up(LARGEST_NOTE * "x")
    assert [heard(ends, party) for party in ("bob", "alice1")] == 2 * [("alice0", 600 * "x" + "...")]


def test_all_hear_why_one_gives_up(ends):
    stars, _ = ends.meet()
    stars["alice0"].give_up("out of memory")
    assert [heard(ends, party) for party in ("bob", "alice1")] == 2 * [("alice0", "out of memory")]


# ---- Farewell


@pytest.mark.parametrize("order", list(itertools.permutations(PARTIES)))
def test_nobody_is_lost_in_whatever_order_all_close(ends, order):
    stars, _ = ends.meet()
    closing = []
    for party in order:
        closing.append(ends.pool.submit(stars[party].close, PATIENCE))
        time.sleep(0.05)
    began = time.monotonic()
    for one in closing:
        one.result(PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2
    assert nobody_is_lost(ends)


def test_what_was_sent_before_a_farewell_arrives(ends):
    stars, _ = ends.meet()
    for src, dst in PAIRS:
        stars[src].send(dst, framed(src, dst, payload=bytes(LIMIT)))
    for one in [ends.pool.submit(star.close, PATIENCE) for star in stars.values()]:
        one.result(PATIENCE)
    assert [len(stars[dst].inbox[src]) for src, dst in PAIRS] == len(PAIRS) * [1]


def test_a_member_hears_of_a_hub_that_leaves_before_it(ends):
    stars, _ = ends.meet()
    stars["bob"].close(0.1)
    assert heard(ends, "alice0")[0] == "bob"


# ---- Who may come


def disguised(folder: Path, ca: str, party: str, of: str) -> Identity:
    """Trusts the CA of `ca`, and shows the certificate of `party` that the CA of `of` has signed."""
    trusted = (folder / ca / "bob" / "ca.crt").read_bytes()
    return Identity(party, trusted, *((folder / of / party / name).read_bytes() for name in ("party.crt", "party.key")))


@pytest.mark.parametrize(
    ("greets_as", "shows", "message"),
    [
        ("alice0", None, "does not talk in the clear, as this party does: .* bob was started with wire=grpc"),
        ("alice0", ("theirs", "alice0", "theirs"), "shows a certificate of another CA: .* have both made by one CA"),
        ("alice0", ("ours", "alice0", "theirs"), "bob listens at .* and does not take this party's certificate"),
        ("alice0", ("ours", "alice1", "ours"), r"refused alice0: `engine.party` \(=alice1\) must be one of alice0"),
        ("alice0", ("ours", "mallory", "ours"), r"refused alice0: `engine.party` \(=mallory\) must be one of alice0"),
        ("mallory", ("ours", "mallory", "ours"), r"refused mallory: `engine.party` \(=mallory\) must be one of alice0"),
    ],
    ids=["no certificate", "another CA on both sides", "another CA", "of another party", "a stranger", "uninvited"],
)
def test_who_proves_another_name_or_none_does_not_come_in(ends, folder, greets_as, shows, message):
    hub = ends.hub(identity=load(folder / "ours", "bob")["bob"])
    hears = gathering(ends, hub)
    began = time.monotonic()
    with pytest.raises(InputError, match=message):
        ends.member(greets_as, hub.port, shows and disguised(folder, *shows)).join({"party": greets_as}, 1)
    assert time.monotonic() - began < 3
    assert hub.joined == {}
    ends.member("alice0", hub.port, load(folder / "ours", "alice0")["alice0"]).join({"party": "alice0"}, PATIENCE)
    assert list(hears.result(PATIENCE)) == ["alice0"]


def test_a_certificate_that_is_revoked_is_refused_by_name(ends, folder):
    alice, bob = (load(folder / "ours", party)[party] for party in ("alice0", "bob"))
    serial = x509.load_pem_x509_certificate(alice.certificate).serial_number
    hub = ends.hub(identity=replace(bob, revoked=frozenset({serial})))
    gathering(ends, hub, timeout=1)
    with pytest.raises(InputError, match=r"^bob refused alice0: the certificate of alice0 is revoked"):
        ends.member("alice0", hub.port, alice).join({"party": "alice0"}, PATIENCE)
    assert hub.joined == {}


def test_a_member_of_the_ca_holds_one_thread_at_most_and_frees_it_in_time(ends, folder, monkeypatch):
    monkeypatch.setattr("splitlearn.federation.hub.TO_GREET", 1.0)
    # It awaits nobody yet, so that any name might have a part.
    hub = ends.hub(identity=load(folder / "ours", "bob")["bob"])
    member = ends.member("mallory", hub.port, load(folder / "ours", "mallory")["mallory"])
    silent = SimpleQueue()
    calls = [member.channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(silent.get, None)) for _ in range(50)]
    codes = Counter(call.code() for call in calls)
    assert codes == {grpc.StatusCode.ALREADY_EXISTS: 49, grpc.StatusCode.CANCELLED: 1}
    until(lambda: hub.greeting == set(), PATIENCE)  # the caller hears of the end before the hub has tidied up
    assert all("another process" in refusal for refusal in list(hub.refusals)[:49])
    [silent.put(None) for _ in calls]


def test_a_member_of_the_ca_without_a_part_in_the_run_holds_no_thread(ends, folder):
    """Though it would have 20 seconds to greet, nothing of it is awaited."""
    hub = ends.hub(identity=load(folder / "ours", "bob")["bob"])
    hears = gathering(ends, hub)
    member = ends.member("mallory", hub.port, load(folder / "ours", "mallory")["mallory"])
    silent = SimpleQueue()
    calls = [member.channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(silent.get, None)) for _ in range(100)]
    began = time.monotonic()
    assert {call.code() for call in calls} == {grpc.StatusCode.FAILED_PRECONDITION}
    assert time.monotonic() - began < PATIENCE
    ends.member("alice0", hub.port, load(folder / "ours", "alice0")["alice0"]).join({"party": "alice0"}, PATIENCE)
    assert list(hears.result(PATIENCE)) == ["alice0"]
    [silent.put(None) for _ in calls]


def test_a_connection_that_says_nothing_is_closed(ends, folder, monkeypatch):
    monkeypatch.setattr("splitlearn.federation.streams.HANDSHAKE", 1000)
    for identity in (None, load(folder / "ours", "bob")["bob"]):
        hub = ends.hub(identity=identity)
        with socket.create_connection(("127.0.0.1", hub.port), timeout=4 * PATIENCE) as silent:
            while silent.recv(2**12):
                pass


def test_a_hub_has_as_many_descriptors_as_it_may_have(ends):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
        ends.hub()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("shows", "message"),
    [
        (None, "does not speak TLS: it is another service, or bob was started without"),
        (("ours", "alice1", "ours"), "shows a certificate of another party than bob"),
        (("ours", "bob", "theirs"), "shows a certificate of another CA"),
        (("theirs", "bob", "theirs"), "shows a certificate of another CA"),
    ],
    ids=["no certificate", "of another party", "of another CA", "of another CA that it trusts"],
)
def test_a_hub_that_proves_another_name_or_none_hears_no_greeting(ends, folder, shows, message):
    hub = ends.hub(identity=shows and disguised(folder, *shows))
    hears = gathering(ends, hub, timeout=1.5)
    own = load(folder / "ours", "alice0")["alice0"]
    with pytest.raises(InputError, match=f"bob does not answer at .*: what listens at .* {message}"):
        ends.member("alice0", hub.port, own).join({"party": "alice0"}, 1)
    assert hub.joined == {}
    with pytest.raises(InputError, match="alice0 did not come"):
        hears.result(PATIENCE)


@pytest.mark.parametrize("secured", [True, False], ids=["tls", "clear"])
def test_who_listens_on_the_network_learns_nothing_unless_it_is_in_the_clear(ends, folder, secured):
    hub = ends.hub(identity=load(folder / "ours", "bob")["bob"] if secured else None)
    proxy = Proxy(hub.port)
    member = ends.member("alice0", proxy.port, load(folder / "ours", "alice0")["alice0"] if secured else None)
    hears = gathering(ends, hub)
    member.join({"party": "alice0", "rows": "a greeting"}, PATIENCE)
    hears.result(PATIENCE)
    parties = ("bob", "alice0")
    activation, labels = 20 * b"activation", bytes(range(0, 250, 5))
    member.send("bob", framed("alice0", "bob", 1, activation, parties))
    member.send("bob", framed("alice0", "bob", 2, labels, parties))
    assert hub.inbox["alice0"].get(timeout=PATIENCE)[128:] == activation
    assert hub.inbox["alice0"].get(timeout=PATIENCE)[128:] == labels
    hub.send("alice0", framed("bob", "alice0", 1, b"gradient", parties))
    assert member.inbox["bob"].get(timeout=PATIENCE)[128:] == b"gradient"
    assert len(proxy.seen) > len(activation) + len(labels)
    found = [secret in proxy.seen for secret in (b"a greeting", activation, labels, b"gradient", b"alice0", b"SPLT")]
    assert found == 6 * [not secured]


# ---- Who is lost


@contextmanager
def living(party: str, port: int = 0, folder: Path | None = None, timeout=20, **more) -> Iterator[tuple]:
    """The process of a party, and what it reports."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=live, args=(party, port, folder, timeout, theirs), kwargs=more)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def noticed(ends: Ends, process, how: signal.Signals, lost: str, parties: tuple[str, str], within: float) -> None:
    began = time.monotonic()
    os.kill(process.pid, how)
    for party in parties:
        who, why, when = ends.lost[party].get(timeout=within + PATIENCE)
        assert who == lost
        assert "its process ended, or does not answer" in why
        assert when - began < within


@pytest.mark.parametrize("secured", [True, False], ids=["tls", "clear"])
@pytest.mark.parametrize(
    ("how", "timeout", "within"), [(signal.SIGKILL, 20, 2), (signal.SIGSTOP, 3, 3.5)], ids=["killed", "frozen"]
)
def test_a_member_that_dies_or_freezes_is_noticed_by_all(ends, folder, secured, how, timeout, within):
    identities = load(folder / "ours", *PARTIES) if secured else None
    child = []

    def begin(port):
        child.append(stack.enter_context(living("alice1", port, folder / "ours" if secured else None, timeout)))

    with ExitStack() as stack:
        ends.meet(identities=identities, timeout=timeout, elsewhere=["alice1"], begin=begin)
        ((process, report),) = child
        assert report.recv() == "joined"
        noticed(ends, process, how, "alice1", ("bob", "alice0"), within)


@pytest.mark.parametrize(
    ("how", "timeout", "within"), [(signal.SIGKILL, 20, 2), (signal.SIGSTOP, 3, 3.5)], ids=["killed", "frozen"]
)
def test_a_hub_that_dies_or_freezes_is_noticed_by_all(ends, folder, how, timeout, within):
    identities = load(folder / "ours", *PARTIES)
    with living("bob", folder=folder / "ours", timeout=timeout) as (process, report):
        port = report.recv()
        alices = "alice0", "alice1"
        members = [ends.member(alice, port, identities[alice], timeout) for alice in alices]
        joins = [ends.pool.submit(member.join, {"party": member.party}, PATIENCE) for member in members]
        for join in joins:
            join.result(PATIENCE)
        assert report.recv() == "joined"
        noticed(ends, process, how, "bob", alices, within)


def test_who_dies_while_others_are_awaited_is_lost(ends):
    hub = ends.hub()
    hub.patient = False
    hears = gathering(ends, hub, PARTIES, timeout=1)
    with grpc.insecure_channel(f"127.0.0.1:{hub.port}") as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([b'{"party": "alice0"}']))
        while not hub.joined:
            time.sleep(0.01)
        call.cancel()
        assert heard(ends, "bob") == ("alice0", "its process ended, or does not answer")
    with pytest.raises(InputError, match="alice1 did not come"):
        hears.result(PATIENCE)


def test_a_patient_hub_waits_for_who_dies_while_others_are_awaited(ends):
    hub, said = ends.hub(), []
    hears, hub.say = gathering(ends, hub, PARTIES), said.append
    for _ in range(2):
        with grpc.insecure_channel(f"127.0.0.1:{hub.port}") as channel:
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([b'{"party": "alice0"}']))
            while not hub.joined:
                time.sleep(0.01)
            call.cancel()
            while hub.joined:
                time.sleep(0.01)
    joins = [ends.pool.submit(ends.member(p, hub.port).join, {"party": p}, PATIENCE) for p in ("alice0", "alice1")]
    assert set(hears.result(PATIENCE)) == {"alice0", "alice1"}
    for join in joins:
        join.result(PATIENCE)
    assert said.count("alice0 has gone again: its process ended, or does not answer") == 2
    assert nobody_is_lost(ends)


@pytest.mark.parametrize("gives_up", [True, False])
def test_who_is_lost_between_the_last_to_come_and_the_welcome_is_lost(ends, gives_up):
    hub = ends.hub()
    member = ends.member("alice0", hub.port)
    ends.pool.submit(member.join, {"party": "alice0"}, PATIENCE)
    hub.gather(["bob", "alice0"], lambda greeting: None, PATIENCE)
    member.give_up("stopped") if gives_up else member.drop()
    assert heard(ends, "bob") == ("alice0", "stopped" if gives_up else "its process ended, or does not answer")


def test_an_early_farewell_hides_no_death(ends):
    stars, _ = ends.meet()
    stars["alice0"].outbox["bob"].put(b'{"farewell": true}')
    stars["bob"].outbox["alice1"].put(b'{"farewell": true}')
    while "alice0" not in stars["bob"].done:
        time.sleep(0.01)
    stars["alice0"].drop()
    assert [heard(ends, party)[0] for party in ("bob", "alice1")] == ["alice0", "alice0"]


def test_an_early_farewell_of_the_hub_hides_no_death(ends):
    stars, _ = ends.meet()
    for alice in ("alice0", "alice1"):
        stars["bob"].outbox[alice].put(b'{"farewell": true}')
        while "bob" not in stars[alice].done:
            time.sleep(0.01)
    stars["bob"].server.stop(0)
    assert [heard(ends, party)[0] for party in ("alice0", "alice1")] == ["bob", "bob"]


def test_a_loss_is_told_once(ends):
    stars, _ = ends.meet()
    stars["alice0"].drop()
    stars["alice1"].drop()
    assert heard(ends, "bob")[0] in ("alice0", "alice1")
    time.sleep(0.3)
    assert ends.lost["bob"].empty()


def test_who_dies_before_the_hub_is_ready_is_not_taken_for_present(ends):
    hub = ends.hub()
    with grpc.insecure_channel(f"127.0.0.1:{hub.port}") as channel:
        grpc.channel_ready_future(channel).result(PATIENCE)
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter([b'{"party": "alice0"}']))
        time.sleep(0.2)
        call.cancel()
    time.sleep(0.2)
    with suppress(InputError):
        hub.gather(["bob", "alice0"], lambda greeting: None, 0.5)
    assert hub.joined == {} or heard(ends, "bob")[0] == "alice0"


@pytest.mark.parametrize("secured", [True, False], ids=["tls", "clear"])
def test_a_party_that_is_still_sending_over_a_slow_link_is_not_lost(ends, folder, secured, monkeypatch):
    """6 MB at 1.5 MB/s take 4 s, both ways at the same time, and whoever is silent for 2.5 s is lost."""
    monkeypatch.setattr("stars.LIMIT", 2**23)
    own = load(folder / "ours", "bob", "alice0") if secured else {}
    hub = ends.hub(identity=own.get("bob"), timeout=2.5)
    hears = gathering(ends, hub)
    member = ends.member("alice0", Proxy(hub.port, 1.5e6).port, own.get("alice0"), timeout=2.5)
    member.join({"party": "alice0"}, PATIENCE)
    hears.result(PATIENCE)
    for star, dst in ((hub, "alice0"), (member, "bob")):
        star.send(dst, framed(star.party, dst, payload=bytes(6 * 10**6)))
    for star, src in ((hub, "alice0"), (member, "bob")):
        assert len(star.inbox[src].get(timeout=4 * PATIENCE)) > 6 * 10**6
    assert nobody_is_lost(ends)


def test_a_party_that_computes_for_longer_than_the_timeout_is_not_lost(ends):
    child = []
    with ExitStack() as stack:
        ends.meet(
            timeout=1,
            elsewhere=["alice1"],
            begin=lambda port: child.append(stack.enter_context(living("alice1", port, timeout=1, busy=3.0))),
        )
        ((_, report),) = child
        assert report.recv() == "joined"
        assert report.recv() > 1.1
        assert nobody_is_lost(ends)

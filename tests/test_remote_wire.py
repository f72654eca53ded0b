"""Over every wire between processes arrives what arrives in the simulator, or nothing that is not what was awaited."""

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from commands import CONTEXT
from federated import BesideByGloo
from helpers import Recorder
from stars import PARTIES, PATIENCE, RUN, Ends, gloo_receiver, load
from torch import Tensor

from splitlearn.certificates import make_certificates
from splitlearn.errors import InputError
from splitlearn.federation.frame import (
    BESIDE,
    HEADER_BYTES,
    NOTHING,
    SEAL_BYTES,
    SEALED,
    WANTS_GRADIENT,
    FrameError,
    Header,
    pack,
    payload_of,
    unpack,
)
from splitlearn.federation.remote_wire import RemoteWire
from splitlearn.federation.sealing import Seal, SealError
from splitlearn.federation.transports import Transport
from splitlearn.federation.wiring import GlooWiring, GrpcWiring, NcclWiring
from splitlearn.wire import Wire

WIRES = ("queues", "gloo", "beside", "grpc in the clear", "grpc")


class Queues(Transport):
    """A transport inside one process. `tamper` makes the frames that arrive of one that was sent."""

    def __init__(self, party: str, boxes: dict[tuple[str, str], SimpleQueue]) -> None:
        self.party, self.boxes = party, boxes
        self.tamper: Callable[[bytes], Sequence[bytes]] = lambda frame: [frame]

    def send(self, dst, head, payload):
        for frame in self.tamper(b"".join((head, payload))):
            self.boxes[self.party, dst].put(frame)

    def receive_head(self, src):
        self.frame = self.boxes[src, self.party].get(timeout=PATIENCE)
        return self.frame[:HEADER_BYTES]

    def receive_payload(self, src, num_bytes):
        return self.frame[HEADER_BYTES:]


def queued(parties: Sequence[str] = PARTIES) -> dict[str, RemoteWire]:
    boxes = {pair: SimpleQueue() for pair in permutations(parties, 2)}
    wires = {party: RemoteWire(party) for party in parties}
    for party, wire in wires.items():
        wire.connect(Queues(party, boxes), parties, RUN)
    return wires


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(PARTIES, folder)
    return folder


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Ends() as ends:
        yield ends


def connected(ends: Ends, folder: Path, wire: str) -> dict[str, RemoteWire]:
    """The wires of all parties, joined as the engine joins them."""
    if wire == "queues":
        return queued()
    secured = wire == "grpc"
    wires = {party: RemoteWire(party) for party in PARTIES}
    kinds = {"gloo": lambda party: GlooWiring(), "beside": lambda party: BesideByGloo()}
    make = kinds.get(wire, lambda party: GrpcWiring(str(folder / party), tls=secured))
    wirings = {party: make(party) for party in PARTIES}
    identities = {party: wiring.identity(party) for party, wiring in wirings.items()}
    shown = {party: own.certificate.decode() for party, own in identities.items() if own is not None}
    nonces = {party: wiring.nonce.hex() for party, wiring in wirings.items()}
    said = {"run": RUN.hex(), "certificates": shown, "nonces": nonces}
    stars, welcome = ends.meet(identities=identities, welcome=lambda hub: {**said, **wirings["bob"].offer(hub)})

    def connect(party: str) -> None:
        wiring, star = wirings[party], stars[party]
        seals = wiring.seals(star, welcome)
        wires[party].connect(wiring.transport(star, welcome, wires[party].device), star.parties, RUN, seals)

    for one in [ends.pool.submit(connect, party) for party in PARTIES]:
        one.result(PATIENCE)
    return wires


def together(ends: Ends, wires: dict[str, RemoteWire], program: Callable) -> dict:
    """Run one program at all parties at the same time; return by party what it returned."""
    running = {party: ends.pool.submit(program, wire) for party, wire in wires.items()}
    return {party: one.result(2 * PATIENCE) for party, one in running.items()}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


MESSAGES = [
    ("alice0", "bob", "activation", drawn(5, 3, 2).requires_grad_()),
    ("bob", "alice0", "gradient", drawn(5, 3, 2)),
    ("alice1", "bob", "activation", drawn(5, 7)),
    ("alice1", "bob", "activation", drawn(5, 7, dtype=torch.bfloat16).requires_grad_()),
    ("bob", "alice1", "gradient", drawn(5, 7, dtype=torch.bfloat16)),
    ("bob", "alice0", "activation", torch.arange(6).reshape(2, 3)),
    ("alice0", "bob", "activation", drawn(0, 3).requires_grad_()),
    ("alice0", "alice1", "activation", drawn(2, 3, seed=1).requires_grad_()),
    ("alice1", "alice0", "gradient", drawn(3, 2).T),
    ("alice0", "bob", "label", torch.tensor([2, 0, 1])),
    ("alice0", "alice1", "label", torch.tensor([True, False])),
    ("alice0", "alice1", "weights", torch.nn.Parameter(drawn(3, 4))),
    ("alice0", "alice1", "weights", torch.tensor(7)),
    ("alice1", "alice0", "weights", torch.tensor(0.5, dtype=torch.bfloat16)),
    ("alice1", "bob", "weight_gradient", drawn(4, dtype=torch.float64).expand(2, 4)),
    ("bob", "alice1", "metric", torch.tensor(0.25)),
    ("alice0", "alice1", "optimizer_state", torch.tensor(3.0)),
]


def here(wire: Wire, src: str, tensor: Tensor) -> Tensor:
    """What the process of `wire` has of a tensor of `src`."""
    return tensor if wire.plays(src) else torch.empty_like(tensor, device="meta", requires_grad=False)


def carry_messages(wire: Wire) -> list[Tensor]:
    received = []
    for place, (src, dst, kind, tensor) in enumerate(MESSAGES):
        wire.number = (2, place)
        received.append(wire.carry(here(wire, src, tensor), src, dst, kind))
    return received


# ---- As in the simulator


@pytest.mark.parametrize("wire", WIRES)
def test_what_arrives_and_what_is_counted_is_as_in_the_simulator(ends, folder, wire):
    simulator, wires = Wire(), connected(ends, folder, wire)
    expected = carry_messages(simulator)
    received = together(ends, wires, carry_messages)
    for place, (_, dst, _, _) in enumerate(MESSAGES):
        for party, tensors in received.items():
            got, awaited = tensors[place], expected[place]
            assert (got.dtype, got.shape) == (awaited.dtype, awaited.shape)
            assert got.device.type == ("cpu" if party == dst else "meta")
            assert got.is_leaf
            assert got.requires_grad is (awaited.requires_grad and party == dst)
            assert party != dst or torch.equal(got, awaited)
    for party, own in wires.items():
        assert own.ledger.num_bytes == {key: n for key, n in simulator.ledger.num_bytes.items() if party in key}


def test_an_activation_may_come_in_another_precision_than_was_thought():
    wires, sent = queued(), drawn(2, 3, dtype=torch.bfloat16)
    wires["alice0"].carry(sent, "alice0", "bob", "activation")
    received = wires["bob"].carry(torch.empty(2, 3, device="meta"), "alice0", "bob", "activation")
    assert received.dtype == torch.bfloat16
    assert torch.equal(received, sent)


@pytest.mark.parametrize("wire", WIRES)
def test_what_arrives_is_the_receivers_own(ends, folder, wire):
    weights = drawn(3)

    def program(wire: Wire) -> Tensor:
        received = wire.carry(here(wire, "alice0", weights), "alice0", "alice1", "weights")
        return received.fill_(9) if wire.plays("alice1") else received

    together(ends, connected(ends, folder, wire), program)
    assert torch.equal(weights, drawn(3))


def test_weights_that_change_after_they_were_sent_arrive_as_they_were():
    wires, weights = queued(), drawn(3)
    wires["alice0"].carry(weights, "alice0", "bob", "weights")
    weights.fill_(9)
    assert torch.equal(wires["bob"].carry(torch.empty(3, device="meta"), "alice0", "bob", "weights"), drawn(3))


def test_taps_at_both_ends_hear_as_in_the_simulator():
    wires, simulator, sent = queued(), Wire(), drawn(2, 3)
    simulator.taps, taps = [Recorder("bob")], {party: Recorder(party) for party in PARTIES}
    for party, tap in taps.items():
        wires[party].taps = [tap]
    for wire in (simulator, *(wires[party] for party in ("alice0", "bob", "alice1"))):
        wire.carry(here(wire, "alice0", sent), "alice0", "bob", "activation")
    heard = {party: [(*m[:3], m.tensor.tolist()) for m in tap.messages] for party, tap in taps.items()}
    ((*message, tensor),) = simulator.taps[0].messages
    assert heard == {"alice0": [(*message, tensor.tolist())], "bob": [(*message, tensor.tolist())], "alice1": []}


@pytest.mark.parametrize("party", PARTIES)
def test_a_kind_that_nobody_knows_is_refused_as_in_the_simulator(party):
    wires = queued()
    with pytest.raises(ValueError, match=r"^`kind` \(=gossip\) must be one of activation, "):
        wires[party].carry(here(wires[party], "alice0", drawn(1)), "alice0", "bob", "gossip")


@pytest.mark.parametrize("wire", WIRES)
def test_what_the_wire_adds_is_at_most_half_a_percent(ends, folder, wire):
    tensor = drawn(64, 640)
    wires = connected(ends, folder, wire)
    together(ends, wires, lambda wire: wire.carry(here(wire, "alice0", tensor), "alice0", "alice1", "weights"))
    added = wires["alice0"].overhead
    assert added["headers"] == HEADER_BYTES
    assert added["seals"] == (SEAL_BYTES if wire == "grpc" else 0)
    assert 0 < added.total() <= 0.005 * tensor.nbytes
    assert wires["alice0"].ledger.num_bytes == {("alice0", "alice1", "weights"): tensor.nbytes}


def test_what_is_counted_is_what_is_sent():
    wires, sizes = queued(), []
    wires["alice0"].transport.tamper = lambda frame: sizes.append(len(frame)) or [frame]
    wires["alice0"].carry(drawn(5, 3), "alice0", "bob", "activation")
    wires["alice0"].carry_all({"a": drawn(3), "b": torch.tensor(1)}, "alice0", "bob", "weights")
    assert sum(sizes) == sum(wires["alice0"].ledger.num_bytes.values()) + wires["alice0"].overhead.total()


# ---- By name, and from all


STATE = {"0/step": torch.tensor(3.0), "0/exp_avg": drawn(2, 3), "1/step": torch.tensor(3.0)}
PARAMETERS = {"0": drawn(2, 3), "1": drawn(4)}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("kind", "sent", "like"),
    [
        ("weights", {"a.weight": drawn(2, 3), "a.num_batches_tracked": torch.tensor(5)}, None),
        ("weight_gradient", {"b": drawn(4)}, {"a": drawn(2, 3), "b": drawn(4)}),
        ("weight_gradient", {}, {"a": drawn(2, 3)}),
        ("optimizer_state", STATE, PARAMETERS),
    ],
    ids=["weights", "some gradients", "no gradients", "optimizer state"],
)
def test_by_name_arrives_what_was_sent_and_only_where_it_is_for(ends, folder, wire, kind, sent, like):
    def program(wire: Wire) -> dict[str, Tensor]:
        tensors = sent if wire.plays("alice0") else {name: value.to("meta") for name, value in (like or sent).items()}
        return wire.carry_all(tensors, "alice0", "alice1", kind)

    wires = connected(ends, folder, wire)
    received = together(ends, wires, program)
    assert received["alice0"] == received["bob"] == {}
    assert list(received["alice1"]) == list(sent)
    for name, tensor in sent.items():
        assert received["alice1"][name].dtype == tensor.dtype
        assert torch.equal(received["alice1"][name], tensor)
    simulator = Wire()
    simulator.carry_all(sent, "alice0", "alice1", kind)
    assert wires["alice0"].ledger.num_bytes == wires["alice1"].ledger.num_bytes == simulator.ledger.num_bytes


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("weights", ["a", "b", "c"], "weights of other names than a, b: c"),
        ("weights", ["a"], "weights of other names than a, b: b"),
        ("weights", [], "weights of other names than a, b: a, b"),
        ("weights", ["a", "b/x"], "weights of other names than a, b: b, b/x"),
        ("weight_gradient", ["c"], "weight_gradient of `c`, which is none of a, b"),
        ("weight_gradient", [""], "weight_gradient of ``, which is none of a, b"),
        ("weight_gradient", ["a/x"], "weight_gradient of `a/x`, which is none of a, b"),
        ("optimizer_state", ["c/step"], "optimizer_state of `c`, which is none of a, b"),
        ("optimizer_state", ["a/b/step"], "optimizer_state of `a/b`, which is none of a, b"),
        ("optimizer_state", [f"a/{i}" for i in range(33)], "optimizer_state of 33 names, too many or some twice"),
    ],
)
def test_names_that_nobody_has_or_that_are_missing_are_refused(kind, names, message):
    wires = queued()
    wires["alice0"].carry_all(dict.fromkeys(names, drawn(3)), "alice0", "bob", kind)
    with pytest.raises(FrameError, match=message):
        wires["bob"].carry_all(dict.fromkeys("ab", torch.empty(3, device="meta")), "alice0", "bob", kind)


def test_who_is_far_ahead_waits_for_an_answer(monkeypatch):
    """Both ends count alike: after 1,000 bytes without anything the other way, the receiver tells her to go on."""
    monkeypatch.setattr("splitlearn.federation.remote_wire.AHEAD", 1000)
    wires, rows = queued(), drawn(64)
    with ThreadPoolExecutor(2) as pool:
        sends = pool.submit(lambda: [wires["alice0"].carry(rows, "alice0", "bob", "activation") for _ in range(20)])
        time.sleep(0.2)
        assert wires["alice0"].sent["bob"] == 3  # 1,152 bytes with headers: she waits
        received = [wires["bob"].carry(rows.to("meta"), "alice0", "bob", "activation") for _ in range(20)]
        sends.result(PATIENCE)
    assert all(torch.equal(each, rows) for each in received)
    assert wires["bob"].sent["alice0"] == 6


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("0/exp_avg", drawn(3, 2)), ("0/exp_avg", drawn(1)), ("0/step", torch.tensor(3)), ("0/exp_avg", drawn(2, 4))],
    ids=["another shape", "neither the shape nor a number", "an integer", "too long"],
)
def test_a_state_that_does_not_fit_its_parameter_is_refused(name, tensor):
    wires = queued()
    wires["alice0"].carry_all({name: tensor}, "alice0", "bob", "optimizer_state")
    with pytest.raises(FrameError):
        wires["bob"].carry_all({"0": torch.empty(2, 3, device="meta")}, "alice0", "bob", "optimizer_state")


@pytest.mark.parametrize("wire", WIRES)
def test_all_gather_the_same_list(ends, folder, wire):
    def program(wire: RemoteWire) -> list:
        return [wire.gather({"who": wire.party, "loss": 0.5, "steps": [1, None]}), wire.gather(wire.party)]

    everybody = [{"who": party, "loss": 0.5, "steps": [1, None]} for party in PARTIES]
    wires = connected(ends, folder, wire)
    assert together(ends, wires, program) == {party: [everybody, list(PARTIES)] for party in PARTIES}
    assert wires["alice0"].ledger.num_bytes == {}
    assert wires["alice0"].overhead["notes"] > 0


def test_the_hub_gathers_what_the_others_do(ends):
    """JSON knows no tuples and no numbers as keys: the hub must not have what nobody else gets."""
    told = together(ends, queued(), lambda wire: wire.gather({1: (2, 3)}))
    assert told["bob"] == told["alice0"] == told["alice1"]


@pytest.mark.parametrize("kind", ["weights", "gradient", "optimizer_state"])
def test_names_that_come_twice_are_refused(kind):
    wires = queued(("bob", "alice0"))
    names = b'["a", "b", "a"]' if kind != "optimizer_state" else b'["a/x", "b/x", "a/x"]'
    head = Header(RUN, "control", 1, 0, 1, torch.uint8, (len(names),), len(names))
    wires["alice0"].transport.send("bob", pack(head, names), names)
    with pytest.raises(FrameError, match=f"alice0 sent {kind} of 3 names, too many or some twice"):
        wires["bob"].carry_all(dict.fromkeys("ab", torch.empty(3, device="meta")), "alice0", "bob", kind)


def test_names_that_nobody_has_are_cut_and_escaped():
    wires = queued(("bob", "alice0"))
    wires["alice0"].carry_all({"\x1b[2J" + 2000 * "x": drawn(3)}, "alice0", "bob", "gradient")
    with pytest.raises(FrameError, match=r"gradient of `\\x1b\[2Jx{76}\.\.\.`, which is none of a"):
        wires["bob"].carry_all({"a": torch.empty(3, device="meta")}, "alice0", "bob", "gradient")


@pytest.mark.parametrize("names", [b"{", b"\xff", b"7", b"null", b"[7]", b'[["a"]]', b""])
def test_names_that_are_none_are_refused(names):
    wires = queued()
    head = Header(RUN, "control", 1, 0, 1, torch.uint8, (len(names),), len(names))
    wires["alice0"].transport.send("bob", pack(head, names), names)
    with pytest.raises(FrameError):
        wires["bob"].carry_all({"a": torch.empty(3, device="meta")}, "alice0", "bob", "weights")


# ---- Nothing else


def forged(**changes) -> Callable[[bytes], list[bytes]]:
    """Alter fields of a header, and make payload and CRC fit."""

    def tamper(frame: bytes) -> list[bytes]:
        header = unpack(frame[:HEADER_BYTES])._replace(**changes)
        empty = header.flags & NOTHING
        size = 0 if empty else torch.empty(header.shape, dtype=header.dtype, device="meta").nbytes
        size += SEAL_BYTES if header.flags & SEALED else 0
        payload = frame[HEADER_BYTES:].ljust(size, b"\0")[:size]
        return [pack(header._replace(num_bytes=size), payload) + payload]

    return tamper


REFUSED = {
    "another mini-batch": (forged(number=(2, 8)), "`number` (=(2, 8)) must be (2, 7)"),
    "another epoch": (forged(number=(1, 7)), "`number` (=(1, 7)) must be (2, 7)"),
    "another kind": (forged(kind="weights"), "`kind` (=weights) must be gradient"),
    "another shape": (forged(shape=(3, 2)), "`shape` (=(3, 2)) must be (2, 3)"),
    "more dimensions": (forged(shape=(2, 3, 1)), "`shape` (=(2, 3, 1)) must be (2, 3)"),
    "another dtype": (forged(dtype=torch.float16), "`dtype` (=torch.float16) must be torch.float32"),
    "another dtype of the same size": (forged(dtype=torch.int32), "`dtype` (=torch.int32) must be torch.float32"),
    "too long": (forged(shape=(2, 300)), "`num_bytes` (=2400) must be at most 76"),
    "nothing": (forged(flags=NOTHING), "`payload's bytes` (=0) must be 24"),
    "nothing of no shape": (forged(flags=NOTHING, shape=(0,)), "alice0 sent gradient of [0]"),
    "sealed": (forged(flags=SEALED), "what alice0 sends must not be sealed"),
    "another run": (forged(run=bytes(16)), "`run`"),
    "another sender": (forged(sender=2), "`sender` (=2) must be 1"),
    "another receiver": (forged(receiver=2), "`receiver` (=2) must be 0"),
    "one too many before": (forged(sequence=2), "`sequence` (=2) must be 1: those between are missing"),
    "a byte more": (lambda frame: [frame + b"\0"], "`CRC32`"),
    "a byte less": (lambda frame: [frame[:-1]], "`CRC32`"),
    "no payload": (lambda frame: [frame[:HEADER_BYTES]], "`CRC32`"),
    "no header": (lambda frame: [b""], "`length`"),
}


@pytest.mark.parametrize(("tamper", "why"), REFUSED.values(), ids=REFUSED)
def test_a_frame_that_is_not_the_one_awaited_is_refused(tamper, why):
    wires = queued()
    for wire in wires.values():
        wire.number = (2, 7)
    wires["alice0"].transport.tamper = tamper
    wires["alice0"].carry(drawn(2, 3), "alice0", "bob", "gradient")
    with pytest.raises(FrameError) as refused:
        wires["bob"].carry(torch.empty(2, 3, device="meta"), "alice0", "bob", "gradient")
    assert why in str(refused.value)


def test_an_activation_of_another_kind_of_number_is_refused():
    wires = queued()
    wires["alice0"].carry(torch.ones(2, 3, dtype=torch.int32), "alice0", "bob", "activation")
    with pytest.raises(FrameError, match=r"alice0 sent activation of \[2, 3\] torch.int32 for \[2, 3\]"):
        wires["bob"].carry(torch.empty(2, 3, device="meta"), "alice0", "bob", "activation")


@pytest.mark.parametrize(
    ("tamper", "good", "why"),
    [
        (lambda frame: [frame, frame], 1, r"`sequence` \(=1\) must be 2: this one is repeated"),
        (lambda frame: [] if unpack(frame[:HEADER_BYTES]).sequence == 2 else [frame], 1, r"\(=3\) must be 2: those"),
    ],
    ids=["repeated", "missing"],
)
def test_a_frame_that_is_repeated_or_missing_is_refused(tamper, good, why):
    wires = queued()
    wires["alice0"].transport.tamper = tamper
    for _ in range(3):
        wires["alice0"].carry(drawn(3), "alice0", "bob", "weights")
    for _ in range(good):
        wires["bob"].carry(torch.empty(3, device="meta"), "alice0", "bob", "weights")
    with pytest.raises(FrameError, match=why):
        wires["bob"].carry(torch.empty(3, device="meta"), "alice0", "bob", "weights")


def test_weights_may_be_under_way_while_the_mini_batch_changes():
    wires = queued()
    wires["alice0"].number = (2, 7)
    wires["alice0"].carry(drawn(3), "alice0", "bob", "weights")
    assert torch.equal(wires["bob"].carry(torch.empty(3, device="meta"), "alice0", "bob", "weights"), drawn(3))


def flipped(frame: bytes, rng: random.Random) -> bytes:
    altered = bytearray(frame)
    for place in rng.sample(range(8 * len(frame)), rng.randint(1, 8)):
        altered[place // 8] ^= 1 << place % 8
    return bytes(altered)


def truncated(frame: bytes, rng: random.Random) -> bytes:
    return frame[: rng.randrange(len(frame))]


@pytest.mark.parametrize("sealed", [False, True], ids=["open", "sealed"])
@pytest.mark.parametrize(("corrupt", "times"), [(flipped, 200), (truncated, 100)])
def test_whatever_a_frame_is_corrupted_to_it_is_refused(folder, corrupt, times, sealed):
    rng = random.Random(0)
    for _ in range(times):
        wires = sealing(folder) if sealed else queued()
        wires["alice0"].transport.tamper = lambda frame: [corrupt(frame, rng)]
        wires["alice0"].carry(drawn(3, 4), "alice0", "alice1", "gradient")
        with pytest.raises(FrameError):
            wires["alice1"].carry(torch.empty(3, 4, device="meta"), "alice0", "alice1", "gradient")


# ---- gloo


@pytest.mark.parametrize(
    ("shape", "why"),
    [((3, 4), "arrived"), ((300, 4), "FrameError: frame: `num_bytes` (=4800) must be at most 124")],
    ids=["as long as awaited", "longer"],
)
def test_a_message_that_is_longer_than_awaited_is_refused_and_aborts_nobody(ends, shape, why):
    hub, wiring = ends.hub(), GlooWiring()
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=gloo_receiver, args=(hub.port, theirs))
    process.start()
    try:
        parties = ["bob", "alice0"]
        hub.gather(parties, lambda greeting: None, 6 * PATIENCE)
        welcome = {"party": "bob", "parties": parties, **wiring.offer(hub)}
        hub.welcome(welcome)
        sender = RemoteWire("bob")
        sender.connect(wiring.transport(hub, welcome, sender.device), parties, RUN)
        sender.carry(drawn(*shape), "bob", "alice0", "gradient")
        assert ours.poll(PATIENCE)
        assert ours.recv() == why
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def test_where_gloo_meets_is_open_on_the_address_of_the_hub_alone(ends):
    before, wiring = listening(), GlooWiring()
    wiring.offer(ends.hub())
    ours = listening() - before
    assert len(ours) == 2  # the hub, and the store
    assert {address for address, _ in ours} == {"127.0.0.1"}


def test_gloo_listens_on_the_address_of_the_hub_alone(ends, folder):
    before = listening()
    wires = connected(ends, folder, "gloo")
    assert len(wires) < len(listening() - before)  # the hub, and everybody's gloo
    assert {address for address, _ in listening() - before} == {"127.0.0.1"}


def listening() -> set[tuple[str, str]]:
    """Address and port of every TCP socket of this process that listens, as Linux tells."""
    owned, found = set(), set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            owned.add(os.readlink(descriptor))
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in owned:
                address, port = local.split(":")
                found.add(("127.0.0.1" if address.endswith("0100007F") else address, port))
    return found


# ---- Beside


def test_a_tensor_beside_its_header_is_refused_where_none_may_come():
    wires = queued()
    wires["alice0"].transport.direct = "cpu"
    wires["alice0"].transport.send_beside = lambda dst, head, tensor: wires["alice0"].transport.send(dst, head, b"")
    wires["alice0"].carry(drawn(3), "alice0", "bob", "weights")
    with pytest.raises(FrameError, match=r"`flags` \(=8\) of alice0 must not say that the tensor comes beside"):
        wires["bob"].carry(torch.empty(3, device="meta"), "alice0", "bob", "weights")


@pytest.mark.parametrize("flags", [BESIDE | NOTHING, BESIDE | SEALED, BESIDE | WANTS_GRADIENT | NOTHING])
def test_what_comes_beside_is_neither_nothing_nor_sealed(flags):
    wires = queued()
    wires["bob"].transport.direct = "cpu"
    num_bytes = 0 if flags & NOTHING else 12 + SEAL_BYTES
    header = Header(RUN, "weights", 1, 0, 1, torch.float32, (3,), num_bytes, flags=flags)
    wires["alice0"].transport.send("bob", pack(header, b""), b"")
    with pytest.raises(FrameError, match=rf"`flags` \(={flags}\) of alice0"):
        wires["bob"].carry(torch.empty(3, device="meta"), "alice0", "bob", "weights")


def test_a_header_that_changed_on_the_way_is_refused_though_its_tensor_comes_beside():
    wires = queued()
    wires["bob"].transport.direct = "cpu"
    head = bytearray(pack(Header(RUN, "weights", 1, 0, 1, torch.float32, (3,), 12, flags=BESIDE), b""))
    head[40] ^= 1  # the epoch, which weights are not asked for
    wires["alice0"].transport.send("bob", bytes(head), b"")
    with pytest.raises(FrameError, match="`CRC32`"):
        wires["bob"].carry(torch.empty(3, device="meta"), "alice0", "bob", "weights")


def test_all_meet_at_the_start_since_nccl_waits_for_both_ends_of_the_first_send(ends, folder):
    met = {party: wire.transport.beside.met for party, wire in connected(ends, folder, "beside").items()}
    assert met == {"bob": {1, 2}, "alice0": {0, 2}, "alice1": {0, 1}}


def test_weights_that_change_after_they_were_sent_beside_arrive_as_they_were(ends, folder):
    weights, wires, behind = drawn(3), connected(ends, folder, "beside"), []
    transport, send = wires["alice0"].transport, wires["alice0"].transport.send
    transport.send = lambda dst, head, payload: behind.append(len(payload)) or send(dst, head, payload)

    def program(wire: Wire) -> Tensor:
        received = wire.carry(here(wire, "alice0", weights), "alice0", "alice1", "weights")
        return weights.fill_(9) if wire.plays("alice0") else received

    assert torch.equal(together(ends, wires, program)["alice1"], drawn(3))
    assert behind == [0]


def test_nccl_takes_a_gpu_for_each_party():
    with pytest.raises(InputError, match=r"`wire` \(=nccl\) goes from GPU to GPU, and alice0 computes on cpu: set"):
        NcclWiring().gpu("alice0", torch.device("cpu"))
    NcclWiring().check_gpus({"bob": "A", "alice0": "B"})
    with pytest.raises(InputError, match="takes a GPU for each party, and bob and alice1 are on the same, A: start"):
        NcclWiring().check_gpus({"bob": "A", "alice0": "B", "alice1": "A"})


# ---- Sealed


def sealing(folder: Path) -> dict[str, RemoteWire]:
    """The Alices seal what they send each other."""
    wires, own = queued(), load(folder, "alice0", "alice1")
    for party, peer in permutations(own):
        wires[party].seals = {peer: Seal(own[party], own[peer].certificate, peer, RUN)}
    return wires


@pytest.mark.parametrize("wire", ["grpc", "grpc in the clear"])
def test_bob_sees_the_header_alone_of_what_he_passes_on(ends, folder, wire):
    wires, weights, passed = connected(ends, folder, wire), drawn(20, 20), []
    hub, content = ends.stars[0], bytes(payload_of(weights))
    deliver = hub._deliver
    hub._deliver = lambda message, peer: passed.append(message) or deliver(message, peer)
    sent = together(ends, wires, lambda w: w.carry(here(w, "alice0", weights), "alice0", "alice1", "weights"))
    assert torch.equal(sent["alice1"], weights)
    (frame,) = passed
    header = unpack(frame[:HEADER_BYTES])
    assert (header.kind, header.sender, header.receiver, header.shape) == ("weights", 1, 2, (20, 20))
    assert bool(header.flags & SEALED) is (wire == "grpc")
    assert (content in frame, content[:16] in frame) == 2 * (wire != "grpc",)


@pytest.mark.parametrize(("src", "dst"), [("alice0", "bob"), ("bob", "alice0")])
def test_what_is_for_bob_or_from_him_is_not_sealed(ends, folder, src, dst):
    wires = connected(ends, folder, "grpc")
    sealed = {party: list(wire.seals) for party, wire in wires.items()}
    assert sealed == {"bob": [], "alice0": ["alice1"], "alice1": ["alice0"]}
    together(ends, wires, lambda wire: wire.carry(here(wire, src, drawn(3)), src, dst, "weights"))
    assert wires[src].overhead == {"headers": HEADER_BYTES}


@pytest.mark.parametrize(("unsealed", "rule"), [("alice0", "must be sealed"), ("alice1", "must not be sealed")])
def test_who_awaits_a_seal_takes_nothing_else_and_who_does_not_takes_none(folder, unsealed, rule):
    wires = sealing(folder)
    wires[unsealed].seals = {}
    wires["alice0"].carry(drawn(3), "alice0", "alice1", "weights")
    with pytest.raises(FrameError, match=f"what alice0 sends {rule}"):
        wires["alice1"].carry(torch.empty(3, device="meta"), "alice0", "alice1", "weights")


@pytest.mark.parametrize(
    "tamper",
    [
        lambda frame: forged()(frame[:-1] + bytes([frame[-1] ^ 1])),
        lambda frame: forged()(frame[:HEADER_BYTES] + bytes(len(frame))),
        forged(flags=SEALED | WANTS_GRADIENT),
        forged(number=(0, 1)),
    ],
    ids=["a bit", "the whole payload", "flags", "mini-batch"],
)
def test_what_bob_alters_does_not_open(folder, tamper):
    wires = sealing(folder)
    wires["alice0"].transport.tamper = tamper
    wires["alice0"].carry(drawn(3, 4), "alice0", "alice1", "weights")
    with pytest.raises(SealError, match="it or its head was altered"):
        wires["alice1"].carry(torch.empty(3, 4, device="meta"), "alice0", "alice1", "weights")


def test_what_was_sealed_for_another_place_does_not_open(folder):
    """Bob puts the second frame in place of the first."""
    wires = sealing(folder)
    wires["alice0"].transport.tamper = lambda frame: forged(sequence=1)(frame) if frame[39] == 2 else []
    for _ in range(2):
        wires["alice0"].carry(drawn(3), "alice0", "alice1", "weights")
    with pytest.raises(SealError, match="a message cannot be opened as alice0's to alice1"):
        wires["alice1"].carry(torch.empty(3, device="meta"), "alice0", "alice1", "weights")


# ---- How it is secured


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:29400", "127.1.2.3:1", "[::1]:29400"])
@pytest.mark.parametrize("tls", [False, "off"])
def test_in_the_clear_on_loopback(tls, address):
    wiring = GrpcWiring(tls=tls)
    wiring.check(address)
    assert wiring.identity("bob") is None
    assert not wiring.needs_certificates


@pytest.mark.parametrize(
    "address", ["0.0.0.0:29400", "192.0.2.7:1", "bob.example.org:1", "[::]:1", "localhost.example.org:1", "128.0.0.1:1"]
)
def test_in_the_clear_and_not_on_loopback_is_refused(address):
    with pytest.raises(InputError) as refused:
        GrpcWiring(tls=False).check(address)
    assert f"`wire.tls` (=off) talks in the clear, on loopback alone, not at {address}" in str(refused.value)
    for tls in (True, "on"):
        GrpcWiring(tls=tls).check(address)


@pytest.mark.parametrize("tls", ["yes", "", None, 2])
def test_tls_is_on_or_off(tls):
    with pytest.raises(InputError, match=r"`wire.tls` \(=.*\) must be true or false"):
        GrpcWiring(tls=tls)


def test_who_has_no_certificate_is_told_what_makes_one(folder):
    assert GrpcWiring().needs_certificates
    with pytest.raises(InputError, match=r"^`wire.certificates` must .* `python -m splitlearn.certificates --parties"):
        GrpcWiring().identity("bob")
    with pytest.raises(InputError, match=r"carol/ca.crt cannot be read .*`python -m splitlearn.certificates --parties"):
        GrpcWiring(str(folder / "carol")).identity("carol")
    with pytest.raises(InputError, match="the certificate is of alice0, and must be of bob"):
        GrpcWiring(str(folder / "alice0")).identity("bob")
    assert GrpcWiring(str(folder / "bob")).identity("bob") == load(folder, "bob")["bob"]


def test_what_was_sealed_in_an_earlier_attempt_does_not_open_again(folder):
    """Though the hub names the same run, sequence and all: each end brings a number of its own."""

    def seals(nonces=None) -> dict[str, Seal]:
        wirings = {party: GrpcWiring(str(folder / party)) for party in PARTIES}
        shown = {party: wiring.identity(party).certificate.decode() for party, wiring in wirings.items()}
        told = nonces or {party: wiring.nonce.hex() for party, wiring in wirings.items()}
        seen.append(told)
        welcome = {"run": RUN.hex(), "certificates": shown, "nonces": told}
        stars = {party: SimpleNamespace(parties=list(PARTIES), party=party) for party in PARTIES}
        return {party: wiring.seals(stars[party], welcome) for party, wiring in wirings.items()}

    seen: list[dict[str, str]] = []
    first, second, played_again = seals(), seals(), seals(nonces=seen[0])
    sealed = first["alice0"]["alice1"].seal(b"weights", b"head")
    assert first["alice1"]["alice0"].open(sealed, b"head") == b"weights"
    for later in (second, played_again):
        with pytest.raises(SealError):
            later["alice1"]["alice0"].open(sealed, b"head")

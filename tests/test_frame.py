"""A frame comes out as it went in, or is refused."""

import math
import random
import tracemalloc
from zlib import crc32

import pytest
import torch

from splitlearn.federation.frame import (
    BESIDE,
    HEADER_BYTES,
    NOTHING,
    SEAL_BYTES,
    SEALED,
    WANTS_GRADIENT,
    Expected,
    FrameError,
    Header,
    check,
    pack,
    payload_of,
    tensor_of,
    unpack,
    verify,
)
from splitlearn.ledger import KINDS

RUN = bytes(range(16))
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
HEADER = Header(RUN, "activation", 0, 1, 5, torch.float32, (2, 3), 24, (3, 7), WANTS_GRADIENT)
EXPECTED = Expected(RUN, 0, 1, 5, "activation", 1024, (2, 3), torch.float32, (3, 7))
PAYLOAD = bytes(range(24))
HEAD = pack(HEADER, PAYLOAD)


def header_of(tensor: torch.Tensor) -> Header:
    return HEADER._replace(dtype=tensor.dtype, shape=tuple(tensor.shape), num_bytes=payload_of(tensor).nbytes)


def forged(offset: int, content: bytes, head: bytes = HEAD, payload: bytes = PAYLOAD) -> bytes:
    """A header in which `content` stands at `offset`, with a CRC that fits."""
    fields = (head[:offset] + content + head[offset + len(content) :])[:-4]
    return fields + crc32(payload, crc32(fields)).to_bytes(4, "big")


def receive(head: bytes, payload: bytes, expected: Expected = EXPECTED) -> torch.Tensor:
    header = unpack(head)
    check(header, expected)
    verify(head, payload)
    return tensor_of(header, payload)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (3, 0, 2), (2, 3, 5), (1,) * 8])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool], ids=str)
def test_every_tensor_comes_out_as_it_went_in(dtype, shape):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    header, payload = header_of(tensor), payload_of(tensor)
    head = pack(header, payload)
    assert len(head) == HEADER_BYTES
    assert unpack(head) == header
    received = receive(head, bytearray(payload), EXPECTED._replace(shape=shape, dtype=dtype))
    assert received.dtype == dtype
    assert received.shape == shape
    assert torch.equal(received, tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_out_as_it_went_in(kind):
    header = HEADER._replace(kind=kind, sender=2**16 - 1, sequence=2**64 - 1, number=(2**32 - 1, 0))
    assert unpack(pack(header, PAYLOAD)) == header


def test_a_header_as_it_stands_on_the_wire():
    wire = bytes.fromhex(
        "53504c54 0001 0080"  # SPLT, version, header's length
        "00 00 0001"  # activation, no phase, wants a gradient
        "000102030405060708090a0b0c0d0e0f"  # run
        "0000 0001 0000000000000005"  # sender, receiver, sequence
        "00000003 00000007"  # epoch, mini-batch
        "00 00 00 02"  # no cut, no codec, float32, two dimensions
        "0000000000000002 0000000000000003" + 6 * "0000000000000000" + "0000000000000018 3c2b73a1"  # bytes, CRC32
    )
    assert wire == HEAD


def test_the_codes_of_kinds_and_dtypes_stay():
    kinds = "activation gradient label weights weight_gradient optimizer_state metric control"
    for code, kind in enumerate(kinds.split()):
        assert pack(HEADER._replace(kind=kind), PAYLOAD)[8] == code
    for code, dtype in enumerate((*FLOATS, *INTEGERS, torch.bool)):
        assert pack(HEADER._replace(dtype=dtype, shape=(0,), num_bytes=0), b"")[50] == code


def test_a_header_costs_little():
    assert HEADER_BYTES / payload_of(torch.zeros(64, 640)).nbytes <= 0.005


def test_a_tensor_in_one_piece_is_not_copied():
    tensor = torch.zeros(4, requires_grad=True)
    payload = payload_of(tensor)
    tensor.data.fill_(1)
    assert bytes(payload) == bytes(payload_of(torch.ones(4)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.ones(3).expand(2, 3),
        torch.arange(9.0)[2:5],
        torch.arange(9.0)[3:5:2],
        torch.tensor([1 + 2j]).conj().imag,
    ],
    ids=["transposed", "expanded", "a part", "one of two", "negated"],
)
def test_a_tensor_may_lie_as_it_likes(tensor):
    assert torch.equal(tensor_of(header_of(tensor), payload_of(tensor)), tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bytes_of_a_tensor_on_a_gpu_are_those_of_its_values():
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert bytes(payload_of(tensor.cuda())) == bytes(payload_of(tensor))


def test_a_tensor_lies_over_its_payload():
    payload = bytearray(24)
    tensor = tensor_of(HEADER, memoryview(payload))
    tensor.fill_(1)
    assert payload == bytes(payload_of(torch.ones(2, 3)))


def test_a_payload_that_is_read_only_is_copied():
    payload = bytes(24)
    tensor_of(HEADER, payload).fill_(1)
    assert payload == bytes(24)


@pytest.mark.parametrize("flags", [NOTHING, NOTHING | SEALED])
def test_nothing_has_no_payload_whatever_its_shape(flags):
    header = HEADER._replace(num_bytes=0, flags=flags)
    assert unpack(pack(header, b"")) == header
    check(header, EXPECTED._replace(shape=(9,), dtype=torch.bool))
    with pytest.raises(FrameError, match=r"`payload's bytes` \(=0\) must be 24"):
        tensor_of(header, b"")


def test_a_sealed_payload_is_longer():
    header = HEADER._replace(num_bytes=24 + SEAL_BYTES, flags=SEALED)
    assert unpack(pack(header, bytes(52))) == header
    with pytest.raises(FrameError, match=r"`num_bytes` \(=24\) must be 52"):
        pack(header._replace(num_bytes=24), PAYLOAD)
    with pytest.raises(FrameError, match=r"`payload's bytes` \(=52\) must be 24"):
        tensor_of(header, bytes(52))


def test_a_payload_that_goes_beside_is_not_looked_at():
    header = HEADER._replace(flags=BESIDE)
    head = pack(header, b"")
    assert unpack(head) == header
    verify(head, b"")
    with pytest.raises(FrameError, match="`CRC32`"):
        verify(head[:40] + b"\1" + head[41:], b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": b"short"}, r"`run's bytes` \(=5\) must be 16"),
        ({"kind": "secret"}, r"`kind` \(=secret\) must be one of activation, gradient"),
        ({"dtype": torch.complex64}, r"`dtype` \(=torch.complex64\) must be one of torch.float32"),
        ({"shape": (1,) * 9}, r"`dimensions` \(=9\) must be at most 8"),
        ({"shape": (-2, -3)}, r"`shape` \(=\(-2, -3\)\) must be of no negative number"),
        ({"shape": (2, 4)}, r"`num_bytes` \(=24\) must be 32"),
        ({"num_bytes": 25}, r"`num_bytes` \(=25\) must be 24"),
        ({"flags": 16}, r"`flags` \(=16\) must be a sum of some of 1, 2, 4 and 8"),
        ({"sender": 2**16}, "frame: sender, receiver, sequence"),
        ({"sequence": -1}, "frame: sender, receiver, sequence"),
        ({"number": (1, 2, 3)}, "frame: sender, receiver, sequence"),
    ],
)
def test_what_would_be_refused_is_not_packed(change, message):
    with pytest.raises(FrameError, match=message):
        pack(HEADER._replace(**change), PAYLOAD)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"HTTP", r"`magic` \(=48545450\) must be 53504c54"),
        (4, b"\0\2", r"`version` \(=2\) must be 1"),
        (6, b"\0\x40", r"`header's length` \(=64\) must be 128"),
        (9, b"\1", r"`phase, cut and codec` \(=\(1, 0, 0\)\) must be \(0, 0, 0\)"),
        (48, b"\1", r"`phase, cut and codec` \(=\(0, 1, 0\)\) must be \(0, 0, 0\)"),
        (49, b"\1", r"`phase, cut and codec` \(=\(0, 0, 1\)\) must be \(0, 0, 0\)"),
        (8, b"\x09", r"`kind's code` \(=9\) must be at most 8"),
        (50, b"\x0a", r"`dtype's code` \(=10\) must be at most 9"),
        (51, b"\x09", r"`dimensions` \(=9\) must be at most 8"),
        (52, b"\xff", r"`shape` \(=\(-\d+, 3\)\) must be of no negative number"),
        (115, b"\1", r"`unused dimensions` \(=1\) must be 0"),
        (51, b"\1", r"`unused dimensions` \(=1\) must be 0"),
        (10, b"\0\x10", r"`flags` \(=16\) must be a sum of some of 1, 2, 4 and 8"),
        (52, b"\x7f", r"`shape` \(=.*\) must be of fewer than 2\*\*63 bytes"),
        (59, b"\1", r"`num_bytes` \(=24\) must be 12"),
        (116, b"\1", r"`num_bytes` \(=\d+\) must be 24"),
        (11, bytes([NOTHING]), r"`num_bytes` \(=24\) must be 0"),
        (11, bytes([SEALED]), r"`num_bytes` \(=24\) must be 52"),
    ],
)
def test_a_header_that_can_never_be_right_is_refused(offset, content, message):
    with pytest.raises(FrameError, match=message):
        unpack(forged(offset, content))


@pytest.mark.parametrize("length", [0, 127, 129])
def test_a_header_of_another_length_is_refused(length):
    with pytest.raises(FrameError, match=rf"`length` \(={length}\) must be 128"):
        unpack((HEAD + b"\0")[:length])


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"run": bytes(16)}, r"`run` \(=0001.*0f\) must be 0{32}$"),
        ({"sender": 1}, r"`sender` \(=0\) must be 1"),
        ({"receiver": 0}, r"`receiver` \(=1\) must be 0"),
        ({"sequence": 6}, r"`sequence` \(=5\) must be 6: this one is repeated"),
        ({"sequence": 3}, r"`sequence` \(=5\) must be 3: those between are missing"),
        ({"kind": "gradient"}, r"`kind` \(=activation\) must be gradient"),
        ({"number": (3, 8)}, r"`number` \(=\(3, 7\)\) must be \(3, 8\)"),
        ({"limit": 23}, r"`num_bytes` \(=24\) must be at most 23"),
        ({"dtype": torch.float16}, r"`dtype` \(=torch.float32\) must be torch.float16"),
        ({"shape": (3, 2)}, r"`shape` \(=\(2, 3\)\) must be \(3, 2\)"),
    ],
)
def test_a_frame_that_is_not_the_one_expected_is_refused(expected, message):
    with pytest.raises(FrameError, match=message):
        check(HEADER, EXPECTED._replace(**expected))


def test_the_checks_come_in_their_order():
    wrong = Expected(bytes(16), 8, 9, 9, "label", 1, (1,), torch.bool, (0, 0))._asdict()
    for field in ("run", "sender", "receiver", "sequence", "kind", "number", "limit", "dtype", "shape"):
        told = "num_bytes" if field == "limit" else field
        with pytest.raises(FrameError, match=f"frame: `{told}`"):
            check(HEADER, EXPECTED._replace(**wrong))
        del wrong[field]
    assert wrong == {}


def test_what_is_not_said_is_not_checked():
    check(HEADER, Expected(RUN, 0, 1, 5, "activation", 24))


@pytest.mark.parametrize(("head", "payload"), [(HEAD, PAYLOAD[:-1]), (HEAD, b"\1" + PAYLOAD[1:]), (HEAD[:99], b"")])
def test_what_changed_on_the_way_is_refused(head, payload):
    with pytest.raises(FrameError, match=r"`CRC32` \(=\d+\) must be \d+"):
        verify(head, payload)


def flipped(rng: random.Random) -> tuple[bytes, bytes]:
    frame = bytearray(HEAD + PAYLOAD)
    for place in rng.sample(range(8 * len(frame)), rng.randint(1, 8)):
        frame[place // 8] ^= 1 << place % 8
    return bytes(frame[:HEADER_BYTES]), bytes(frame[HEADER_BYTES:])


def of_another_length(rng: random.Random) -> tuple[bytes, bytes]:
    """Header or payload is longer or shorter; or the header says so, with a CRC that fits."""
    cut = rng.randrange(24)
    longer = PAYLOAD + rng.randbytes(rng.randint(1, 99))
    says = rng.choice([*range(24), *range(25, 99), 2**40, 2**64 - 1]).to_bytes(8, "big")
    return rng.choice([(HEAD[:cut], PAYLOAD), (HEAD, PAYLOAD[:cut]), (HEAD, longer), (forged(116, says), PAYLOAD)])


def out_of_turn(rng: random.Random) -> tuple[bytes, bytes]:
    sequence = rng.choice([1, 4, 6, rng.randrange(7, 2**64)])
    return pack(HEADER._replace(sequence=sequence), PAYLOAD), PAYLOAD


def huge(rng: random.Random) -> tuple[bytes, bytes]:
    """A shape of up to 2**440 values; its bytes as they are, or modulo 2**64, or as this frame's."""
    shape = [rng.choice([0, 2**31, 2**32, 2**55]) for _ in range(rng.randint(1, 8))]
    num_bytes = rng.choice([4 * math.prod(shape) % 2**64, 24])
    fields = bytes([len(shape)]) + b"".join(size.to_bytes(8, "big") for size in shape + [0] * (8 - len(shape)))
    return forged(51, fields + num_bytes.to_bytes(8, "big")), PAYLOAD


def of_another_version(rng: random.Random) -> tuple[bytes, bytes]:
    return forged(4, rng.choice([0, *range(2, 2**16)]).to_bytes(2, "big")), PAYLOAD


def of_another_run(rng: random.Random) -> tuple[bytes, bytes]:
    return pack(HEADER._replace(run=rng.randbytes(16)), PAYLOAD), PAYLOAD


def of_other_parties(rng: random.Random) -> tuple[bytes, bytes]:
    sender, receiver = rng.choice([(1, 0), (0, 0), (1, 1), (0, 2)])
    return pack(HEADER._replace(sender=sender, receiver=receiver), PAYLOAD), PAYLOAD


@pytest.mark.parametrize(
    ("corrupt", "times"),
    [
        *((flipped, 400), (of_another_length, 150), (out_of_turn, 100), (huge, 200)),
        *((of_another_version, 50), (of_another_run, 50), (of_other_parties, 50)),
    ],
)
def test_a_thousand_corrupt_frames_are_refused_and_take_no_memory(corrupt, times):
    rng = random.Random(0)
    frames = [corrupt(rng) for _ in range(times)]
    tracemalloc.start()
    try:
        for head, payload in frames:
            with pytest.raises(FrameError):
                receive(head, payload)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_refused_was_right_before():
    assert torch.equal(receive(HEAD, PAYLOAD), torch.frombuffer(bytearray(PAYLOAD), dtype=torch.float32).view(2, 3))

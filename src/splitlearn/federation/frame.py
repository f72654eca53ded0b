"""What crosses between processes: a header of 128 bytes, then the raw bytes of a tensor. Nothing is ever unpickled.

    0 magic       4 version    6 header's length    8 kind    9 phase*    10 flags    12 run    28 sender    30 receiver
    32 sequence   40 epoch     44 mini-batch        48 cut*   49 codec*   50 dtype    51 dimensions
    52 shape, 8 numbers        116 payload's bytes  124 CRC32 of all before it and of the payload

The header is big-endian, the payload as a little-endian machine keeps it. What bears a star is reserved, and zero.
A payload that goes BESIDE, from GPU to GPU, is not looked at: the CRC is then of the header alone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from isal.isal_zlib import crc32  # the one of zlib, 17 times as fast
from torch import Tensor

from splitlearn.ledger import KINDS

HEADER_BYTES = 128
MAGIC = b"SPLT"
VERSION = 1
WANTS_GRADIENT, NOTHING, SEALED, BESIDE = 1, 2, 4, 8
SEAL_BYTES = 28  # of nonce and tag

RUN_BYTES = 16
MOST_DIMENSIONS = 8
FLAGS = WANTS_GRADIENT | NOTHING | SEALED | BESIDE
FIELDS = struct.Struct(f">4sHHBBH{RUN_BYTES}sHHQIIBBBB{MOST_DIMENSIONS}qQ")  # all but the CRC
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)  # the place is the code: append only
KIND_CODES = {kind: code for code, kind in enumerate(KINDS)}
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
Bytes = bytes | bytearray | memoryview


class FrameError(RuntimeError):
    """A frame is not what it should be. The message names the field, the value received and what was expected."""


class Header(NamedTuple):
    """What a payload is, and its place in the run.

    Arguments:
        run: the run's own 16 bytes.
        kind: one of `ledger.KINDS`.
        sender, receiver: places in the run's list of parties, in [0, 2**16).
        sequence: of the frames from this sender to this receiver, from 1.
        dtype, shape: of the tensor, at most 8 dimensions.
        num_bytes: of the payload.
        number: epoch and mini-batch.
        flags: the sum of some of
            WANTS_GRADIENT (an answer is awaited),
            NOTHING (there is no payload, whatever the shape),
            SEALED (the payload is encrypted, hence SEAL_BYTES longer),
            BESIDE (the payload goes another way than the header).
    """

    run: bytes
    kind: str
    sender: int
    receiver: int
    sequence: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    number: tuple[int, int] = (0, 0)
    flags: int = 0


class Expected(NamedTuple):
    """What the receiver awaits now: `limit` is the most bytes of payload that it takes, None allows any."""

    run: bytes
    sender: int
    receiver: int
    sequence: int
    kind: str
    limit: int
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    number: tuple[int, int] | None = None


def payload_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor of any shape: its own memory, or a copy where that is strided or on a device.

    A GPU copies into pinned memory, to which it is fastest.
    """
    here = tensor.detach()
    if here.is_cuda:
        here = torch.empty(here.shape, dtype=here.dtype, pin_memory=True).copy_(here)
    whole = here.cpu().contiguous().resolve_neg()
    flat = whole.as_strided((whole.numel(),), (1,))  # one value alone is contiguous with any stride
    return flat.view(torch.uint8).numpy().data


def tensor_of(header: Header, payload: Bytes) -> Tensor:
    """Return a writable tensor of the header's shape and dtype, on the CPU, over the payload's memory.

    A payload that is read-only is copied. Raises FrameError when it has not the bytes of that shape: open a sealed one
    first.
    """
    view = memoryview(payload)
    _expect("payload's bytes", view.nbytes, prod(header.shape) * header.dtype.itemsize)
    if not view.nbytes:  # torch takes no empty buffer
        return torch.empty(header.shape, dtype=header.dtype)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=header.dtype).reshape(header.shape)


def pack(header: Header, payload: Bytes) -> bytes:
    """Return the 128 bytes that go before the payload.

    Raises FrameError for a header that `unpack` would refuse, and where `num_bytes` is not the payload's length. Of a
    payload that goes beside, `payload` is empty.
    """
    if not header.flags & BESIDE:
        _expect("num_bytes", header.num_bytes, memoryview(payload).nbytes)
    _expect("run's bytes", len(header.run), RUN_BYTES)
    kind, dtype = _code("kind", header.kind, KIND_CODES), _code("dtype", header.dtype, DTYPE_CODES)
    ndim = len(header.shape)
    _check_dimensions(ndim, header.shape)
    _check_size(header)
    shape = header.shape + (0,) * (MOST_DIMENSIONS - ndim)
    who = header.sender, header.receiver, header.sequence, *header.number
    try:
        fields = FIELDS.pack(
            *(MAGIC, VERSION, HEADER_BYTES, kind, 0, header.flags, header.run),
            *(*who, 0, 0, dtype, ndim, *shape, header.num_bytes),
        )
    except struct.error as error:
        raise FrameError(f"frame: sender, receiver, sequence, epoch or mini-batch of {header}: {error}") from error
    return fields + crc32(payload, crc32(fields)).to_bytes(4, "big")


def unpack(head: Bytes) -> Header:
    """Return what 128 bytes say. Raises FrameError for all that is wrong whatever was expected; the CRC is `verify`'s.

    Takes no memory for the payload.
    """
    _expect("length", len(head), HEADER_BYTES)
    magic, version, length, kind, phase, flags, run, *rest = FIELDS.unpack_from(head)
    sender, receiver, sequence, epoch, batch, cut, codec, dtype, ndim, *shape, num_bytes = rest
    _expect("magic", magic, MAGIC)
    _expect("version", version, VERSION)
    _expect("header's length", length, HEADER_BYTES)
    _expect("phase, cut and codec", (phase, cut, codec), (0, 0, 0))
    _at_most("kind's code", kind, len(KINDS) - 1)
    _at_most("dtype's code", dtype, len(DTYPES) - 1)
    _check_dimensions(ndim, tuple(shape[:ndim]))
    _expect("unused dimensions", sum(map(bool, shape[ndim:])), 0)
    header = Header(
        *(run, KINDS[kind], sender, receiver, sequence),
        *(DTYPES[dtype], tuple(shape[:ndim]), num_bytes, (epoch, batch), flags),
    )
    _check_size(header)
    return header


def check(header: Header, expected: Expected) -> None:
    """Raises FrameError, before memory is taken, for a frame that is not the one expected now."""
    _expect("run", header.run, expected.run)
    _expect("sender", header.sender, expected.sender)
    _expect("receiver", header.receiver, expected.receiver)
    if header.sequence != expected.sequence:
        fault = "this one is repeated" if header.sequence < expected.sequence else "those between are missing"
        raise FrameError(f"frame: `sequence` (={header.sequence}) must be {expected.sequence}: {fault}")
    _expect("kind", header.kind, expected.kind)
    if expected.number is not None:
        _expect("number", header.number, expected.number)
    _at_most("num_bytes", header.num_bytes, expected.limit)
    if header.flags & NOTHING:
        return
    if expected.dtype is not None:
        _expect("dtype", header.dtype, expected.dtype)
    if expected.shape is not None:
        _expect("shape", header.shape, expected.shape)


def verify(head: Bytes, payload: Bytes) -> None:
    """Raises FrameError when header or payload changed on the way."""
    received = int.from_bytes(head[FIELDS.size :], "big")
    _expect("CRC32", received, crc32(payload, crc32(head[: FIELDS.size])))


def _check_dimensions(ndim: int, shape: tuple[int, ...]) -> None:
    _at_most("dimensions", ndim, MOST_DIMENSIONS)
    if min(shape, default=0) < 0:
        raise _refusal("shape", shape, "of no negative number")


def _check_size(header: Header) -> None:
    if header.flags & ~FLAGS:
        raise _refusal("flags", header.flags, f"a sum of some of {WANTS_GRADIENT}, {NOTHING}, {SEALED} and {BESIDE}")
    width = header.dtype.itemsize
    if prod(size or 1 for size in header.shape) * width >= 2**63:  # torch multiplies beyond a 0 for the strides
        raise _refusal("shape", header.shape, "of fewer than 2**63 bytes")
    num_bytes = prod(header.shape) * width + (SEAL_BYTES if header.flags & SEALED else 0)
    _expect("num_bytes", header.num_bytes, 0 if header.flags & NOTHING else num_bytes)


def _code(field: str, value: object, codes: Mapping[Any, int]) -> int:
    if value not in codes:
        raise _refusal(field, value, f"one of {', '.join(map(str, codes))}")
    return codes[value]


def _at_most(field: str, value: int, limit: int) -> None:
    if value > limit:
        raise _refusal(field, value, f"at most {limit}")


def _expect(field: str, value: object, expected: object) -> None:
    if value != expected:
        raise _refusal(field, value, expected)


def _refusal(field: str, value: object, rule: object) -> FrameError:
    value, rule = (part.hex() if isinstance(part, bytes) else part for part in (value, rule))
    return FrameError(f"frame: `{field}` (={value}) must be {rule}")

"""The wire between processes: the same `carry`, for one party, over a transport."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from splitlearn.errors import DivergedError, UnsentError, outside
from splitlearn.federation.boxes import AHEAD
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
from splitlearn.federation.sealing import Seal
from splitlearn.federation.transports import Transport
from splitlearn.layout import Party, Role
from splitlearn.ledger import is_alice
from splitlearn.training.finite import is_finite
from splitlearn.wire import SERVER, Message, Wire, elsewhere

LARGEST_NOTE = 2**24  # bytes of JSON that one party may tell another
SHOWN = 80  # characters of what another party sent
MOST_KEYS = 16  # of an optimizer's state for a parameter
WIDEST = 8  # bytes of an element, whatever the precision
WITH_ARTICLE = {"activation": "an activation", "gradient": "a gradient", "label": "a label"}
IN_STEP = ("activation", "gradient", "label")  # belong to the mini-batch at hand; weights may be under way for longer


class RemoteWire(Wire):
    """The wire of one party, whose process plays nobody else.

    `overhead` counts the bytes that the simulator has not: headers, seals, and what is told of metrics; `seconds` are
    those of `waiting` for others, and of work on the `wire`.
    """

    def __init__(self, party: Party) -> None:
        super().__init__()
        self.party: Party = party
        self.device = torch.device("cpu")  # where what arrives goes
        self.overhead: Counter[str] = Counter()
        self.seconds = {"waiting": 0.0, "wire": 0.0}
        self.awaited: tuple[Party, float] | None = None  # whose frame, and since when by `time.perf_counter`
        self.sent: Counter[Party] = Counter()
        self.received: Counter[Party] = Counter()
        self.ahead: Counter[tuple[Party, Party]] = Counter()  # bytes (src, dst) since the last ones the other way

    def connect(
        self, transport: Transport, parties: Sequence[Party], run: bytes, seals: Mapping[Party, Seal] | None = None
    ) -> None:
        """Begin. `parties` are all, the hub first; `run` is 16 bytes that all share; `seals` are for who needs one."""
        self.transport, self.parties, self.run, self.seals = transport, list(parties), run, seals or {}
        self.places = {party: i for i, party in enumerate(parties)}

    def plays(self, party: Party) -> bool:
        return party == self.party

    def hosts(self, role: Role) -> bool:
        return role == self.party or (role == "alice" and (is_alice(self.party) or self.party == SERVER))

    def _move(self, tensor: Tensor, src: Party, dst: Party, kind: str) -> Tensor:
        if src == self.party:
            sent = self._heard(Message(src, dst, kind, tensor.detach())) if self.taps else tensor.detach()
            if not is_finite(sent):
                raise UnsentError(f"{src} has {self._named(kind)} for {dst} that is not finite", src)
            wants = WANTS_GRADIENT if kind == "activation" and tensor.requires_grad else 0
            self._send(sent, dst, kind, wants)
            self.ledger.add(src, dst, kind, sent.nbytes)
        elif dst == self.party:
            return self._arrived(tensor, src, kind)
        return elsewhere(tuple(tensor.shape), tensor.dtype)

    def carry_all(self, tensors: Mapping[str, Tensor], src: Party, dst: Party, kind: str) -> dict[str, Tensor]:
        if src == self.party:
            self._tell(list(tensors), dst)
            for tensor in tensors.values():
                self.carry(tensor, src, dst, kind)
        elif dst == self.party:
            names = self._hear(src)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise FrameError(f"{src} sent no list of names, but {outside(names, SHOWN)}")
            _check_names(names, tensors, src, kind)
            return {name: self._arrived(_like(tensors, name), src, kind, name in tensors) for name in names}
        return {}

    def gather(self, values: Any) -> list[Any]:
        hub, *others = self.parties
        if self.party != hub:
            self._tell(values, hub)
            return self._hear(hub)
        told = [json.loads(json.dumps(values)), *(self._hear(party) for party in others)]  # as the others get it
        for party in others:
            self._tell(told, party)
        return told

    def gather_by_alice(self, values: Mapping[Party, Any], holder: Role) -> dict[Party, Any]:
        told = [(party, _checked(party, each)) for party, each in self._told(values, holder)]
        return {a: value for party, each in told for a, value in each.items() if holder != "alice" or party == a}

    def gather_held(self, values: Any, holder: Role) -> list[Any]:
        return [_checked(party, each) for party, each in self._told(values, holder)]

    def _told(self, values: Any, holder: Role) -> list[tuple[Party, Any]]:
        told = zip(self.parties, self.gather(values), strict=True)
        return [(party, each) for party, each in told if party == holder or (holder == "alice" and is_alice(party))]

    @property
    def _number(self) -> tuple[int, int]:
        return self.number[0], self.number[1]

    def _arrived(self, like: Tensor, src: Party, kind: str, exact: bool = True) -> Tensor:
        """Receive what has the shape of `like`, or, of an optimizer's state, may be a number."""
        dtype = like.dtype if exact and kind != "activation" else None
        limit = WIDEST * max(like.numel(), 1) + SEAL_BYTES
        flags, received = self._receive(src, kind, limit, tuple(like.shape) if exact else None, dtype)
        if received.is_floating_point() != like.is_floating_point() or received.shape not in (like.shape, ()):
            raise FrameError(f"{src} sent {kind} of {list(received.shape)} {received.dtype} for {list(like.shape)}")
        if not is_finite(received):
            raise DivergedError(f"{src} sent {self.party} {self._named(kind)} that is not finite: look there")
        received = received if kind == "optimizer_state" else received.to(self.device)
        if self.taps:
            received = self._heard(Message(src, self.party, kind, received))
        self.ledger.add(src, self.party, kind, received.nbytes)
        return received.requires_grad_(bool(flags & WANTS_GRADIENT)) if kind == "activation" else received

    def _named(self, kind: str) -> str:
        epoch, batch = self._number
        return f"{WITH_ARTICLE.get(kind, kind)} of mini-batch {batch} of epoch {epoch}"

    def _tell(self, values: Any, dst: Party) -> None:
        note = json.dumps(values).encode()
        self.overhead["notes"] += len(note)
        self._send(torch.frombuffer(bytearray(note), dtype=torch.uint8), dst, "control")

    def _hear(self, src: Party) -> Any:
        _, note = self._receive(src, "control", LARGEST_NOTE, None, torch.uint8)
        try:
            return json.loads(note.numpy().tobytes())
        except (ValueError, RecursionError) as error:
            raise FrameError(f"what {src} tells cannot be read: {error}") from error

    def _keep_pace(self, src: Party, dst: Party, num_bytes: int) -> None:
        """Both ends count alike: who has sent much without an answer waits for one, so that memory is bounded."""
        self.ahead[dst, src], self.ahead[src, dst] = 0, self.ahead[src, dst] + num_bytes
        if self.ahead[src, dst] > AHEAD:
            self.ahead[src, dst] = 0
            if src == self.party:
                self._hear(dst)
            else:
                self._tell("go on", src)

    def _send(self, tensor: Tensor, dst: Party, kind: str, flags: int = 0) -> None:
        began = time.perf_counter()
        self.sent[dst] += 1
        beside = tensor.device.type == self.transport.direct and tensor.numel() > 0
        payload: memoryview | bytes = b"" if beside else payload_of(tensor)
        me, number = self.places[self.party], self._number if kind in IN_STEP else (0, 0)
        shape = tuple(tensor.shape)
        flags |= BESIDE if beside else 0
        header = Header(
            *(self.run, kind, me, self.places[dst], self.sent[dst], tensor.dtype, shape, tensor.nbytes, number, flags)
        )
        if dst in self.seals:
            payload = self.seals[dst].seal(payload, _unsealed(header))
            header = header._replace(num_bytes=len(payload), flags=flags | SEALED)
            self.overhead["seals"] += SEAL_BYTES
        self.overhead["headers"] += HEADER_BYTES
        head = pack(header, payload)
        if beside:
            self.transport.send_beside(dst, head, tensor)
        else:
            self.transport.send(dst, head, payload)
        self.seconds["wire"] += time.perf_counter() - began
        self._keep_pace(self.party, dst, HEADER_BYTES + header.num_bytes)

    def _receive(
        self, src: Party, kind: str, limit: int, shape: tuple[int, ...] | None, dtype: torch.dtype | None
    ) -> tuple[int, Tensor]:
        """Return flags and tensor of the next frame, which must be this one. Nothing is taken into memory unchecked."""
        began = time.perf_counter()
        self.received[src] += 1
        self.awaited = src, began
        head = self.transport.receive_head(src)
        self.awaited = None
        arrived = time.perf_counter()
        header = unpack(head)
        number = self._number if kind in IN_STEP else None
        who = self.places[src], self.places[self.party], self.received[src]
        check(header, Expected(self.run, *who, kind, limit, shape, dtype, number))
        tensor = self._beside(src, head, header) if header.flags & BESIDE else self._behind(src, head, header)
        self.seconds["waiting"] += arrived - began
        self.seconds["wire"] += time.perf_counter() - arrived
        self._keep_pace(src, self.party, HEADER_BYTES + header.num_bytes)
        return header.flags, tensor

    def _behind(self, src: Party, head: bytes, header: Header) -> Tensor:
        """What comes behind its header."""
        payload = self.transport.receive_payload(src, header.num_bytes)
        verify(head, payload)
        if bool(header.flags & SEALED) != (src in self.seals):
            raise FrameError(f"frame: what {src} sends must {'be' if src in self.seals else 'not be'} sealed")
        if src in self.seals:
            payload = self.seals[src].open(payload, _unsealed(header))
        return tensor_of(header._replace(num_bytes=len(payload)), payload)

    def _beside(self, src: Party, head: bytes, header: Header) -> Tensor:
        """What comes beside its header, from device to device."""
        verify(head, b"")
        if self.device.type != self.transport.direct or header.flags & ~(BESIDE | WANTS_GRADIENT):
            raise FrameError(f"frame: `flags` (={header.flags}) of {src} must not say that the tensor comes beside")
        tensor = torch.empty(header.shape, dtype=header.dtype, device=self.device)
        self.transport.receive_beside(src, tensor)
        return tensor


def _unsealed(header: Header) -> bytes:
    """What a seal is bound to: the header as it was before, without a payload."""
    return pack(header._replace(num_bytes=0, flags=(header.flags | NOTHING) & ~SEALED), b"")


def _like(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """What an arriving tensor should look like: `0/exp_avg`, of an optimizer's state, like parameter `0`."""
    return tensors[name] if name in tensors else tensors[name.partition("/")[0]]


def _check_names(names: list[str], tensors: Mapping[str, Tensor], src: Party, kind: str) -> None:
    """Weights must all be there; gradients may be fewer; of an optimizer's state are some keys for each parameter."""
    known = [name.rpartition("/")[0] if kind == "optimizer_state" else name for name in names]
    if kind == "weights" and set(names) != set(tensors):
        others = outside(", ".join(sorted(set(names) ^ set(tensors))), SHOWN)
        raise FrameError(f"{src} sent weights of other names than {', '.join(tensors)}: {others}")
    if odd := sorted({*known} - {*tensors}):
        raise FrameError(f"{src} sent {kind} of `{outside(odd[0], SHOWN)}`, which is none of {', '.join(tensors)}")
    if len({*names}) < len(names) or len(names) > MOST_KEYS * len(tensors):
        raise FrameError(f"{src} sent {kind} of {len(names)} names, too many or some twice")


def _checked(party: Party, values: Any) -> Any:
    """Raises FrameError for sums that are not numbers, by name or in lists."""
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list) else None
    if parts is None:
        raise FrameError(f"{party} sent {outside(values, 40)} where sums by name are due")
    for part in parts:
        if isinstance(part, (dict, list)):
            _checked(party, part)
        elif isinstance(part, bool) or not isinstance(part, (int, float)) or not math.isfinite(part):
            raise FrameError(f"{party} sent {outside(part, 40)} where a number is due")
    return values

"""What is between two parties: every tensor that one sends another goes through `Wire.carry`.

The program is written once, for all parties, and a process runs the lines of those that it plays. What another process
holds is a meta tensor here: its shape is known, its content is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from splitlearn.layout import Party, Role
from splitlearn.ledger import KINDS, Ledger

SERVER = "server"
"""The party that keeps, hands on and averages the weights of the Alices (SplitFed's fed server). It sees no data."""


class Message(NamedTuple):
    """One tensor on its way from `src` to `dst`; `kind` is one of `ledger.KINDS`."""

    src: Party
    dst: Party
    kind: str
    tensor: Tensor


class Tap(Protocol):
    """Sits at one party and hears a copy of what that party sends or receives.

    `hear` may return a tensor, which then goes out instead; only what its own party sends may be replaced.
    """

    party: Party

    def hear(self, message: Message) -> Tensor | None: ...


class Wire:
    """The wire inside one process, which plays every party. Counts the bytes of each payload in its ledger."""

    party: Party | None = None
    """Whom this process plays alone; None: everybody."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.taps: list[Tap] = []
        self.number: tuple[int, ...] = (0, 0)  # epoch and place there of the mini-batch at hand

    def plays(self, party: Party) -> bool:
        """Whether `party` lives in this process."""
        return True

    def hosts(self, role: Role) -> bool:
        """Whether weights of `role` live in this process."""
        return True

    def carry(self, tensor: Tensor, src: Party, dst: Party, kind: str) -> Tensor:
        """Bring `tensor` from `src` to `dst` and return what `dst` receives: same shape and dtype, no graph.

        An activation wants a gradient where the one that was sent does. Where `src` lives elsewhere, `tensor` tells the
        shape alone; where `dst` does, what is returned does. A codec packs and unpacks in `_move`, which each engine
        has its own of: `RemoteWire` sends there what `Wire` hands over.

        Raises ValueError for a `kind` that the ledger does not know.
        """
        if kind not in KINDS:
            raise ValueError(f"`kind` (={kind}) must be one of {', '.join(KINDS)}")
        return self._move(tensor, src, dst, kind)

    def carry_all(self, tensors: Mapping[str, Tensor], src: Party, dst: Party, kind: str) -> dict[str, Tensor]:
        """Bring tensors by name, and return what `dst` receives: nothing where it lives elsewhere.

        Where `src` lives elsewhere, `tensors` tells the shapes alone.
        """
        return {name: self.carry(tensor, src, dst, kind) for name, tensor in tensors.items()}

    def gather(self, values: Any) -> list[Any]:
        """Return what every process has given, in the same order to all. `values` is what JSON can hold."""
        return [values]

    def gather_by_alice(self, values: Mapping[Party, Any], holder: Role) -> dict[Party, Any]:
        """Return what is known of each Alice's rows by the process that may know it, where `holder` holds the loss.

        Nobody else is believed: what another process tells of them is passed over.
        """
        return dict(values)

    def gather_held(self, values: Any, holder: Role) -> list[Any]:
        """Return what those processes have given that may hold the loss, where it is that of `holder`."""
        return [values]

    def _move(self, tensor: Tensor, src: Party, dst: Party, kind: str) -> Tensor:
        payload = tensor.detach()
        if self.taps:
            payload = self._heard(Message(src, dst, kind, payload))
        self.ledger.add(src, dst, kind, payload.nbytes)
        return payload.requires_grad_(tensor.requires_grad) if kind == "activation" else payload

    def _heard(self, message: Message) -> Tensor:
        """Let the taps of both parties hear: the sender's first, so that the receiver's hear what arrives."""
        for tap in sorted(self.taps, key=lambda tap: tap.party != message.src):
            if tap.party in (message.src, message.dst):
                message = message._replace(tensor=_hear(tap, message))
        return message.tensor


class Absent(Wire):
    """Plays nobody: only shapes cross."""

    def plays(self, party: Party) -> bool:
        return False


@lru_cache(maxsize=1024)  # made anew with every mini-batch, it would cost more than a small layer
def elsewhere(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the meta tensor that stands for one in another process."""
    with torch.inference_mode(False):  # one that validation asks for first must do for training, too
        return torch.empty(shape, dtype=dtype, device="meta")


def _hear(tap: Tap, message: Message) -> Tensor:
    # A copy: weights go on changing in place, and a tap must not change what it only hears.
    instead = tap.hear(message._replace(tensor=message.tensor.clone()))
    if instead is None:
        return message.tensor
    if tap.party != message.src:
        raise ValueError(
            f"a tap at {tap.party} replaced what {message.src} sent to {message.dst}: "
            f"it may replace only what {tap.party} sends"
        )
    return instead.detach()

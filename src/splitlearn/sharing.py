"""What happens to the weights of a role between turns."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from splitlearn.layout import Party
from splitlearn.wire import Wire

POLICIES = ("carry", "reset", "keep")


class Sharing(Protocol):
    """Moves a role's weights from the party that had the turn to the one that has it next."""

    def hand_over(
        self, segments: Sequence[nn.Module], optimizer: Optimizer | None, wire: Wire, giver: Party, taker: Party
    ) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Handoff:
    """Alice hands a copy of her trained bottom to the next Alice, peer to peer (Gupta & Raskar 2018, section 3.2).

    Arguments:
        optimizer_state: `carry` (it travels with the weights and is counted), `reset` (the next Alice starts
            without any) or `keep` (each Alice goes on with her own).
    """

    def __init__(self, optimizer_state: str = "carry") -> None:
        if optimizer_state not in POLICIES:
            raise ValueError(f"`optimizer_state` (={optimizer_state}) must be one of {', '.join(POLICIES)}")
        self.optimizer_state = optimizer_state
        self.kept: dict[Party, dict[str, Any]] = {}

    def hand_over(
        self, segments: Sequence[nn.Module], optimizer: Optimizer | None, wire: Wire, giver: Party, taker: Party
    ) -> None:
        for segment in segments:
            _carry_over(_weights(segment), wire, giver, taker, "weights")
        if optimizer is None:
            return
        if self.optimizer_state == "carry":
            _carry_over(_state(optimizer), wire, giver, taker, "optimizer_state")
            return
        if self.optimizer_state == "keep":
            self.kept[giver] = copy.deepcopy(optimizer.state_dict()["state"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": self.kept.pop(taker, {}), "param_groups": groups})

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state["kept"]


def _weights(segment: nn.Module) -> Iterator[Tensor]:
    """Weights include buffers: the statistics of batch norm travel with the weights they belong to."""
    yield from (value for value in segment.state_dict(keep_vars=True).values() if isinstance(value, Tensor))


def _state(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


@torch.no_grad()
def _carry_over(tensors: Iterator[Tensor], wire: Wire, giver: Party, taker: Party, kind: str) -> None:
    """In one process giver and taker share the one live copy, so the copy is onto itself."""
    for tensor in tensors:
        tensor.copy_(wire.carry(tensor, giver, taker, kind))

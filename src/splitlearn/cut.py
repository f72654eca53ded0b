"""The cut layer: where the graph of one party ends and that of the next begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from splitlearn.layout import Party
from splitlearn.wire import Wire


class Hop(NamedTuple):
    """One crossing. `sent` hangs on the sender's graph, `received` is the leaf of the receiver's.

    Each is on meta, and wants no gradient, where its party lives in another process.
    """

    sender: Party
    receiver: Party
    sent: Tensor
    received: Tensor


class CutLayer(nn.Module):
    """Detach, carry, re-attach; and the gradient's way back (Gupta & Raskar 2018, arXiv 1810.06060, algorithm 1)."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.wire = wire

    def forward(self, smashed: Tensor, sender: Party, receiver: Party) -> Hop:
        received = self.wire.carry(smashed, sender, receiver, "activation")
        return Hop(sender, receiver, smashed, leaf(received, smashed))

    def backward(self, hop: Hop) -> None:
        """Send the gradient back; `SplitNetwork.backward` does so for each hop, the last first."""
        # A bottom that is frozen or has no parameters wants no gradient, so none is sent.
        if not (hop.sent.requires_grad or hop.received.requires_grad):
            return
        gradient = self.wire.carry(_gradient(hop), hop.receiver, hop.sender, "gradient")
        if hop.sent.requires_grad:
            run_backward(hop.sent, gradient)


def leaf(received: Tensor, sent: Tensor) -> Tensor:
    """What was received as the start of a graph, also where a wire has computed it and the result hangs on others."""
    if received.is_meta or sent.is_meta:  # another process has one of them
        return received if received.is_leaf else received.detach().requires_grad_()
    if received.is_leaf and received.requires_grad == sent.requires_grad:
        return received
    return received.detach().requires_grad_(sent.requires_grad)


def _gradient(hop: Hop) -> Tensor:
    """Of what was received; where that was in another process, its shape. Zeros if the loss does not depend on it."""
    if not hop.received.requires_grad:
        return hop.sent
    return torch.zeros_like(hop.received) if hop.received.grad is None else hop.received.grad


def run_backward(root: Tensor, gradient: Tensor | None = None) -> None:
    """`root.backward(gradient)`, straight into torch's engine.

    The checks of torch's Python layer in front of it cost 50 us each time, as much as the engine's own run on a small
    network, and a split network goes backward once per party. `experiments/speed` measures the difference.
    """
    gradient = torch.ones_like(root) if gradient is None else gradient
    torch.autograd.Variable._execution_engine.run_backward(
        (root,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )

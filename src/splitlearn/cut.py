"""The cut layer: where the graph of one party ends and that of the next begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from splitlearn.layout import Party
from splitlearn.wire import Wire


class Hop(NamedTuple):
    """One crossing. `sent` hangs on the sender's graph, `received` is the leaf of the receiver's."""

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
        return Hop(sender, receiver, smashed, received.requires_grad_(smashed.requires_grad))

    def backward(self, hop: Hop) -> None:
        # A bottom that is frozen or has no parameters wants no gradient, so none is sent.
        if hop.received.grad is None:
            return
        gradient = self.wire.carry(hop.received.grad, hop.receiver, hop.sender, "gradient")
        run_backward(hop.sent, gradient)


def run_backward(root: Tensor, gradient: Tensor | None = None) -> None:
    """`root.backward(gradient)`, straight into torch's engine.

    The checks of torch's Python layer in front of it cost 50 us each time, as much as the engine's own run on a small
    network, and a split network goes backward once per party. `experiments/speed` measures the difference.
    """
    gradient = torch.ones_like(root) if gradient is None else gradient
    torch.autograd.Variable._execution_engine.run_backward(
        (root,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )

"""One cut in a graph: the receiver's graph starts in a leaf, and the gradient finds its way back."""

import pytest
import torch
from torch import nn

from splitlearn.cut import CutLayer, run_backward
from splitlearn.wire import Wire

X = torch.tensor([[1.0, -2.0], [3.0, 0.5]])


def bottom_and_top() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh()), nn.Linear(4, 1)


def test_the_gradients_on_both_sides_are_those_of_the_uncut_graph():
    bottom, top = bottom_and_top()
    cut = CutLayer(Wire())
    hop = cut(bottom(X), "alice0", "bob")
    run_backward(top(hop.received).square().mean())
    assert all(p.grad is None for p in bottom.parameters())
    cut.backward(hop)
    uncut = nn.Sequential(*bottom_and_top())
    uncut(X).square().mean().backward()
    pairs = zip([*bottom.parameters(), *top.parameters()], uncut.parameters(), strict=True)
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs)


def test_the_receiver_gets_a_leaf_with_the_values_and_not_the_graph():
    bottom, _ = bottom_and_top()
    sent = bottom(X)
    hop = CutLayer(Wire())(sent, "alice0", "bob")
    assert (hop.sender, hop.receiver) == ("alice0", "bob")
    assert hop.sent is sent
    assert torch.equal(hop.received, sent)
    assert hop.received.is_leaf
    assert hop.received.requires_grad


class Halves(Wire):
    """What a codec of a user's own may do: it computes on the way, and leaves a graph behind or none."""

    def __init__(self, graph: bool) -> None:
        super().__init__()
        self.graph = graph

    def carry(self, tensor, src, dst, kind):
        with torch.set_grad_enabled(self.graph):
            return super().carry(tensor.half(), src, dst, kind).float()


@pytest.mark.parametrize("graph", [True, False])
def test_a_wire_that_computes_leaves_the_bottom_its_gradient(graph):
    bottom, top = bottom_and_top()
    cut = CutLayer(Halves(graph))
    hop = cut(bottom(X), "alice0", "bob")
    run_backward(top(hop.received).square().mean())
    cut.backward(hop)
    plain, plain_top = bottom_and_top()
    sent = plain(X)
    received = sent.detach().half().float().requires_grad_()
    plain_top(received).square().mean().backward()
    sent.backward(received.grad.half().float())
    pairs = zip([*bottom.parameters(), *top.parameters()], [*plain.parameters(), *plain_top.parameters()], strict=True)
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs)
    assert cut.wire.ledger.table() == {"alice0->bob": {"activation": 16}, "bob->alice0": {"gradient": 16}}


def test_activation_and_gradient_cross_once_each():
    wire = Wire()
    cut = CutLayer(wire)
    hop = cut(bottom_and_top()[0](X), "alice0", "bob")
    assert wire.ledger.table() == {"alice0->bob": {"activation": 32}}
    run_backward(hop.received.sum())
    cut.backward(hop)
    assert wire.ledger.table() == {"alice0->bob": {"activation": 32}, "bob->alice0": {"gradient": 32}}


def test_the_way_back_ends_at_a_frozen_bottom():
    wire = Wire()
    cut = CutLayer(wire)
    bottom, top = bottom_and_top()
    hop = cut(bottom.requires_grad_(False)(X), "alice0", "bob")
    assert not hop.received.requires_grad
    run_backward(top(hop.received).sum())
    cut.backward(hop)
    assert wire.ledger.table() == {"alice0->bob": {"activation": 32}}


def test_run_backward_is_backward():
    for gradient in (None, torch.tensor([2.0, -3.0])):
        a, b = (torch.tensor([0.3, 0.7], requires_grad=True) for _ in range(2))
        roots = [x.exp() * x if gradient is not None else (x.exp() * x).sum() for x in (a, b)]
        run_backward(roots[0], gradient)
        roots[1].backward(gradient)
        assert torch.equal(a.grad, b.grad)

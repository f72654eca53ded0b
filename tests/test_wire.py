"""What arrives is what was sent, its real bytes are counted, and taps hear and replace what they may."""

import pytest
import torch
from helpers import Recorder
from torch import Tensor

from splitlearn.ledger import KINDS
from splitlearn.wire import Message, Wire


class Sends:
    """A tap that sends something else."""

    def __init__(self, party: str, tensor: Tensor) -> None:
        self.party, self.tensor = party, tensor

    def hear(self, message: Message) -> Tensor:
        return self.tensor


DTYPES = {torch.float64: 8, torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.int64: 8, torch.uint8: 1}


@pytest.mark.parametrize(("dtype", "size"), DTYPES.items())
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2, 2), ()])
def test_what_arrives_has_the_values_the_dtype_and_the_shape_of_what_was_sent(dtype, size, shape):
    wire, sent = Wire(), torch.ones(shape, dtype=dtype)
    received = wire.carry(sent, "alice0", "bob", "activation")
    assert torch.equal(received, sent)
    assert (received.dtype, received.shape) == (dtype, shape)
    assert wire.ledger.table() == {"alice0->bob": {"activation": sent.numel() * size}}


@pytest.mark.parametrize(("kind", "wants"), [("activation", True), ("weights", False)])
def test_no_graph_crosses_and_an_activation_alone_wants_a_gradient(kind, wants):
    sent = torch.ones(2, requires_grad=True) * 2
    received = Wire().carry(sent, "alice0", "bob", kind)
    assert received.is_leaf
    assert received.requires_grad is wants
    assert not Wire().carry(sent.detach(), "alice0", "bob", kind).requires_grad


def test_a_view_costs_what_it_shows_and_not_what_it_is_cut_from():
    wire = Wire()
    wire.carry(torch.zeros(100, 100)[:2, :3], "alice0", "bob", "activation")
    assert wire.ledger.table() == {"alice0->bob": {"activation": 24}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_counted_apart(kind):
    wire = Wire()
    wire.carry(torch.zeros(1), "alice0", "bob", kind)
    assert wire.ledger.table() == {"alice0->bob": {kind: 4}}


def test_an_unknown_kind_is_refused_and_not_counted():
    wire = Wire()
    with pytest.raises(ValueError, match=r"^`kind` \(=gossip\) must be one of activation, gradient, label, weights, "):
        wire.carry(torch.zeros(1), "alice0", "bob", "gossip")
    assert wire.ledger.table() == {}


def test_a_tap_hears_what_its_party_sends_and_receives_and_nothing_else():
    wire = Wire()
    wire.taps = [Recorder(party) for party in ("alice0", "bob", "carol")]
    wire.carry(torch.tensor([1.0]), "alice0", "bob", "activation")
    wire.carry(torch.tensor([2.0]), "bob", "alice0", "gradient")
    wire.carry(torch.tensor([3.0]), "bob", "carol", "label")
    heard = {tap.party: [(m.src, m.dst, m.kind, m.tensor.item()) for m in tap.messages] for tap in wire.taps}
    there, back = ("alice0", "bob", "activation", 1.0), ("bob", "alice0", "gradient", 2.0)
    on = ("bob", "carol", "label", 3.0)
    assert heard == {"alice0": [there, back], "bob": [there, back, on], "carol": [on]}


def test_what_a_tap_has_heard_does_not_change_when_the_weights_do():
    wire, weights = Wire(), torch.zeros(2)
    wire.taps = [Recorder("alice0")]
    wire.carry(weights, "alice0", "alice1", "weights")
    weights.add_(1)
    assert wire.taps[0].messages[0].tensor.tolist() == [0, 0]


def test_a_replacement_goes_out_and_its_bytes_are_counted():
    wire, instead = Wire(), torch.tensor([5.0, 6.0], dtype=torch.float64, requires_grad=True)
    ear = Recorder("bob")
    wire.taps = [ear, Sends("alice0", instead)]
    received = wire.carry(torch.zeros(2), "alice0", "bob", "activation")
    assert received.tolist() == ear.messages[0].tensor.tolist() == [5, 6]
    assert not received.requires_grad
    assert wire.ledger.table() == {"alice0->bob": {"activation": 16}}


def test_only_what_its_own_party_sends_may_be_replaced():
    wire = Wire()
    wire.taps = [Sends("bob", torch.ones(1))]
    rule = "^a tap at bob replaced what alice0 sent to bob: it may replace only what bob sends$"
    with pytest.raises(ValueError, match=rule):
        wire.carry(torch.zeros(1), "alice0", "bob", "activation")
    assert wire.carry(torch.zeros(1), "bob", "alice0", "gradient").item() == 1
    assert wire.carry(torch.zeros(1), "alice0", "carol", "activation").item() == 0

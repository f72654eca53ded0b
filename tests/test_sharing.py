"""What a hand-over does to weights and optimizer, message by message."""

import pytest
import torch
from helpers import Recorder
from torch import nn

from splitlearn.sharing import Handoff
from splitlearn.wire import Wire


def make(optimizer=torch.optim.Adam):
    """A bottom with batch norm, after one step: 4 + 2 weights, 2 + 2 of batch norm, its statistics and counter."""
    torch.manual_seed(0)
    bottom = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return bottom, step(bottom, optimizer(bottom.parameters(), lr=0.1))


def step(bottom, optimizer):
    bottom.zero_grad()
    bottom(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).square().sum().backward()
    optimizer.step()
    return optimizer


def hand_over(sharing, bottom, optimizer, giver="alice0", taker="alice1", taps=()):
    wire = Wire()
    wire.taps = list(taps)
    sharing.hand_over([bottom], optimizer, wire, giver, taker)
    return wire.ledger.table()


WEIGHTS = 4 * (4 + 2 + 2 + 2 + 2 + 2) + 8


def test_weights_and_buffers_cross_as_they_are():
    bottom, optimizer = make()
    ear, before = Recorder("alice1"), {name: value.clone() for name, value in bottom.state_dict().items()}
    assert hand_over(Handoff("reset"), bottom, optimizer, taps=[ear]) == {"alice0->alice1": {"weights": WEIGHTS}}
    arrived = [message.tensor for message in ear.messages]
    assert all(torch.equal(*pair) for pair in zip(arrived, before.values(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in bottom.state_dict().items())


def test_the_taker_gets_what_the_giver_sends():
    class Ones:
        party = "alice0"

        def hear(self, message):
            return torch.ones_like(message.tensor)

    bottom, optimizer = make()
    parameters = list(bottom.parameters())
    hand_over(Handoff("reset"), bottom, optimizer, taps=[Ones()])
    assert all(torch.equal(value, torch.ones_like(value)) for value in bottom.state_dict().values())
    assert all(a is b for a, b in zip(parameters, bottom.parameters(), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "num_bytes"),
    [(torch.optim.Adam, 2 * 4 * 10 + 4 * 4), (torch.optim.SGD, None)],
    ids=["two moments and a step count each", "no state"],
)
def test_carry_takes_the_optimizer_state_along_and_counts_it(optimizer, num_bytes):
    bottom, optimizer = make(optimizer)
    costs = {"weights": WEIGHTS} if num_bytes is None else {"weights": WEIGHTS, "optimizer_state": num_bytes}
    before = [value.clone() for state in optimizer.state.values() for value in state.values() if value is not None]
    assert hand_over(Handoff("carry"), bottom, optimizer) == {"alice0->alice1": costs}
    after = [value for state in optimizer.state.values() for value in state.values() if value is not None]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_reset_leaves_no_state_and_all_options():
    bottom, optimizer = make()
    hand_over(Handoff("reset"), bottom, optimizer)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1
    before = bottom[0].weight.clone()
    step(bottom, optimizer)
    assert not torch.equal(bottom[0].weight, before)


def test_keep_gives_each_alice_her_own_back():
    def steps_done():
        return [state["step"].item() for state in optimizer.state.values()]

    bottom, optimizer = make()
    sharing = Handoff("keep")
    step(bottom, optimizer)
    assert steps_done() == [2] * 4
    assert hand_over(sharing, bottom, optimizer) == {"alice0->alice1": {"weights": WEIGHTS}}
    assert steps_done() == []
    step(bottom, optimizer)
    hand_over(sharing, bottom, optimizer, "alice1", "alice0")
    assert steps_done() == [2] * 4
    hand_over(sharing, bottom, optimizer, "alice0", "alice1")
    assert steps_done() == [1] * 4


def test_what_each_alice_keeps_survives_a_checkpoint(tmp_path):
    bottom, optimizer = make()
    sharing, resumed = Handoff("keep"), Handoff("keep")
    hand_over(sharing, bottom, optimizer)
    torch.save(sharing.state_dict(), tmp_path / "ckpt")
    resumed.load_state_dict(torch.load(tmp_path / "ckpt", weights_only=True))
    hand_over(resumed, bottom, optimizer, "alice1", "alice0")
    assert [state["step"].item() for state in optimizer.state.values()] == [1] * 4


@pytest.mark.parametrize("policy", ["carry", "reset", "keep"])
def test_a_bottom_with_nothing_to_train_is_handed_over_without_an_optimizer(policy):
    assert hand_over(Handoff(policy), make()[0], None) == {"alice0->alice1": {"weights": WEIGHTS}}


def test_there_are_three_policies():
    with pytest.raises(ValueError, match=r"^`optimizer_state` \(=drop\) must be one of carry, reset, keep$"):
        Handoff("drop")

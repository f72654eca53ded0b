"""What each sharing does to weights and optimizer, on a bottom of one linear layer and batch norm."""

import re

import pytest
import torch
from helpers import BLOCKS, Recorder, make_network
from torch import nn

from splitlearn.layout import two_party
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.rounds import Rounds
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Handoff, Personal, Shared
from splitlearn.schedules.weights import RoleWeights
from splitlearn.wire import SERVER, Wire

WEIGHTS = 4 * (4 + 2 + 2 + 2 + 2 + 2) + 8  # weights, batch norm's, its statistics, its counter of mini-batches
TRAINED = 4 * (4 + 2 + 2 + 2)
BUFFERS = WEIGHTS - TRAINED
ADAM = 2 * TRAINED + 4 * 4  # two moments, and a step count for each of four parameters


def make_live(optimizer=torch.optim.Adam, taps=(), role="alice"):
    """After one step, so that there is a state."""
    torch.manual_seed(0)
    bottom = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    wire = Wire()
    wire.taps = list(taps)
    weights = RoleWeights(role, {"bottom": bottom}, wire, optimizer and optimizer(bottom.parameters(), lr=0.1))
    if optimizer:
        step(weights)
    return weights


def step(weights):
    bottom = weights.segments["bottom"]
    bottom.zero_grad()
    bottom(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).square().sum().backward()
    weights.optimizer.step()


def fill(weights, value):
    """What an Alice's training makes of the weights."""
    with torch.no_grad():
        for tensor in weights.tensors.values():
            tensor.fill_(value)


def values(tensors):
    """The one value that all of these hold."""
    (value,) = {value for tensor in tensors.values() for value in tensor.flatten().tolist()}
    return value


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps_done(weights):
    return [state["step"].item() for state in weights.optimizer.state.values()]


def take_turns(sharing, weights, *alices, num_rows=1):
    for alice in alices:
        sharing.begin_turn(weights, alice)
        sharing.end_turn(weights, alice, num_rows)


def test_shared_moves_nothing():
    weights = make_live()
    before, state = copied(weights.tensors), copied(weights.state)
    sharing = Shared()
    take_turns(sharing, weights, "alice0", "alice1")
    sharing.end_round(weights)
    sharing.begin_evaluation(weights, "alice0")
    sharing.end_evaluation(weights)
    assert same(weights.tensors, before)
    assert same(weights.state, state)
    assert weights.wire.ledger.table() == {}


def test_weights_and_buffers_are_handed_over_as_they_are():
    ear = Recorder("alice1")
    weights = make_live(taps=[ear])
    before = copied(weights.tensors)
    take_turns(Handoff("reset"), weights, "alice0", "alice1")
    assert weights.wire.ledger.table() == {"alice0->alice1": {"weights": WEIGHTS}}
    assert all(torch.equal(m.tensor, v) for m, v in zip(ear.messages, before.values(), strict=True))
    assert same(weights.tensors, before)


def test_nothing_is_handed_over_to_oneself():
    weights = make_live()
    take_turns(Handoff("reset"), weights, "alice0", "alice0", "alice0")
    assert weights.wire.ledger.table() == {}
    assert steps_done(weights) == [1] * 4


class Ones:
    """A tap that sends ones in place of everything."""

    def __init__(self, party):
        self.party = party

    def hear(self, message):
        return torch.ones_like(message.tensor) if message.src == self.party else None


@pytest.mark.parametrize(("handoff", "sender"), [("peer", "alice0"), ("server", "alice0"), ("server", "server")])
def test_the_taker_gets_what_the_giver_sends(handoff, sender):
    weights = make_live(taps=[Ones(sender)])
    parameters = list(weights.segments["bottom"].parameters())
    take_turns(Handoff("carry", handoff), weights, "alice0", "alice1")
    assert values(weights.tensors) == values(weights.state) == 1
    assert all(a is b for a, b in zip(parameters, weights.segments["bottom"].parameters(), strict=True))


@pytest.mark.parametrize(
    ("optimizer", "costs"),
    [(torch.optim.Adam, {"weights": WEIGHTS, "optimizer_state": ADAM}), (torch.optim.SGD, {"weights": WEIGHTS})],
    ids=["two moments and a step count each", "no state"],
)
@pytest.mark.parametrize(
    ("handoff", "ways"), [("peer", ["alice0->alice1"]), ("server", ["alice0->server", "server->alice1"])]
)
def test_carry_takes_the_optimizer_state_along_and_counts_it(optimizer, costs, handoff, ways):
    weights = make_live(optimizer)
    before = copied(weights.state)
    take_turns(Handoff("carry", handoff), weights, "alice0", "alice1")
    assert weights.wire.ledger.table() == dict.fromkeys(ways, costs)
    assert same(weights.state, before)


def test_reset_leaves_no_state_and_all_options():
    weights = make_live()
    take_turns(Handoff("reset"), weights, "alice0", "alice1")
    assert not weights.optimizer.state
    assert weights.optimizer.param_groups[0]["lr"] == 0.1
    before = copied(weights.tensors)
    step(weights)
    assert not torch.equal(weights.tensors["bottom.0.weight"], before["bottom.0.weight"])


@pytest.mark.parametrize("sharing", [Handoff("keep"), Average("keep"), Personal()], ids=lambda s: type(s).__name__)
def test_keep_gives_each_alice_her_own_state_back(sharing):
    weights = make_live()
    weights.optimizer.state.clear()
    numbers = []
    for alice in ("alice0", "alice1", "alice0", "alice2", "alice1", "alice0"):
        sharing.begin_turn(weights, alice)
        step(weights)
        sharing.end_turn(weights, alice, 1)
        sharing.end_round(weights)
        numbers.append(steps_done(weights))
    assert numbers == [[n] * 4 for n in (1, 1, 2, 1, 2, 3)]


@pytest.mark.parametrize("policy", ["carry", "reset", "keep"])
@pytest.mark.parametrize("kind", [Handoff, Average])
def test_weights_with_nothing_to_train_move_without_an_optimizer(kind, policy):
    weights, sharing = make_live(None), kind(policy)
    take_turns(sharing, weights, "alice0", "alice1")
    sharing.end_round(weights)
    kinds = {kind for way in weights.wire.ledger.table().values() for kind in way}
    assert kinds == {"weights"}


def test_an_average_starts_everybody_alike_and_counts_samples():
    """1 row that makes all weights 10, and 3 rows that make them 2: their mean is 4, and the larger count stays."""
    weights = make_live()
    sharing, before = Average(), copied(weights.tensors)
    for alice, value, num_rows in (("alice0", 10, 1), ("alice1", 2, 3)):
        sharing.begin_turn(weights, alice)
        assert same(weights.tensors, before)
        assert weights.state == {}
        fill(weights, value)
        sharing.end_turn(weights, alice, num_rows)
    sharing.end_round(weights)
    means = weights.tensors
    count = means.pop("bottom.1.num_batches_tracked")
    assert values(means) == 4
    assert (count.item(), count.dtype) == (10, torch.int64)
    both_ways = {"server->{}": {"weights": WEIGHTS}, "{}->server": {"weights": WEIGHTS}}
    assert weights.wire.ledger.table() == {
        way.format(alice): costs for alice in ("alice0", "alice1") for way, costs in both_ways.items()
    }


def test_a_uniform_average_counts_alices():
    weights, sharing = make_live(), Average(weighting="uniform")
    for alice, value, num_rows in (("alice0", 10, 1), ("alice1", 2, 3)):
        sharing.begin_turn(weights, alice)
        fill(weights, value)
        sharing.end_turn(weights, alice, num_rows)
    sharing.end_round(weights)
    assert values({name: tensor for name, tensor in weights.tensors.items() if "num_batches" not in name}) == 6


def test_the_next_round_starts_from_the_mean():
    weights, sharing = make_live(), Average()
    for start in (None, 2, 4):
        for alice, more in (("alice0", 1), ("alice1", 3)):
            sharing.begin_turn(weights, alice)
            if start is not None:
                assert values({n: t for n, t in weights.tensors.items() if "num_batches" not in n}) == start
            fill(weights, (start or 0) + more)
            sharing.end_turn(weights, alice, 5)
        sharing.end_round(weights)


def test_carry_averages_the_optimizer_state_and_counts_it_once_there_is_one():
    weights, sharing = make_live(), Average("carry")
    for alice, value, num_rows in (("alice0", 10, 1), ("alice1", 2, 3)):
        sharing.begin_turn(weights, alice)
        assert weights.state == {}
        step(weights)
        for tensor in weights.state.values():
            tensor.fill_(value)
        sharing.end_turn(weights, alice, num_rows)
    sharing.end_round(weights)
    up = {"weights": WEIGHTS, "optimizer_state": ADAM}
    assert weights.wire.ledger.table() == {
        "server->alice0": {"weights": WEIGHTS},
        "alice0->server": up,
        "server->alice1": {"weights": WEIGHTS},
        "alice1->server": up,
    }
    sharing.begin_turn(weights, "alice1")
    assert weights.wire.ledger.table()["server->alice1"] == {"weights": 2 * WEIGHTS, "optimizer_state": ADAM}
    assert {name.partition("/")[2]: tensor.flatten()[0].item() for name, tensor in weights.state.items()} == {
        "step": 10,  # a count is not averaged
        "exp_avg": 4,
        "exp_avg_sq": 4,
    }
    assert all(key.dtype == torch.float32 for key in weights.state.values())


def test_the_parts_that_one_party_plays_are_averaged_at_home():
    weights, sharing = make_live(role="bob"), Average("carry")
    take_turns(sharing, weights, "alice0", "alice1")
    sharing.end_round(weights)
    assert weights.wire.ledger.table() == {}


def test_in_the_middle_of_a_round_evaluation_sees_what_it_started_from():
    weights, sharing = make_live(), Average()
    start = copied(weights.tensors)
    sharing.begin_turn(weights, "alice0")
    fill(weights, 7)
    sharing.begin_evaluation(weights, "alice0")
    assert same(weights.tensors, start)
    sharing.end_evaluation(weights)
    assert values(weights.tensors) == 7


def test_before_the_first_round_there_is_nothing_to_show():
    for sharing in (Shared(), Handoff(), Average(), MeanGradient(), Personal()):
        weights = make_live()
        before = copied(weights.tensors)
        sharing.begin_evaluation(weights, "alice0")
        assert same(weights.tensors, before)
        sharing.end_evaluation(weights)
        assert same(weights.tensors, before)


def test_gradients_and_statistics_are_averaged_and_weights_stay():
    """1 row of gradient 10 and 3 rows of gradient 2: their mean is 4. So with statistics; the largest counter stays."""
    weights, sharing = make_live(), MeanGradient()
    before = copied(weights.tensors)
    for alice, value, num_rows in (("alice0", 10, 1), ("alice1", 2, 3)):
        sharing.begin_turn(weights, alice)
        assert same(weights.buffers, {name: before[name] for name in weights.buffers})
        for parameter in weights.trained.values():
            parameter.grad = torch.full_like(parameter, value)
        for buffer in weights.buffers.values():
            buffer.fill_(value)
        sharing.end_turn(weights, alice, num_rows)
    sharing.end_round(weights)
    assert values(weights.gradients) == 4
    assert {name: tensor.flatten()[0].item() for name, tensor in weights.buffers.items()} == {
        "bottom.1.running_mean": 4,
        "bottom.1.running_var": 4,
        "bottom.1.num_batches_tracked": 10,
    }
    assert same(weights.trained, {name: before[name] for name in weights.trained})
    costs = {"weight_gradient": TRAINED, "weights": BUFFERS}
    ways = ("alice0->server", "alice1->server", "server->alice0", "server->alice1")
    assert weights.wire.ledger.table() == dict.fromkeys(ways, costs)


def test_a_uniform_mean_of_gradients_counts_alices():
    weights, sharing = make_live(), MeanGradient("uniform")
    for alice, value, num_rows in (("alice0", 10, 1), ("alice1", 2, 3)):
        sharing.begin_turn(weights, alice)
        for parameter in weights.trained.values():
            parameter.grad = torch.full_like(parameter, value)
        sharing.end_turn(weights, alice, num_rows)
    sharing.end_round(weights)
    assert values(weights.gradients) == 6


def test_each_has_weights_of_her_own_and_all_begin_alike():
    weights, sharing = make_live(), Personal()
    first = copied(weights.tensors)
    for alice, value in (("alice0", 1), ("alice1", 2), ("alice2", 3)):
        sharing.begin_turn(weights, alice)
        assert same(weights.tensors, first)
        fill(weights, value)
    for alice, value in (("alice1", 2), ("alice0", 1), ("alice2", 3), ("alice2", 3)):
        sharing.begin_turn(weights, alice)
        assert values(weights.tensors) == value
    assert weights.wire.ledger.table() == {}


def test_looking_at_everybodys_weights_gives_the_turn_back():
    weights, sharing = make_live(), Personal()
    for alice, value in (("alice0", 1), ("alice1", 2)):
        sharing.begin_turn(weights, alice)
        fill(weights, value)
    sharing.begin_evaluation(weights, "alice0")
    for alice, value in (("alice0", 1), ("alice1", 2)):
        sharing.begin_turn(weights, alice)
        assert values(weights.tensors) == value
    sharing.begin_turn(weights, "alice0")
    sharing.end_evaluation(weights)
    assert values(weights.tensors) == 2
    assert sharing.holder == "alice1"


KINDS = {
    "handoff": lambda: Handoff("keep"),
    "average, keep": lambda: Average("keep"),
    "average, carry": lambda: Average("carry"),
    "personal": Personal,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_checkpoint_between_two_turns_goes_on_alike(make, tmp_path):
    def turn(sharing, weights, alice):
        sharing.begin_turn(weights, alice)
        step(weights)
        sharing.end_turn(weights, alice, len(alice))

    def go_on(sharing, weights):
        turn(sharing, weights, "alice10")
        sharing.end_round(weights)
        turn(sharing, weights, "alice0")
        return copied(weights.tensors), copied(weights.state)

    first, sharing = make_live(), make()
    turn(sharing, first, "alice0")
    state = [sharing.state_dict(), first.segments["bottom"].state_dict(), first.optimizer.state_dict()]
    torch.save(state, tmp_path / "ckpt")
    saved, weights, optimizer = torch.load(tmp_path / "ckpt", weights_only=True)
    resumed, other = make_live(), make()
    resumed.segments["bottom"].load_state_dict(weights)
    resumed.optimizer.load_state_dict(optimizer)
    other.load_state_dict(saved)
    for mine, theirs in zip(go_on(sharing, first), go_on(other, resumed), strict=True):
        assert same(mine, theirs)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Handoff("drop"), "`optimizer_state` (=drop) must be one of carry, reset, keep"),
        (lambda: Handoff(handoff="post"), "`handoff` (=post) must be one of peer, server"),
        (lambda: Average("drop"), "`optimizer_state` (=drop) must be one of carry, reset, keep"),
        (lambda: Average(weighting="age"), "`weighting` (=age) must be one of samples, uniform"),
        (lambda: MeanGradient("age"), "`weighting` (=age) must be one of samples, uniform"),
    ],
)
def test_settings_are_few(make, error):
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        make()


def test_all_step_by_what_the_server_answers():
    """A server that answers with ones: that is the gradient to step by."""

    class Ones:
        party = SERVER

        def hear(self, message):
            return torch.ones_like(message.tensor) if message.src == SERVER else None

    weights, sharing = make_live(), MeanGradient()
    weights.wire.taps = [Ones()]
    for name, value in weights.trained.items():
        value.grad = torch.full_like(weights.tensors[name], 7.0)
    sharing.begin_turn(weights, "alice0")
    sharing.end_turn(weights, "alice0", 3)
    sharing.end_round(weights)
    assert all(torch.equal(value.grad, torch.ones_like(value)) for value in weights.trained.values())


def rounds_of(alice, *takers):
    """After turns of these Alices, of alice0, alice1 and alice2."""
    layout = two_party(BLOCKS, 2)
    schedule = Schedule(layout.takers(3), alice=alice, turn="step" if alice.defers else "epoch")
    rounds = Rounds(schedule, make_network(layout))
    for taker in takers:
        rounds.begin_turn(taker)
    return rounds


@pytest.mark.parametrize("sharing", [Handoff, Average, MeanGradient])
@pytest.mark.parametrize(
    ("gone", "holder"),
    [(["alice0"], "alice2"), (["alice2"], "alice1"), (["alice1", "alice2"], "alice0"), ([], "alice2")],
)
def test_when_she_who_had_the_turn_is_gone_it_is_hers_who_had_it_before(sharing, gone, holder):
    rounds = rounds_of(sharing(), "alice0", "alice1", "alice0", "alice1", "alice2")
    rounds.leave_out(gone)
    assert rounds.holder == holder
    if sharing is Handoff:  # she still has what she handed over
        assert rounds.sharings["alice"].holder == holder


def test_when_nobody_is_left_who_had_a_turn_the_next_begins_with_what_she_has():
    rounds = rounds_of(Handoff(), "alice1")
    rounds.leave_out(["alice1"])
    assert rounds.holder == "alice0"
    assert rounds.sharings["alice"].holder is None


def test_of_a_mean_gradient_who_has_missed_a_step_is_shown_what_all_have():
    weights, sharing = make_live(), MeanGradient()
    take_turns(sharing, weights, "alice0", "alice2")
    sharing.end_round(weights)
    before = weights.wire.ledger.table()
    sharing.begin_evaluation(weights, "alice1")  # she has missed the step
    assert weights.wire.ledger.table() != before

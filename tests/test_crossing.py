"""What crosses between the parties in real training, heard by a tap at each of them, and what it costs."""

import pytest
import torch
from helpers import ADAM, BLOCKS, SGD, Recorder, differences, make_rows, net, train

from splitlearn.layout import extended_vanilla, multi_hop, two_party, u_shaped, vertical, whole
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Handoff, Personal

P = 19  # rows; behind the blocks are 48, 10, 7 and 3 elements a row
TWICE = 2 * P  # epochs times rows: the last mini-batch of each is short, and no row is dropped


def both_ways(sender, receiver, num_elements):
    """The activation there and the gradient back, float32."""
    num_bytes = TWICE * num_elements * 4
    return {f"{sender}->{receiver}": {"activation": num_bytes}, f"{receiver}->{sender}": {"gradient": num_bytes}}


def with_labels(table, sender, receiver):
    return {**table, f"{sender}->{receiver}": {**table.get(f"{sender}->{receiver}", {}), "label": TWICE * 8}}


# name: (layout, what training for two epochs costs)
COSTS = {
    "whole": (whole(BLOCKS), {}),
    "two_party 1": (two_party(BLOCKS, 1), both_ways("alice0", "bob", 48)),
    "two_party 2": (two_party(BLOCKS, 2), both_ways("alice0", "bob", 10)),
    "two_party 3": (two_party(BLOCKS, 3), both_ways("alice0", "bob", 7)),
    "two_party, labels at alice": (
        two_party(BLOCKS, 2, labels="alice"),
        with_labels(both_ways("alice0", "bob", 10), "alice0", "bob"),
    ),
    "multi_hop": (
        multi_hop(BLOCKS, [1, 2, 3]),
        {**both_ways("alice0", "bob", 48), **both_ways("bob", "carol", 10), **both_ways("carol", "dave", 7)},
    ),
    "multi_hop, labels at alice": (
        multi_hop(BLOCKS, [1, 2], labels="alice"),
        with_labels({**both_ways("alice0", "bob", 48), **both_ways("bob", "carol", 10)}, "alice0", "carol"),
    ),
    "u_shaped": (
        u_shaped(BLOCKS, [1, 3]),
        {way: {"activation": TWICE * a * 4, "gradient": TWICE * g * 4}
         for way, a, g in (("alice0->bob", 48, 7), ("bob->alice0", 7, 48))},
    ),
    "vertical": (
        vertical(BLOCKS, 1, num_alices=2),
        {**both_ways("alice0", "bob", 24), **both_ways("alice1", "bob", 24)},
    ),
    "extended_vanilla": (
        extended_vanilla(BLOCKS, [1, 2], num_alices=2),
        {**both_ways("alice0", "carol", 24), **both_ways("alice1", "carol", 24), **both_ways("carol", "bob", 10)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "costs"), COSTS.values(), ids=COSTS)
def test_what_crosses_is_what_the_closed_forms_say_and_never_the_data(layout, costs):
    """Two ways of 2 epochs, p rows, q elements each; p labels of 8 bytes where they cross; each hop for itself."""
    parties = ("alice0", "alice1", "bob", "carol", "dave")
    taps = [Recorder(party) for party in parties]
    run = train(layout, taps=taps)
    assert run.learner.ledger.table() == costs
    heard = {tap.party: tap.messages for tap in taps}
    for way, kinds in costs.items():
        for party in way.split("->"):
            for kind, num_bytes in kinds.items():
                messages = [m for m in heard[party] if f"{m.src}->{m.dst}" == way and m.kind == kind]
                assert sum(m.tensor.nbytes for m in messages) == num_bytes
    assert sum(len(messages) for messages in heard.values()) == 2 * 10 * sum(len(kinds) for kinds in costs.values())
    x, _ = make_rows(P)
    fields = [run.data.rows.fields[name] for name in layout.fields]
    assert torch.equal(torch.cat(fields, dim=-1), x)
    for message in (message for messages in heard.values() for message in messages):
        for field in fields:
            assert message.tensor.shape[1:] != field.shape[1:]
            assert not torch.isin(message.tensor, field).all()


@pytest.mark.parametrize("layout", [two_party(BLOCKS, 2), u_shaped(BLOCKS, [1, 2]), multi_hop(BLOCKS, [1, 2])])
def test_labels_stay_where_the_loss_is(layout):
    taps = [Recorder(party) for party in ("alice0", "bob", "carol")]
    run = train(layout, taps=taps, val_fraction=0.25)
    run.trainer.test(run.learner, datamodule=run.data, verbose=False)
    assert {message.kind for tap in taps for message in tap.messages} == {"activation", "gradient"}


BOTTOM = 4 * (18 + 2 + 4 * 2) + 8  # convolution, batch norm with its statistics, and its counter of mini-batches
HAND_OVERS = {"alice0->alice1": 2, "alice1->alice2": 2, "alice2->alice0": 1}  # in two epochs


@pytest.mark.parametrize(
    ("make", "policy", "state"),
    [
        (SGD, "carry", 4 * (18 + 2 + 2 * 2)),  # momentum of every parameter
        (ADAM, "carry", 2 * 4 * (18 + 2 + 2 * 2) + 4 * 4),  # two moments, and a step count for each of four
        (SGD, "keep", None),
        (SGD, "reset", None),
    ],
    ids=["sgd, carry", "adam, carry", "keep", "reset"],
)
def test_a_hand_over_costs_the_bottom_once_per_change_of_turn(make, policy, state):
    run = train(two_party(BLOCKS, 1), num_alices=3, batch_size=4, make=make, optimizer_state=policy)
    between = {way: kinds for way, kinds in run.learner.ledger.table().items() if "bob" not in way}
    expected = {way: {"weights": times * BOTTOM} for way, times in HAND_OVERS.items()}
    if state is not None:
        expected = {way: {**kinds, "optimizer_state": HAND_OVERS[way] * state} for way, kinds in expected.items()}
    assert between == expected
    rows = {"alice0": 7, "alice1": 6, "alice2": 6}
    activations = {way: kinds["activation"] for way, kinds in run.learner.ledger.table().items() if way.endswith("bob")}
    assert activations == {f"{alice}->bob": 2 * n * 48 * 4 for alice, n in rows.items()}


def test_both_ends_of_a_u_are_handed_over():
    run = train(u_shaped(BLOCKS, [1, 3]), num_alices=3, optimizer_state="reset")
    head = 4 * (7 * 3 + 3)
    between = {way: kinds for way, kinds in run.learner.ledger.table().items() if "bob" not in way}
    assert between == {way: {"weights": times * (BOTTOM + head)} for way, times in HAND_OVERS.items()}


K, E, STEPS = 3, 2, 2  # Alices, epochs, steps of an epoch in which all train at once
TOP = 4 * (48 * 10 + 10 + 10 * 7 + 7 + 4 * 7 + 7 * 3 + 3) + 8
TRAINED = 4 * (18 + 2 + 2 * 2)  # of the bottom
UNCUT, ALL_TRAINED = BOTTOM + TOP, TRAINED + 4 * (48 * 10 + 10 + 10 * 7 + 7 + 2 * 7 + 7 * 3 + 3)
MEAN = {"alice": MeanGradient(), "turn": "step"}
# name: (layout, schedule, bytes by kind of what moves weights, by NUMBERS.md's closed forms)
SCHEMES = {
    "peer": (two_party(BLOCKS, 1), {"alice": Handoff("reset")}, {"weights": (K * E - 1) * BOTTOM}),
    "server": (two_party(BLOCKS, 1), {"alice": Handoff("reset", "server")}, {"weights": 2 * (K * E - 1) * BOTTOM}),
    "two turns an epoch": (
        two_party(BLOCKS, 1),
        {"alice": Handoff("keep"), "turn": 1},
        {"weights": (2 * K * E - 1) * BOTTOM},
    ),
    "splitfed_v1": (
        two_party(BLOCKS, 1),
        {"alice": Average(), "bob": Average("carry")},
        {"weights": 2 * K * E * BOTTOM},
    ),
    "splitfed_v2": (two_party(BLOCKS, 1), {"alice": Average("keep")}, {"weights": 2 * K * E * BOTTOM}),
    "splitfed_v2, carry": (  # there is no state to begin with
        two_party(BLOCKS, 1),
        {"alice": Average("carry")},
        {"weights": 2 * K * E * BOTTOM, "optimizer_state": (2 * K * E - K) * (2 * TRAINED + 4 * 4)},
    ),
    "splitfed_v3": (two_party(BLOCKS, 1), {"alice": Personal(), "bob": Average()}, {}),
    "parallel": (
        two_party(BLOCKS, 1),
        {**MEAN, "bob": MeanGradient()},
        {"weight_gradient": 2 * K * E * STEPS * TRAINED, "weights": 2 * K * E * STEPS * (BOTTOM - TRAINED)},
    ),
    "fedavg": (whole(BLOCKS), {"alice": Average()}, {"weights": 2 * K * E * UNCUT}),
    "large_batch": (
        whole(BLOCKS),
        MEAN,
        {
            "weight_gradient": 2 * K * E * STEPS * ALL_TRAINED,
            "weights": 2 * K * E * STEPS * (UNCUT - ALL_TRAINED),
        },
    ),
}


def total(table, among):
    """Bytes by kind, of those ways whose both ends are, or are not, `among` the Alices and their server."""
    sums = {}
    for way, kinds in table.items():
        if all(party == "server" or party.startswith("alice") for party in way.split("->")) == among:
            for kind, num_bytes in kinds.items():
                sums[kind] = sums.get(kind, 0) + num_bytes
    return sums


@pytest.mark.parametrize(("layout", "schedule", "moves"), SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_costs_what_the_closed_forms_say(layout, schedule, moves):
    """Two ways of p rows with q elements each in an epoch, wherever the network is cut; weights as in SCHEMES."""
    run = train(layout, num_alices=K, make=ADAM, schedule=schedule)
    table = run.learner.ledger.table()
    assert total(table, among=True) == moves
    crossed = {"activation": TWICE * 48 * 4, "gradient": TWICE * 48 * 4} if len(layout.roles) > 1 else {}
    assert total(table, among=False) == crossed


def test_an_average_costs_each_alice_the_same_both_ways():
    run = train(two_party(BLOCKS, 1), num_alices=K, schedule={"alice": Average()})
    ways = {way: kinds["weights"] for way, kinds in run.learner.ledger.table().items() if "server" in way}
    alices = [f"alice{i}" for i in range(K)]
    up, down = ([way.format(alice) for alice in alices] for way in ("{}->server", "server->{}"))
    assert ways == dict.fromkeys(up + down, E * BOTTOM)


def test_an_epoch_costs_those_who_take_part_in_it():
    schedule = {"alice": Average(), "participation": 0.6, "local_epochs": 2}
    run = train(two_party(BLOCKS, 1), rows=make_rows(25), num_alices=5, batch_size=5, epochs=3, schedule=schedule)
    drawn = [run.learner.schedule.participants(epoch) for epoch in range(3)]
    times = {alice: sum(alice in epoch for epoch in drawn) for alice in (f"alice{i}" for i in range(5))}
    assert sum(times.values()) == 9
    assert len(set(times.values())) > 1  # chance gave them unequal shares, or this would show little
    table = run.learner.ledger.table()
    for alice, n in times.items():
        weights, activations = {"weights": n * BOTTOM}, {"activation": n * 2 * 5 * 48 * 4}
        for way, costs in (("server->{}", weights), ("{}->server", weights), ("{}->bob", activations)):
            assert table.get(way.format(alice)) == (costs if n else None)


def test_both_ends_of_a_u_are_averaged():
    run = train(u_shaped(BLOCKS, [1, 3]), num_alices=K, schedule={"alice": Average(), "bob": Average()})
    head = 4 * (7 * 3 + 3)
    assert total(run.learner.ledger.table(), among=True) == {"weights": 2 * K * E * (BOTTOM + head)}


def test_evaluation_is_metered_apart():
    """14 rows train, 5 validate after each of two epochs and 5 test: forward only."""
    run = train(two_party(BLOCKS, 2, labels="alice"), val_fraction=0.25)
    training = run.learner.ledger.table()
    assert training["alice0->bob"] == {"activation": 2 * 14 * 10 * 4, "label": 2 * 14 * 8}
    assert run.learner.evaluation_ledger.table() == {"alice0->bob": {"activation": 2 * 5 * 10 * 4, "label": 2 * 5 * 8}}
    run.trainer.test(run.learner, datamodule=run.data, verbose=False)
    assert run.learner.evaluation_ledger.table() == {"alice0->bob": {"activation": 3 * 5 * 10 * 4, "label": 3 * 5 * 8}}
    assert run.learner.ledger.table() == training


class Replace:
    """A tap that sends noise instead of every message of one kind."""

    def __init__(self, party, kind):
        self.party, self.kind = party, kind

    def hear(self, message):
        return torch.ones_like(message.tensor) if message.kind == self.kind else None


@pytest.mark.parametrize(
    ("party", "kind", "receiver", "trained_otherwise"),
    [("alice0", "activation", "bob", BLOCKS[1:]), ("bob", "gradient", "alice0", BLOCKS)],
)
def test_a_tap_may_replace_what_its_party_sends(party, kind, receiver, trained_otherwise):
    ear = Recorder(receiver)  # the first in the list, and hears the replacement all the same
    run, plain = train(two_party(BLOCKS, 1), taps=[ear, Replace(party, kind)]), train(two_party(BLOCKS, 1))
    assert {name.split(".")[0] for name in differences(run.weights, plain.weights)} >= set(trained_otherwise)
    arrived = [message.tensor for message in ear.messages if message.kind == kind]
    assert len(arrived) == 10
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in arrived)
    assert run.learner.ledger.table() == plain.learner.ledger.table()


@pytest.mark.parametrize(("party", "kind", "sender"), [("bob", "activation", "alice0"), ("alice0", "gradient", "bob")])
def test_a_tap_may_not_replace_what_its_party_receives(party, kind, sender):
    rule = f"a tap at {party} replaced what {sender} sent to {party}: it may replace only what {party} sends"
    with pytest.raises(ValueError, match=rule):
        train(two_party(BLOCKS, 2), taps=[Replace(party, kind)])


class Scribble:
    """A tap that writes into whatever it hears."""

    def __init__(self, party):
        self.party = party

    def hear(self, message):
        message.tensor.zero_()


def test_a_tap_that_only_listens_changes_nothing():
    plain = train(two_party(BLOCKS, 2), num_alices=3)
    taps = [Scribble("alice0"), Scribble("alice1"), Scribble("bob"), Recorder("alice1")]
    run = train(two_party(BLOCKS, 2), num_alices=3, taps=taps)
    assert differences(run.weights, plain.weights) == []
    assert net().block1[0].weight.shape in [m.tensor.shape for m in taps[-1].messages if m.kind == "weights"]
    assert not any(message.tensor.requires_grad for message in taps[-1].messages)

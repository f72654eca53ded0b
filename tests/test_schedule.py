"""Whose turn it is. Each drawing is the one that the test compares with; `|` ends a round, capitals finish.

epoch          n = 2             step            local_epochs = 2
a a A          a a   A |         a a A           a a a a a A
      B              B |         B               b B
        c C |    c C             c C
                                 | | |
"""

import re
from types import SimpleNamespace

import pytest
import torch

from splitlearn.data.loader import TurnLoader
from splitlearn.layout import extended_vanilla, multi_hop, two_party, u_shaped, vertical, whole
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Handoff, Personal, Shared

TAKERS = ("alice0", "alice1", "alice2")
NUM_BATCHES = {"alice0": 3, "alice1": 1, "alice2": 2}
LETTERS = {"alice0": "a", "alice1": "b", "alice2": "c"}
FIVE = tuple(f"alice{i}" for i in range(5))
BLOCKS = ("block1", "block2", "block3", "head")


def refused(error):
    return pytest.raises(ValueError, match=f"^{re.escape(error)}$")


def batches(taker, number):
    """Ids that tell the pass over her rows from the mini-batch: 20 is the first of the third pass."""
    return [torch.tensor([10 * number + i]) for i in range(NUM_BATCHES.get(taker, 1))]


def drawn(schedule, epoch=0):
    """The steps as a drawing: who, capital where she finishes, with several at once in one word."""
    words = []
    for step in schedule.steps(epoch, batches):
        assert set(step.finishes) <= set(step.batches)
        word = "".join(LETTERS[t].upper() if t in step.finishes else LETTERS[t] for t in step.batches)
        words.append(word + "|" * step.ends_round)
    return " ".join(words)


def ids(schedule, epoch=0):
    """The ids of each Alice's mini-batches in their order."""
    seen = {}
    for step in schedule.steps(epoch, batches):
        for taker, rows in step.batches.items():
            seen.setdefault(taker, []).append(rows.item())
    return seen


@pytest.mark.parametrize(
    ("arguments", "drawing"),
    [
        ({}, "a a A B c C|"),
        ({"turn": 2}, "a a B c C| A|"),
        ({"turn": 1}, "a B c| a C| A|"),
        ({"turn": 3}, "a a A B c C|"),
        ({"turn": 50}, "a a A B c C|"),
        ({"turn": "step", "alice": MeanGradient()}, "aBc| aC| A|"),
        ({"local_epochs": 2}, "a a a a a A b B c c c C|"),
        ({"local_epochs": 2, "turn": 2}, "a a b B c c| a a c C| a A|"),
    ],
    ids=str,
)
def test_turns(arguments, drawing):
    assert drawn(Schedule(TAKERS, **arguments)) == drawing


@pytest.mark.parametrize("turn", ["epoch", 1, 2])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_mini_batch_of_every_pass_is_trained_once_and_in_order(turn, epoch):
    assert ids(Schedule(TAKERS, turn=turn), epoch) == {
        "alice0": [10 * epoch, 10 * epoch + 1, 10 * epoch + 2],
        "alice1": [10 * epoch],
        "alice2": [10 * epoch, 10 * epoch + 1],
    }


def test_local_epochs_are_passes_of_their_own_in_every_epoch():
    schedule = Schedule(TAKERS, local_epochs=2)
    assert ids(schedule, 0)["alice2"] == [0, 1, 10, 11]
    assert ids(schedule, 1)["alice2"] == [20, 21, 30, 31]


def test_side_by_side_each_step_has_a_mini_batch_of_each_who_has_one():
    schedule = Schedule(TAKERS, MeanGradient(), turn="step")
    assert [{t: rows.item() for t, rows in step.batches.items()} for step in schedule.steps(0, batches)] == [
        {"alice0": 0, "alice1": 0, "alice2": 0},
        {"alice0": 1, "alice2": 1},
        {"alice0": 2},
    ]


def test_cyclic_begins_each_epoch_with_another_alice():
    schedule = Schedule(TAKERS, order="cyclic")
    assert [drawn(schedule, epoch) for epoch in range(4)] == [
        "a a A B c C|",
        "B c C a a A|",
        "c C a a A B|",
        "a a A B c C|",
    ]


def test_a_random_order_is_a_function_of_seed_and_epoch():
    def orders(seed):
        return [tuple(Schedule(FIVE, order="random", seed=seed).participants(epoch)) for epoch in range(20)]

    assert all(sorted(order) == list(FIVE) for order in orders(0))
    assert orders(0) == orders(0) != orders(1)
    assert len(set(orders(0))) > 10
    assert {order[0] for order in orders(0)} == set(FIVE)


@pytest.mark.parametrize("order", ["fixed", "cyclic", "random"])
def test_participants_are_drawn_anew_each_epoch(order):
    def draws(seed):
        schedule = Schedule(FIVE, participation=0.6, order=order, seed=seed)
        return [tuple(schedule.participants(epoch)) for epoch in range(20)]

    assert all(len(set(draw)) == 3 for draw in draws(0))
    assert draws(0) == draws(0) != draws(1)
    assert len({frozenset(draw) for draw in draws(0)}) > 4  # of ten
    assert set().union(*draws(0)) == set(FIVE)


def test_the_order_does_not_change_who_takes_part_nor_the_other_way_round():
    fixed, cyclic = (Schedule(FIVE, participation=0.6, order=order) for order in ("fixed", "cyclic"))
    everybody = Schedule(FIVE, order="cyclic")
    for epoch in range(5):
        assert fixed.participants(epoch) == sorted(cyclic.participants(epoch))
        expected = [taker for taker in everybody.participants(epoch) if taker in fixed.participants(epoch)]
        assert cyclic.participants(epoch) == expected


@pytest.mark.parametrize(("participation", "number"), [(1.0, 5), (0.7, 4), (0.6, 3), (0.2, 1), (0.11, 1)])
def test_participation_is_rounded_to_a_number_of_alices(participation, number):
    schedule = Schedule(FIVE, participation=participation)
    assert [len(schedule.participants(epoch)) for epoch in range(5)] == [number] * 5
    assert {taker for step in schedule.steps(1, batches) for taker in step.batches} == set(schedule.participants(1))


def test_by_default_alices_hand_on_and_bob_is_one():
    schedule = Schedule(TAKERS)
    assert (schedule.alice.optimizer_state, schedule.alice.handoff, type(schedule.bob)) == ("carry", "peer", Shared)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"takers": ()}, "`takers` (=()) must name at least one party"),
        ({"local_epochs": 0}, "`schedule.local_epochs` (=0) must be a whole number of at least 1"),
        ({"local_epochs": 1.5}, "`schedule.local_epochs` (=1.5) must be a whole number of at least 1"),
        ({"local_epochs": True}, "`schedule.local_epochs` (=True) must be a whole number of at least 1"),
        ({"turn": 0}, "`schedule.turn` (=0) must be a whole number of at least 1, or one of epoch and step"),
        ({"turn": "day"}, "`schedule.turn` (=day) must be a whole number of at least 1, or one of epoch and step"),
        ({"order": "alphabetical"}, "`schedule.order` (=alphabetical) must be one of fixed, random, cyclic"),
        ({"participation": 0}, "`schedule.participation` (=0) must lie in (0, 1]: 1 is everybody"),
        ({"participation": 1.1}, "`schedule.participation` (=1.1) must lie in (0, 1]: 1 is everybody"),
        ({"participation": float("nan")}, "`schedule.participation` (=nan) must lie in (0, 1]: 1 is everybody"),
        (
            {"participation": 0.1},
            "`schedule.participation` (=0.1) of 3 Alices rounds to nobody: take e.g. 0.33",
        ),
        (
            {"alice": MeanGradient()},
            "`schedule.alice` (=MeanGradient(weighting='samples')) needs `schedule.turn=step`, not epoch",
        ),
        (
            {"alice": Average(), "bob": MeanGradient("uniform"), "turn": 2},
            "`schedule.bob` (=MeanGradient(weighting='uniform')) needs `schedule.turn=step`, not 2",
        ),
        (
            {"alice": Shared()},
            "`schedule.alice` (=Shared()) moves no weights, and 3 Alices take turns: "
            "take Handoff, Average, MeanGradient or Personal, or num_alices=1",
        ),
        (
            {"bob": Personal()},
            "`schedule.bob` (=Personal()) would leave a top for each Alice, and none for anybody else: "
            "take Shared, Average or MeanGradient",
        ),
        (
            {"turn": "step"},
            "`schedule.turn` (=step) has all Alices train at once, and `schedule.alice` "
            "(=Handoff(optimizer_state='carry', handoff='peer')) hands on: take schedule.turn=1, or schedule=parallel",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_scheduled(arguments, error):
    with refused(error):
        Schedule(**{"takers": TAKERS, **arguments})


@pytest.mark.parametrize("num_alices", [2, 3, 7, 9, 11, 1000])
def test_the_participation_that_the_message_asks_for_suffices(num_alices):
    takers = [f"alice{i}" for i in range(num_alices)]
    with pytest.raises(ValueError, match=r"rounds to nobody: take e\.g\.") as raised:
        Schedule(takers, participation=0.4 / num_alices)
    Schedule(takers, participation=float(str(raised.value).rpartition(" ")[2]))


CHAINS = (two_party(BLOCKS, 2), multi_hop(BLOCKS, [1, 2]), u_shaped(BLOCKS, [1, 2]))
COLUMNS = (vertical(BLOCKS, 1, num_alices=2), extended_vanilla(BLOCKS, [1, 2], num_alices=2))
SCHEMES = {
    "sequential": {"alice": Handoff()},
    "splitfed_v1": {"alice": Average(), "bob": Average()},
    "splitfed_v2": {"alice": Average(), "order": "random"},
    "splitfed_v3": {"alice": Personal(), "bob": Average()},
    "parallel": {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"},
}


@pytest.mark.parametrize("layout", CHAINS, ids=lambda layout: layout.kind)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_fits_every_chain(layout, scheme):
    Schedule(TAKERS, **scheme).check(layout)


@pytest.mark.parametrize("alice", [Handoff(), Average(), Personal(), Shared()], ids=lambda alice: type(alice).__name__)
def test_a_scheme_without_bob_fits_the_whole_network(alice):
    Schedule(("alice0",), alice).check(whole(BLOCKS))


@pytest.mark.parametrize("layout", COLUMNS, ids=lambda layout: layout.kind)
def test_owners_of_columns_train_all_at_once(layout):
    takers = layout.takers(1)
    Schedule(takers).check(layout)
    for scheme in ("splitfed_v1", "splitfed_v2", "splitfed_v3", "parallel"):
        schedule = Schedule(takers, **SCHEMES[scheme])
        error = (
            f"`schedule.alice` (={schedule.alice}) with `schedule.bob` (={schedule.bob}) does not fit {layout.kind}, "
            "where all Alices train at once: "
            "take schedule=sequential, or layout two_party, multi_hop or u_shaped"
        )
        with refused(error):
            schedule.check(layout)


def test_where_there_is_no_bob_he_shares_nothing():
    error = (
        "`schedule.bob` (=Average(optimizer_state='reset', weighting='samples')) does not fit whole, where there is "
        "nobody but Alice: take layout two_party, multi_hop or u_shaped, or schedule sequential, fedavg or large_batch"
    )
    with refused(error):
        Schedule(TAKERS, Average(), Average()).check(whole(BLOCKS))


@pytest.mark.parametrize(
    ("limits", "asked", "idle"),
    [
        ({}, {}, []),
        ({"limit_train_batches": 3}, {}, ["alice1", "alice2"]),
        ({"limit_train_batches": 0.5}, {}, ["alice2"]),
        ({"limit_train_batches": 1}, {}, ["alice1", "alice2"]),  # a number of mini-batches, not the whole
        ({"limit_train_batches": 3}, {"order": "cyclic"}, []),
        ({"limit_train_batches": 3, "max_epochs": 2}, {"order": "cyclic"}, ["alice2"]),
        ({"limit_train_batches": 3, "overfit_batches": 3}, {"order": "cyclic"}, ["alice1", "alice2"]),
        ({"limit_train_batches": 3}, {"turn": 1}, []),
        ({"limit_train_batches": 3}, {"turn": "step", "alice": MeanGradient()}, []),
        ({"max_steps": 4}, {}, ["alice1", "alice2"]),
        ({"max_steps": 13, "max_epochs": None}, {}, []),
    ],
)
def test_who_never_trains_behind_a_limit_is_known(limits, asked, idle):
    schedule, rows = Schedule(TAKERS[:3], **asked), torch.arange(48)
    length = len(schedule.steps(0, lambda taker, _: rows[:16].split(4)))
    limit = limits.get("limit_train_batches", 1.0)
    num = min(limit, length) if isinstance(limit, int) else int(limit * length)
    fixed = {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 1.0, "overfit_batches": 0.0}
    trainer = SimpleNamespace(**{**fixed, **limits}, num_training_batches=num)
    shards = dict(zip(TAKERS[:3], rows.split(16), strict=True))
    assert TurnLoader(rows, shards, schedule, SimpleNamespace(trainer=trainer), batch_size=4).idle() == idle

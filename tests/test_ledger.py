"""Bytes by direction and kind."""

import pytest

from splitlearn.ledger import Ledger, is_alice


def test_bytes_add_up_by_sender_receiver_and_kind():
    ledger = Ledger()
    ledger.add("alice0", "bob", "activation", 10)
    ledger.add("bob", "alice0", "gradient", 4)
    ledger.add("alice0", "bob", "activation", 5)
    ledger.add("alice0", "bob", "label", 8)
    ledger.add("alice1", "bob", "activation", 3)
    assert ledger.table() == {
        "alice0->bob": {"activation": 15, "label": 8},
        "bob->alice0": {"gradient": 4},
        "alice1->bob": {"activation": 3},
    }


def test_many_alices_are_told_as_one():
    ledger = Ledger()
    for src, dst, kind, num_bytes in (
        ("alice0", "bob", "activation", 10),
        ("alice12", "bob", "activation", 5),
        ("bob", "alice12", "gradient", 4),
        ("alice0", "alice1", "weights", 7),
        ("alice1", "alice0", "weights", 8),
        ("bob", "carol", "activation", 1),
        ("malice1", "alice", "control", 2),
    ):
        ledger.add(src, dst, kind, num_bytes)
    assert ledger.table(merge=True) == {
        "alice*->bob": {"activation": 15},
        "bob->alice*": {"gradient": 4},
        "alice*->alice*": {"weights": 15},
        "bob->carol": {"activation": 1},
        "malice1->alice": {"control": 2},
    }


def test_a_loaded_table_goes_on_where_it_was():
    ledger, resumed = Ledger(), Ledger()
    ledger.add("alice0", "bob", "activation", 10)
    ledger.add("alice0", "alice1", "weights", 7)
    resumed.add("carol", "bob", "activation", 1)
    resumed.load(ledger.table())
    for each in (ledger, resumed):
        each.add("alice0", "bob", "activation", 5)
    assert resumed.table() == ledger.table() == {"alice0->bob": {"activation": 15}, "alice0->alice1": {"weights": 7}}


def test_nothing_sent_is_an_empty_table():
    assert Ledger().table() == {}


def test_passes_add_up_by_taker_and_rows():
    ledger = Ledger()
    for taker, num_rows in (("alice0", 4), ("alice1", 4), ("alice0", 3), ("alice0", 4)):
        ledger.add_pass(taker, num_rows)
    assert ledger.passes == {("alice0", 4): 2, ("alice1", 4): 1, ("alice0", 3): 1}
    assert ledger.num_bytes == {}


@pytest.mark.parametrize(
    ("party", "alice"), [("alice0", True), ("alice12", True), ("alice", False), ("malice1", False), ("bob", False)]
)
def test_an_alice_has_a_number(party, alice):
    assert is_alice(party) is alice

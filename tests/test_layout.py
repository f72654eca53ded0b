"""Every layout by literal equality; what cannot be is refused by name, value, rule and cure."""

import re

import pytest

from splitlearn.layout import Layout, Stage, extended_vanilla, multi_hop, two_party, u_shaped, vertical, whole

ABC = ("a", "b", "c")
NUMBERED = "1: a, 2: b, 3: c"


@pytest.mark.parametrize("cut", [2, "b"])
def test_two_party(cut):
    assert two_party(ABC, cut) == Layout(
        "two_party",
        (Stage("bottom", "alice", ("x",), ("a", "b")), Stage("top", "bob", ("bottom",), ("c",))),
        {"x": "alice", "y": "bob"},
    )


@pytest.mark.parametrize("cuts", [[1, 2], ["a", "b"], [1, "b"]])
def test_multi_hop(cuts):
    assert multi_hop(ABC, cuts) == Layout(
        "multi_hop",
        (
            Stage("segment0", "alice", ("x",), ("a",)),
            Stage("segment1", "bob", ("segment0",), ("b",)),
            Stage("segment2", "carol", ("segment1",), ("c",)),
        ),
        {"x": "alice", "y": "carol"},
    )


def test_the_parties_of_a_chain_may_have_names_of_their_own():
    chain = multi_hop(ABC, [1, 2], parties=["alice", "edge", "cloud"], labels="edge")
    assert [stage.role for stage in chain.stages] == ["alice", "edge", "cloud"]
    assert chain.owners == {"x": "alice", "y": "edge"}


def test_u_shaped():
    assert u_shaped(ABC, [1, 2]) == Layout(
        "u_shaped",
        (
            Stage("head", "alice", ("x",), ("a",)),
            Stage("body", "bob", ("head",), ("b",)),
            Stage("tail", "alice", ("body",), ("c",)),
        ),
        {"x": "alice", "y": "alice"},
    )


def test_vertical():
    assert vertical(ABC, 1, num_alices=2) == Layout(
        "vertical",
        (
            Stage("bottom0", "alice0", ("x0",), ("a",)),
            Stage("bottom1", "alice1", ("x1",), ("a",)),
            Stage("top", "bob", ("bottom0", "bottom1"), ("b", "c")),
        ),
        {"x0": "alice0", "x1": "alice1", "y": "bob"},
    )


def test_extended_vanilla():
    assert extended_vanilla(ABC, [1, 2], num_alices=2) == Layout(
        "extended_vanilla",
        (
            Stage("bottom0", "alice0", ("x0",), ("a",)),
            Stage("bottom1", "alice1", ("x1",), ("a",)),
            Stage("middle", "carol", ("bottom0", "bottom1"), ("b",)),
            Stage("top", "bob", ("middle",), ("c",)),
        ),
        {"x0": "alice0", "x1": "alice1", "y": "bob"},
    )


def test_whole():
    assert whole(ABC) == Layout("whole", (Stage("whole", "alice", ("x",), ABC),), {"x": "alice", "y": "alice"})


@pytest.mark.parametrize(
    ("layout", "owner"),
    [
        (two_party(ABC, 1, labels="alice"), "alice"),
        (multi_hop(ABC, [1, 2], labels="alice"), "alice"),
        (vertical(ABC, 1, num_alices=2, labels="alice1"), "alice1"),
        (extended_vanilla(ABC, [1, 2], num_alices=2, labels="carol"), "carol"),
    ],
)
def test_the_labels_are_where_they_are_put(layout, owner):
    assert layout.owners["y"] == owner


def test_every_alice_plays_alice_in_her_turn():
    layout = two_party(ABC, 1)
    assert layout.takers(3) == ("alice0", "alice1", "alice2")
    assert layout.cast("alice2") == {"alice": "alice2", "bob": "bob"}
    assert u_shaped(ABC, [1, 2]).cast("alice0") == {"alice": "alice0", "bob": "bob"}


def test_owners_of_columns_take_part_all_at_once():
    layout = vertical(ABC, 1, num_alices=2)
    assert layout.takers(2) == ("alices",)
    assert layout.cast("alices") == {"alice0": "alice0", "alice1": "alice1", "bob": "bob"}
    assert layout.fields == ("x0", "x1")
    assert two_party(ABC, 1).fields == ("x",)


def test_equal_layouts_share_a_description_and_others_do_not():
    layouts = [
        two_party(ABC, 1),
        two_party(ABC, 2),
        two_party(ABC, 1, labels="alice"),
        multi_hop(ABC, [1]),
        multi_hop(ABC, [1, 2]),
        multi_hop(ABC, [1, 2], parties=["alice", "edge", "cloud"]),
        u_shaped(ABC, [1, 2]),
        vertical(ABC, 1, num_alices=2),
        vertical(ABC, 1, num_alices=3),
        extended_vanilla(ABC, [1, 2], num_alices=2),
        whole(ABC),
    ]
    assert len({layout.describe() for layout in layouts}) == len(layouts)
    assert two_party(ABC, "a").describe() == two_party(ABC, 1).describe()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: two_party(ABC, 0), f"`layout.cut` (=0) must lie between 1 and 2, the blocks being {NUMBERED}"),
        (lambda: two_party(ABC, 3), f"`layout.cut` (=3) must lie between 1 and 2, the blocks being {NUMBERED}"),
        (lambda: two_party(ABC, -1), f"`layout.cut` (=-1) must lie between 1 and 2, the blocks being {NUMBERED}"),
        (lambda: two_party(ABC, 1.5), f"`layout.cut` (=1.5) must lie between 1 and 2, the blocks being {NUMBERED}"),
        (lambda: two_party(ABC, True), f"`layout.cut` (=True) must lie between 1 and 2, the blocks being {NUMBERED}"),
        (lambda: two_party(ABC, None), f"`layout.cut` (=None) must lie between 1 and 2, the blocks being {NUMBERED}"),
        (lambda: two_party(ABC, "d"), f"`layout.cut` (=d) must name a block before the last one: {NUMBERED}"),
        (lambda: two_party(ABC, "c"), f"`layout.cut` (=c) must name a block before the last one: {NUMBERED}"),
        (lambda: vertical(ABC, 3, 2), f"`layout.cut` (=3) must lie between 1 and 2, the blocks being {NUMBERED}"),
        (
            lambda: multi_hop(ABC, [2, 1]),
            f"`layout.cuts` (=[2, 1]) must increase from the input to the output: {NUMBERED}",
        ),
        (
            lambda: multi_hop(ABC, ["a", 1]),
            f"`layout.cuts` (=['a', 1]) must increase from the input to the output: {NUMBERED}",
        ),
        (
            lambda: multi_hop(ABC, 1),
            "`layout.cuts` (=1) must be a list of at least one cut, e.g. `layout.cuts=[1,2]`, for multi_hop",
        ),
        (
            lambda: multi_hop(ABC, "a"),
            "`layout.cuts` (=a) must be a list of at least one cut, e.g. `layout.cuts=[1,2]`, for multi_hop",
        ),
        (
            lambda: multi_hop(ABC, []),
            "`layout.cuts` (=[]) must be a list of at least one cut, e.g. `layout.cuts=[1,2]`, for multi_hop",
        ),
        (
            lambda: u_shaped(ABC, [1]),
            "`layout.cuts` (=[1]) must be exactly 2 cuts, e.g. `layout.cuts=[1,2]`, for u_shaped",
        ),
        (
            lambda: extended_vanilla(ABC, 1, 2),
            "`layout.cuts` (=1) must be exactly 2 cuts, e.g. `layout.cuts=[1,2]`, for extended_vanilla",
        ),
        (
            lambda: multi_hop(ABC, [1, 2], parties=["alice", "bob"]),
            "`parties` (=['alice', 'bob']) must be 3 different names for 2 cuts, alice first",
        ),
        (
            lambda: multi_hop(ABC, [1], parties=["bob", "alice"]),
            "`parties` (=['bob', 'alice']) must be 2 different names for 1 cuts, alice first",
        ),
        (
            lambda: multi_hop(ABC, [1], parties=["alice", "alice"]),
            "`parties` (=['alice', 'alice']) must be 2 different names for 1 cuts, alice first",
        ),
        (
            lambda: two_party(ABC, 1, labels="carol"),
            "`layout.labels` (=carol) must be one of the roles of two_party: alice, bob",
        ),
        (
            lambda: vertical(ABC, 1, num_alices=2, labels="alice"),
            "`layout.labels` (=alice) must be one of the roles of vertical: alice0, alice1, bob",
        ),
        (
            lambda: u_shaped(ABC, [1, 2], labels="bob"),
            "`layout.labels` (=bob) must be alice in a U: the loss is hers; use two_party otherwise",
        ),
        (
            lambda: vertical(ABC, 1, num_alices=1),
            "`num_alices` (=1) must be at least 2 to own columns; use two_party for one",
        ),
        (lambda: two_party(ABC, 1).takers(0), "`num_alices` (=0) must be a whole number of at least 1"),
        (
            lambda: Layout("mine", (Stage("top", "bob", ("x",), ("a",)),), {"x": "alice", "y": "bob"}),
            "stage `top` of bob reads `x`, which alice owns: data never crosses; give the stage to alice",
        ),
        (
            lambda: Layout("mine", (Stage("top", "bob", ("bottom",), ("a",)),), {"y": "bob"}),
            "stage `top` reads `bottom`, which no earlier stage computes",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()

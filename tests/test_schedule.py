"""Whose turn it is.

alice0 | a a |
alice1       | b |
alice2           | c c |
"""

import pytest
import torch

from splitlearn.schedule import Sequential
from splitlearn.sharing import Handoff

A1, A2, B1, C1, C2 = (torch.tensor([i]) for i in range(5))


def test_one_alice_after_the_other_trains_a_local_epoch():
    batches = {"alice2": (C1, C2), "alice1": (B1,), "alice0": (A1, A2)}
    steps = Sequential(["alice0", "alice1", "alice2"]).steps(batches)
    assert steps == [{"alice0": A1}, {"alice0": A2}, {"alice1": B1}, {"alice2": C1}, {"alice2": C2}]


def test_the_first_alice_begins_and_hands_over_with_her_optimizer():
    schedule = Sequential(["alice0", "alice1"])
    assert schedule.holder == "alice0"
    assert schedule.alice.optimizer_state == "carry"


def test_a_resumed_schedule_knows_who_has_the_weights_and_what_each_kept():
    schedule, resumed = (Sequential(["alice0", "alice1"], Handoff("keep")) for _ in range(2))
    schedule.holder, schedule.alice.kept = "alice1", {"alice0": {0: {"step": 3}}}
    resumed.load_state_dict(schedule.state_dict())
    assert (resumed.holder, resumed.alice.kept) == ("alice1", {"alice0": {0: {"step": 3}}})


def test_somebody_must_take_turns():
    with pytest.raises(ValueError, match=r"^`takers` \(=\(\)\) must name at least one party$"):
        Sequential([])

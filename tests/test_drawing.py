"""The drawing of a layout, line by line."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

from splitlearn import layout
from splitlearn.callbacks.layout_drawing import classes_found, draw
from splitlearn.models import mlp
from splitlearn.network import SplitNetwork
from splitlearn.schedules.schedule import Schedule
from splitlearn.train import train

MNIST = {"x": (1, 28, 28)}
HALVES = {"x0": (1, 28, 14), "x1": (1, 28, 14)}

DRAWINGS = {
    "two_party": (
        partial(layout.two_party, cut=2),
        MNIST,
        """
two_party
alice   x 1x28x28 -> hidden1 hidden2                           183,040 parameters
  | alice -> bob: activation 64 x 640 float32, 163,840 bytes, and its gradient back
bob     head <- y                                                6,410 parameters
""",
    ),
    "labels at alice": (
        partial(layout.two_party, cut=1, labels="alice"),
        MNIST,
        """
two_party
alice   x 1x28x28 -> hidden1                                   100,480 parameters
  | alice -> bob: activation 64 x 128 float32, 32,768 bytes, and its gradient back
bob     hidden2 head                                            88,970 parameters
  | alice -> bob: 64 labels, 512 bytes
""",
    ),
    "multi_hop": (
        partial(layout.multi_hop, cuts=[1, 2], parties=["alice", "bob", "claire"]),
        MNIST,
        """
multi_hop
alice   x 1x28x28 -> hidden1                                   100,480 parameters
  | alice -> bob: activation 64 x 128 float32, 32,768 bytes, and its gradient back
bob     hidden2                                                 82,560 parameters
  | bob -> claire: activation 64 x 640 float32, 163,840 bytes, and its gradient back
claire  head <- y                                                6,410 parameters
""",
    ),
    "u_shaped": (
        partial(layout.u_shaped, cuts=[1, 2]),
        MNIST,
        """
u_shaped
alice   x 1x28x28 -> hidden1                                   100,480 parameters
  | alice -> bob: activation 64 x 128 float32, 32,768 bytes, and its gradient back
bob     hidden2                                                 82,560 parameters
  | bob -> alice: activation 64 x 640 float32, 163,840 bytes, and its gradient back
alice   head <- y                                                6,410 parameters
""",
    ),
    "vertical": (
        partial(layout.vertical, cut=1, num_alices=2),
        HALVES,
        """
vertical
alice0  x0 1x28x14 -> hidden1                                   50,304 parameters
alice1  x1 1x28x14 -> hidden1                                   50,304 parameters
  | alice0 -> bob: activation 64 x 128 float32, 32,768 bytes, and its gradient back
  | alice1 -> bob: activation 64 x 128 float32, 32,768 bytes, and its gradient back
bob     hidden2 head <- y                                      170,890 parameters
""",
    ),
    "whole": (
        layout.whole,
        MNIST,
        """
whole
alice   x 1x28x28 -> hidden1 hidden2 head <- y                 189,450 parameters
""",
    ),
}


def tutorial(make_layout, shapes: dict[str, tuple[int, ...]]) -> tuple[SplitNetwork, dict[str, torch.Tensor]]:
    model = mlp(10, hidden_sizes=(128, 640))
    fields = {**{name: torch.zeros(2, *shape) for name, shape in shapes.items()}, "y": torch.zeros(2).long()}
    names = [name for name, _ in model.named_children()]
    return SplitNetwork(model, make_layout(names), fields), fields


@pytest.mark.parametrize(("make_layout", "shapes", "drawing"), DRAWINGS.values(), ids=DRAWINGS)
def test_a_layout_is_drawn(make_layout, shapes, drawing):
    network, fields = tutorial(make_layout, shapes)
    assert draw(network, fields, batch_size=64, schedule=Schedule(["alice0"])) == drawing.strip()


@pytest.mark.parametrize(
    ("num_alices", "names"),
    [
        (2, "alice0, alice1"),
        (5, "alice0, alice1, alice2, alice3, alice4"),
        (500, "alice0, alice1, ..., alice499"),
    ],
)
def test_several_alices_and_what_they_hand_on_are_drawn(num_alices, names):
    network, fields = tutorial(partial(layout.two_party, cut=2), MNIST)
    schedule = Schedule([f"alice{i}" for i in range(num_alices)])
    lines = draw(network, fields, batch_size=64, schedule=schedule).splitlines()
    assert lines[0] == f"two_party, in turns: {names}"
    assert lines[-1] == "  | each alice -> the next: weights, 732,160 bytes a turn"


def test_weights_that_are_handed_on_include_buffers():
    model = nn.Sequential(OrderedDict(bottom=nn.BatchNorm1d(3), top=nn.Linear(3, 2)))
    fields = {"x": torch.zeros(2, 3), "y": torch.zeros(2).long()}
    network = SplitNetwork(model, layout.two_party(["bottom", "top"], cut=1), fields)
    # weight, bias, mean and variance of 3 float32, and a counter of 8 bytes
    assert "weights, 56 bytes a turn" in draw(network, fields, batch_size=4, schedule=Schedule(["alice0", "alice1"]))


def test_drawing_leaves_the_network_as_it_was():
    network, fields = tutorial(partial(layout.two_party, cut=2), MNIST)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    draw(network, fields, batch_size=64, schedule=Schedule(["alice0"]))
    assert network.wire.ledger.num_bytes == {}
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_classes_are_told_with_their_numbers_and_rows():
    labels = torch.tensor([1, 0, 1, -1, 1])
    assert classes_found(labels, ["ill", "well", "dead"]) == ["classes: 0 ill (1 rows), 1 well (3), 2 dead (0)"]
    assert classes_found(labels, None) == classes_found(torch.tensor([-1, -1]), ["ill", "well"]) == []
    assert classes_found(labels, [f"c{i}" for i in range(30)])[0].endswith("18 c18 (0), 19 c19 (0), ...")


@pytest.mark.parametrize("engine", ["simulated", "processes"])
def test_a_run_says_the_classes_that_it_found(engine, configure, tmp_path, capfd):
    path = tmp_path / "patients.csv"
    path.write_text("age,diagnosis\n" + "".join(f"{i % 7},{i % 5 // 2}\n" for i in range(60)))
    table = ["data=table", f"data.root={path}", "data.label=diagnosis", "trainer.max_epochs=1", "logger=none"]
    train(configure(*table, "model.hidden_sizes=[4]", "metric=null", f"engine={engine}"))
    assert capfd.readouterr().out.count("classes: 0 0 (24 rows), 1 1 (24), 2 2 (12)\n") == 1

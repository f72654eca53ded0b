"""A value that is not finite is told where it comes from: a row, a weight, a block or the loss, and whose."""

import math
import re
from collections import OrderedDict

import pytest
import torch
from federated import run_tiny
from helpers import BLOCKS, make_rows
from runs import TWO_PARTY, make_data, make_learner, make_trainer
from test_remote_wire import queued
from torch import nn
from torch.utils.data import TensorDataset

from splitlearn.data import Source
from splitlearn.errors import DivergedError, InputError, UnsentError
from splitlearn.layout import u_shaped, whole
from splitlearn.schedules.sharing import Handoff, Personal
from splitlearn.training.finite import is_finite

MARK = 123.25  # of a row that a block minds


class Minds(nn.Module):
    """Passes on what it is given, and `value` at one place of a row that was marked."""

    def __init__(self, value: float = math.nan) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        marked = (x == MARK).flatten(1).any(1)
        spoiled = x.clone()
        spoiled.view(len(x), -1)[marked, 2] = self.value
        return spoiled


class Marks(nn.Module):
    """Marks, in what it passes on, the rows that have been marked in the data."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.linear = nn.Flatten(), nn.Linear(24, 10)

    def forward(self, x):
        out = self.linear(self.flatten(x))
        return torch.where((x == MARK).flatten(1).any(1, keepdim=True), MARK, out)


def minding(num_classes: int = 3, at: str = "block2", value: float = math.nan) -> nn.Sequential:
    """Blocks as in `net`, with one in the place `at` that minds the marked row."""
    torch.manual_seed(1)
    blocks = {"block1": Marks(), "block2": nn.Identity(), "block3": nn.Identity(), "head": nn.Linear(10, num_classes)}
    blocks[at] = nn.Sequential(Minds(value))
    return nn.Sequential(OrderedDict(blocks))


def fit(folder, learner, data, **trainer):
    make_trainer(folder, **trainer).fit(learner, datamodule=data)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_value_among_many_is_noticed_as_torch_notices_it(value, dtype):
    many = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(many)
    many[1, 77] = value
    assert not is_finite(many)
    assert not is_finite(many.view(-1)[1077])


@pytest.mark.parametrize("tensor", [torch.empty(0, 3), torch.arange(5), torch.tensor([True])])
def test_what_has_no_such_values_is_finite(tensor):
    assert is_finite(tensor)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    ("layout", "at", "party"),
    [
        *[(TWO_PARTY, "block2", "alice0"), (TWO_PARTY, "block3", "bob"), (u_shaped(BLOCKS, [1, 3]), "block2", "bob")],
        (whole(BLOCKS), "block3", "alice0"),
    ],
)
def test_the_first_block_that_makes_it_is_named_and_its_party(layout, at, party, micro_batches, tmp_path):
    data = make_data()
    row = int(data.shards["alice0"][5])
    data.rows.fields["x"][row] = MARK
    learner = make_learner(data, layout, model=minding(at=at), micro_batches=micro_batches)
    before = {name: value.clone() for name, value in learner.network.named_parameters()}
    told = rf"the loss is nan in the turn of alice0 at epoch 0, .* block `{at}` of {party} makes nan of row {row} of"
    with pytest.raises(DivergedError, match=told + r" the data, at \[2\]: lower `optimizer.lr`"):
        fit(tmp_path, learner, data)
    assert all(is_finite(value) for value in learner.network.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in learner.network.named_parameters())


def test_a_weight_is_named_and_its_party(tmp_path):
    data = make_data()
    learner = make_learner(data)
    weight, name = next((p, n) for n, p in learner.network.segments["top"].named_parameters())
    weight.data.view(-1)[1] = math.nan
    with pytest.raises(DivergedError, match=rf"the rows are finite, the weight `{re.escape(name)}` of bob is not"):
        fit(tmp_path, learner, data)


class Log(nn.CrossEntropyLoss):
    def forward(self, output, labels):
        return super().forward(output, labels) + (output.sum() - output.sum() - float(self.training)).log()


def test_the_loss_is_named_where_all_that_it_is_given_is_finite(tmp_path):
    data = make_data()
    learner = make_learner(data)
    learner.means.module = learner.loss = Log().train()
    with pytest.raises(DivergedError, match=r"network's output are finite, their loss is not: .*, or look at `loss`"):
        fit(tmp_path, learner, data)


@pytest.mark.parametrize("sharing", [Handoff(), Personal()], ids=["agreed", "personal"])
def test_so_it_is_in_a_validation(sharing, tmp_path):
    data = make_data(val_rows=9, num_alices=2)
    row = int(data.val_ids[5])
    data.rows.fields["x"][row] = MARK
    learner = make_learner(data, model=minding(at="block3"), schedule={"alice": sharing})
    told = rf"^val/loss is nan after 10 mini-batches: .* block `block3` of bob makes nan of row {row} of the data"
    with pytest.raises(DivergedError, match=told):
        fit(tmp_path, learner, data, max_epochs=1)


def source(row: int) -> Source:
    x, y = make_rows(57)
    x[row] = MARK
    return Source(TensorDataset(x[:50], y[:50]), TensorDataset(x[50:], y[50:]), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "at", "told"),
    [
        (
            3,
            "block2",
            r"alice0: alice0 has an activation of mini-batch \d+ of epoch 0 for bob that is not finite: rows",
        ),
        (3, "block3", r"bob: the loss is nan in the turn of alice0 at epoch 0, mini-batch \d+: what others sent is"),
        (54, "block2", r"alice0: alice0 has an activation of mini-batch 0 of epoch 0 for bob that is not finite"),
    ],
)
def test_between_processes_each_looks_at_its_own(row, at, told, configure, tmp_path):
    asked = ["model._target_=test_finite.minding", f"+model.at={at}", "engine=processes"]
    rows = ["data.source._target_=test_finite.source", f"+data.source.row={row}"]
    with pytest.raises(InputError, match=told):
        run_tiny(configure, tmp_path, *asked, *rows)


@pytest.mark.parametrize("kind", ["activation", "weights", "gradient", "optimizer_state"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_between_processes_it_is_neither_sent_nor_taken(kind, value):
    wires, bad = queued(), torch.tensor([1.0, value, 2.0])
    name = "w/exp_avg" if kind == "optimizer_state" else "w"
    with pytest.raises(UnsentError, match=r"^alice0 has .* of mini-batch 0 of epoch 0 for bob that is not finite"):
        wires["alice0"].carry_all({name: bad}, "alice0", "bob", kind)
    wires = queued()
    wires["alice0"]._tell([name], "bob")
    wires["alice0"]._send(bad, "bob", kind)
    with pytest.raises(DivergedError, match=r"^alice0 sent bob .* of mini-batch 0 of epoch 0 that is not finite: look"):
        wires["bob"].carry_all({"w": torch.zeros(3)}, "alice0", "bob", kind)

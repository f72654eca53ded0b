"""One object at several places of a model, tied weights, unsaved buffers: all as in the uncut network."""

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from federated import Drifting
from helpers import BLOCKS, SGD, Unsplit, differences, make_network, make_rows, plainly, train
from runs import make_data, make_learner, make_trainer
from torch import Tensor, nn

from splitlearn.costs.by_cut import Terms, compare, measure
from splitlearn.costs.flops import cost_of
from splitlearn.layout import Layout, two_party, u_shaped, vertical
from splitlearn.network import SplitNetwork

NAMES = ("flat", "a", "b", "c", "d", "head")
TIED = ("flat", "first", "act", "second", "act2", "third", "head")


def twice(tie: str = "third") -> nn.Sequential:
    """ReLU and a Linear that stand twice, the Linear as `second` and at the place `tie`."""
    torch.manual_seed(1)
    act, linear = nn.ReLU(), nn.Linear(8, 8)
    places = OrderedDict(flat=nn.Flatten(), first=nn.Linear(24, 8), act=act, second=linear, act2=act)
    places["third"] = linear if tie == "third" else nn.Linear(8, 8)
    places["head"] = nn.Linear(8, 3)
    return nn.Sequential(places)


def tied_weight(first: str, second: str) -> nn.Sequential:
    """Blocks of their own, two of which share the parameter `weight`."""
    torch.manual_seed(1)
    blocks = OrderedDict(flat=nn.Flatten(), a=nn.Linear(24, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))
    blocks["d"], blocks["head"] = nn.Linear(8, 8), nn.Linear(8, 3)
    blocks[second].weight = blocks[first].weight
    return nn.Sequential(blocks)


def equals_uncut(layout: Layout, model: nn.Sequential, num_alices: int = 1) -> None:
    uncut = Unsplit(copy.deepcopy(model))
    run = train(layout, model, num_alices=num_alices)
    optimizer = SGD(uncut.parameters())
    assert run.losses == plainly(uncut, lambda taker: [optimizer], run)
    assert differences(uncut.model.state_dict(), run.weights) == []


@pytest.mark.parametrize("cut", ["second", "act"])
@pytest.mark.parametrize("num_alices", [1, 3])
def test_an_object_that_stands_twice_keeps_both_places(cut, num_alices):
    tie = "third" if cut == "act" else None  # with `second` and `third` on both sides of the cut it would be refused
    equals_uncut(two_party(TIED, cut), twice(tie), num_alices)


def test_a_dropout_that_stands_twice_draws_at_each_place():
    drop = nn.Dropout(0.5)
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), drop=drop, again=drop, head=nn.Linear(24, 3)))
    network = make_network(two_party(("flat", "drop", "again", "head"), 3), model).train()
    out = network.segments["bottom"](torch.ones(2, 1, 4, 6), (0, 0))
    assert network.segments["bottom"].drawing == {"drop", "again"}
    assert set(out.flatten().tolist()) == {0.0, 4.0}  # doubled twice where it came through twice
    assert (out == 0).float().mean() > 0.6


def test_a_block_that_stands_twice_costs_its_flops_twice_and_its_weights_once():
    x, _ = make_rows(2)
    once, blocks = copy.deepcopy(twice()), measure(twice(), x, is_real=False)
    assert [block.name for block in blocks] == list(TIED)
    by_name = {block.name: block for block in blocks}
    assert by_name["third"].flops == by_name["second"].flops == 2 * 3 * 8 * 8
    assert (by_name["second"].parameters, by_name["third"].parameters) == (72, 0)
    assert cost_of(once, [x], False).forward == sum(2 * 2 * n for n in (24 * 8, 8 * 8, 8 * 8, 8 * 3))
    cuts = compare(blocks, Terms([100], 4))
    assert [cut.name for cut in cuts] == ["flat", "first", "act", "third"]  # none between the tied


@pytest.mark.parametrize(
    ("layout", "model", "places"),
    [
        (two_party(TIED, "second"), twice(), "`second.weight` of alice and `third.weight` of bob"),
        (two_party(NAMES, "b"), tied_weight("b", "c"), "`b.weight` of alice and `c.weight` of bob"),
        (u_shaped(NAMES, [3, 4]), tied_weight("b", "c"), "`b.weight` of alice and `c.weight` of bob"),
        (vertical(NAMES, 3, 2), tied_weight("b", "c"), "`b.weight` of alice0 and alice1 and `c.weight` of bob"),
    ],
    ids=["a block", "a weight", "a U", "vertical"],
)
def test_what_two_parties_would_hold_is_refused_with_both_places(layout, model, places):
    with pytest.raises(ValueError, match=f"^{places} are one tensor .*: untie them, or take a layout and a cut"):
        make_network(layout, model)


def test_memory_that_two_parties_would_share_is_refused():
    model = tied_weight("b", "b")
    model.c.weight = nn.Parameter(model.b.weight.data)  # another parameter, the same memory
    with pytest.raises(ValueError, match=r"`b.weight` of alice and `c.weight` of bob are one tensor"):
        make_network(two_party(NAMES, "b"), model)


@pytest.mark.parametrize("num_alices", [1, 2])
@pytest.mark.parametrize(("first", "second"), [("b", "c"), ("b", "d")], ids=["within a segment", "head and tail"])
def test_weights_that_are_tied_within_a_role_train_as_uncut(first, second, num_alices):
    layout = u_shaped(NAMES, [3, 4])
    if second == "c":
        layout = two_party(NAMES, "c")
    equals_uncut(layout, tied_weight(first, second), num_alices)


def test_what_is_tied_within_a_bottom_is_tied_in_each_alices_copy():
    layout = vertical(("flat", "b", "c", "head"), 3, 2)
    linear = nn.Linear(12, 12)
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), b=linear, c=linear, head=nn.Linear(24, 3)))
    x, y = make_rows(2)
    network = SplitNetwork(model, layout, {"x0": x[..., :3], "x1": x[..., 3:], "y": y})
    for bottom in (network.segments["bottom0"], network.segments["bottom1"]):
        assert bottom.b.weight is bottom.c.weight
    assert network.segments["bottom0"].b.weight is not network.segments["bottom1"].b.weight


def test_a_tied_weight_is_handed_on_once():
    run = train(two_party(NAMES, "c"), tied_weight("b", "c"), num_alices=2, epochs=1)
    weights = 24 * 8 + 8 + (8 * 8) + 8 + 8  # of `a`, of `b`, and the bias of `c`
    assert run.learner.ledger.table()["alice0->alice1"]["weights"] == 4 * weights


def counting() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        OrderedDict(block1=nn.Flatten(), block2=nn.Linear(24, 8), block3=Drifting(), head=nn.Linear(8, 3))
    )


def test_a_buffer_that_no_state_dict_has_is_handed_on():
    run = train(two_party(BLOCKS, 3), counting(), num_alices=2, epochs=1)
    assert run.learner.ledger.table()["alice0->alice1"]["weights"] == 4 * (24 * 8 + 8 + 1)
    equals_uncut(two_party(BLOCKS, 3), counting(), num_alices=2)


def test_a_resumed_run_has_the_buffers_that_no_state_dict_has(tmp_path: Path):
    layout, data = two_party(BLOCKS, 3), make_data()

    def run(epochs: int, **fit: object) -> tuple[float, pl.Trainer]:
        learner = make_learner(data, layout, model=counting())
        trainer = make_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(learner, datamodule=data, **fit)
        return learner.network.segments["bottom"].block3.scale.item(), trainer

    whole, _ = run(2)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed == whole > 1.15


def test_who_sends_raw_rows_is_warned():
    data = make_data()
    names = ("flat", "act", "second", "head")
    model = nn.Sequential(
        OrderedDict(zip(names, (nn.Flatten(), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 3)), strict=True))
    )
    with pytest.warns(UserWarning, match="^alice sends raw data: flat, act, all that she has before the cut"):
        make_learner(data, two_party(names, "act"), model=model)


def test_who_sends_what_weights_have_changed_is_not(recwarn):
    make_learner(make_data(), model=None)
    assert not [w for w in recwarn if "raw data" in str(w.message)]


def test_complex_numbers_are_refused():
    class Fourier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x.flatten(1))

    model = nn.Sequential(OrderedDict(fourier=Fourier(), head=nn.Linear(24, 3)))
    with pytest.raises(ValueError, match=r"^block `fourier` computes complex numbers, .*: take torch.view_as_real"):
        make_network(two_party(("fourier", "head"), 1), model)

"""Nothing is lost by splitting: every layout trains to the same bits as the unsplit network.

The reference is a plain torch loop over the unsplit network, with one optimizer for all of it, fed the same rows in the
same order. Weights, buffers and losses are compared with `torch.equal`, never `allclose`. The net has a convolution,
batch norm in two and four dimensions and dropout; the optimizers have momentum and weight decay.

What dropout draws is by definition a function of (seed, block, epoch, mini-batch): a block that draws begins with
`torch.manual_seed(derive(seed, "draw", block, epoch, place))`. The reference seeds itself in the same way.
"""

import copy
from collections import OrderedDict

import pytest
import torch
from helpers import (
    ADAM,
    BLOCKS,
    SGD,
    Unsplit,
    differences,
    make_network,
    make_rows,
    net,
    plainly,
    run_blocks,
    train,
    weights_of,
)
from torch import nn

from splitlearn import layout as layouts
from splitlearn.layout import multi_hop, two_party, u_shaped, whole
from splitlearn.models.layers import dense_blocks, in_order, lazily

CHAINS = {
    "whole": whole(BLOCKS),
    "two_party 1": two_party(BLOCKS, 1),
    "two_party 2": two_party(BLOCKS, 2),
    "two_party 3": two_party(BLOCKS, 3),
    "two_party, labels at alice": two_party(BLOCKS, 2, labels="alice"),
    "multi_hop 1 2": multi_hop(BLOCKS, [1, 2]),
    "multi_hop 1 2 3": multi_hop(BLOCKS, [1, 2, 3]),
    "u_shaped 1 2": u_shaped(BLOCKS, [1, 2]),
    "u_shaped 2 3": u_shaped(BLOCKS, [2, 3]),
}
COLUMNS = {
    "vertical 1": layouts.vertical(BLOCKS, 1, num_alices=2),
    "extended_vanilla 1 2": layouts.extended_vanilla(BLOCKS, [1, 2], num_alices=2),
    "extended_vanilla 1 3": layouts.extended_vanilla(BLOCKS, [1, 3], num_alices=2),
}
every_chain = pytest.mark.parametrize("layout", CHAINS.values(), ids=CHAINS)
both_optimizers = pytest.mark.parametrize("make", [SGD, ADAM], ids=["sgd", "adam"])


def assert_same_losses(losses, expected):
    assert len(losses) == len(expected)
    assert torch.equal(torch.stack(losses), torch.stack(expected))


@every_chain
@both_optimizers
def test_a_chain_equals_the_unsplit_network(layout, make):
    run = train(layout, make=make)
    unsplit = net()
    optimizer = make(unsplit.parameters())
    losses = plainly(Unsplit(unsplit), lambda taker: [optimizer], run)
    assert len(differences(run.weights, net().state_dict())) == len(run.weights) == 18  # all were trained
    assert differences(run.weights, unsplit.state_dict()) == []
    assert len(losses) == run.trainer.global_step == 10
    assert_same_losses(run.losses, losses)
    last_epoch = zip(losses[5:], [4, 4, 4, 4, 3], strict=True)
    assert run.learner.mean_loss == sum(loss.item() * size for loss, size in last_epoch) / 19


class Branches(nn.Module):
    """The two halves of a picture through a bottom of their own, joined, and on through the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom0, self.bottom1, self.top = net().block1, net().block1, net()[1:]

    def forward(self, x, number):
        left = run_blocks([("bottom0.block1", self.bottom0)], x[..., :3].contiguous(), number)
        right = run_blocks([("bottom1.block1", self.bottom1)], x[..., 3:].contiguous(), number)
        return run_blocks(self.top.named_children(), torch.cat([left, right], dim=1), number)


@pytest.mark.parametrize("layout", COLUMNS.values(), ids=COLUMNS)
@both_optimizers
def test_owners_of_columns_equal_one_network_with_branches(layout, make):
    run = train(layout, make=make)
    branches = Branches()
    optimizer = make(branches.parameters())
    assert_same_losses(run.losses, plainly(branches, lambda taker: [optimizer], run))
    segments = run.learner.network.segments
    bottoms = [segments[name].block1.state_dict() for name in ("bottom0", "bottom1")]
    assert differences(bottoms[0], branches.bottom0.state_dict()) == []
    assert differences(bottoms[1], branches.bottom1.state_dict()) == []
    assert "0.weight" in differences(*bottoms)
    top = {k: v for name, segment in segments.items() if "bottom" not in name for k, v in segment.state_dict().items()}
    assert differences(top, branches.top.state_dict()) == []


def test_each_role_may_have_an_optimizer_of_its_own():
    run = train(two_party(BLOCKS, 2), make=SGD, optimizers={"bob": ADAM})
    unsplit = net()
    optimizers = [SGD(unsplit[:2].parameters()), ADAM(unsplit[2:].parameters())]
    plainly(Unsplit(unsplit), lambda taker: optimizers, run)
    assert differences(run.weights, unsplit.state_dict()) == []


@lazily()
def lazy_mlp():
    """Its weights are drawn by the network, a block at a time."""
    return in_order(dense_blocks("hidden", (9, 8, 7), num_classes=3, dropout=0.4))


NAMES = ("hidden1", "hidden2", "hidden3", "head")
SAME = {
    "two_party 3": two_party(NAMES, 3),
    "two_party hidden1": two_party(NAMES, "hidden1"),
    "multi_hop": multi_hop(NAMES, [1, 3]),
    "multi_hop by name": multi_hop(NAMES, ["hidden1", "hidden2", "hidden3"]),
    "u_shaped": u_shaped(NAMES, [1, 2]),
    "whole": whole(NAMES),
}


@pytest.fixture(scope="module")
def cut_in_the_middle():
    return train(two_party(NAMES, 2), lazy_mlp())


@pytest.mark.parametrize("layout", SAME.values(), ids=SAME)
def test_the_cut_changes_neither_the_initial_weights_nor_the_training(layout, cut_in_the_middle):
    before = weights_of(make_network(layout, lazy_mlp()))
    assert differences(before, weights_of(make_network(two_party(NAMES, 2), lazy_mlp()))) == []
    run = train(layout, lazy_mlp())
    assert len(differences(run.weights, before)) == 8  # all were trained
    assert differences(run.weights, cut_in_the_middle.weights) == []
    assert_same_losses(run.losses, cut_in_the_middle.losses)


def carried(make, bottom):
    """One optimizer, whoever has the turn."""
    optimizer = make(bottom)
    return lambda taker: optimizer


def kept(make, bottom):
    """Each Alice has an optimizer of her own over the weights that go round."""
    optimizers = {f"alice{i}": make(bottom) for i in range(5)}
    return optimizers.__getitem__


def reset(make, bottom):
    """A new optimizer at every hand-over."""
    held = {"alice0": make(bottom)}

    def of(taker):
        if taker not in held:
            held.clear()
            held[taker] = make(bottom)
        return held[taker]

    return of


@pytest.mark.parametrize("layout", [two_party(BLOCKS, 2), u_shaped(BLOCKS, [1, 3])], ids=["two_party", "u_shaped"])
@pytest.mark.parametrize(("policy", "bottom_optimizer"), [("carry", carried), ("keep", kept), ("reset", reset)])
@both_optimizers
def test_five_alices_in_turn_equal_one_loop_over_their_batches(layout, policy, bottom_optimizer, make):
    """Two epochs, so that the last Alice hands over to the first and `keep` finds an earlier state."""
    rows = make_rows(25)
    run = train(layout, rows=rows, num_alices=5, batch_size=3, optimizer_state=policy, make=make)
    takers = [taker for epoch in run.steps for step in epoch for taker in step.batches]
    assert takers == [f"alice{i}" for i in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)] * 2
    unsplit = net()
    owned = {role: [n for s in layout.stages if s.role == role for n in s.blocks] for role in ("alice", "bob")}
    alice, bob = ([p for name in owned[role] for p in unsplit.get_submodule(name).parameters()] for role in owned)
    of, top = bottom_optimizer(make, alice), make(bob)
    losses = plainly(Unsplit(unsplit), lambda taker: [of(taker), top], run, rows)
    assert differences(run.weights, unsplit.state_dict()) == []
    assert_same_losses(run.losses, losses)


@both_optimizers
def test_five_alices_who_carry_all_equal_one_optimizer_for_the_whole(make):
    rows = make_rows(25)
    run = train(two_party(BLOCKS, 2), rows=rows, num_alices=5, batch_size=3, make=make)
    unsplit = net()
    optimizer = make(unsplit.parameters())
    plainly(Unsplit(unsplit), lambda taker: [optimizer], run, rows)
    assert differences(run.weights, unsplit.state_dict()) == []


def test_alices_of_one_sample_each_train():
    rows, layout = make_rows(3), two_party(NAMES, 2)
    run = train(layout, lazy_mlp(), rows=rows, num_alices=3)
    sizes = [{taker: len(ids) for taker, ids in step.batches.items()} for step in run.steps[1]]
    assert sizes == [{"alice0": 1}, {"alice1": 1}, {"alice2": 1}]
    assert run.trainer.global_step == 6
    assert len(differences(run.weights, weights_of(make_network(layout, lazy_mlp())))) == 8


def frozen():
    model = net()
    model.block1.requires_grad_(False)
    return model


def without_parameters():
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), block1=nn.Linear(24, 7), head=nn.Linear(7, 3)))


@pytest.mark.parametrize(
    ("layout", "model", "num_bytes"),
    [
        (two_party(BLOCKS, 1), frozen, {"alice0->bob": {"activation": 2 * 19 * 48 * 4}}),
        (
            multi_hop(BLOCKS, [1, 2]),
            frozen,
            {
                "alice0->bob": {"activation": 2 * 19 * 48 * 4},
                "bob->carol": {"activation": 2 * 19 * 10 * 4},
                "carol->bob": {"gradient": 2 * 19 * 10 * 4},
            },
        ),
        (
            two_party(("flatten", "block1", "head"), 1),
            without_parameters,
            {"alice0->bob": {"activation": 2 * 19 * 24 * 4}},
        ),
    ],
    ids=["frozen", "frozen, multi_hop", "parameterless"],
)
def test_a_bottom_with_nothing_to_train_gets_no_gradient(layout, model, num_bytes):
    torch.manual_seed(0)
    model = model()
    unsplit, before = copy.deepcopy(model), copy.deepcopy(model)
    run = train(layout, model)
    optimizer = SGD(p for p in unsplit.parameters() if p.requires_grad)
    assert_same_losses(run.losses, plainly(Unsplit(unsplit), lambda taker: [optimizer], run))
    assert differences(run.weights, unsplit.state_dict()) == []
    trained = {name.split(".")[0] for name, p in before.named_parameters() if not torch.equal(p, run.weights[name])}
    assert trained == {name for name, p in before.named_children() if any(p.requires_grad for p in p.parameters())}
    assert run.learner.ledger.table() == num_bytes


@pytest.mark.parametrize("often", [{}, {"val_check_interval": 2}], ids=["every epoch", "every other mini-batch"])
@pytest.mark.parametrize("layout", [two_party(BLOCKS, 2), u_shaped(BLOCKS, [1, 2])], ids=["two_party", "u_shaped"])
def test_evaluation_changes_no_bit_of_the_training(layout, often):
    """Batch norm would move, dropout would draw, and training would go on in evaluation mode."""
    with_it = train(layout, val_fraction=0.25, trainer=often)
    without = train(layout, val_fraction=0.25, trainer={"limit_val_batches": 0})
    assert differences(with_it.weights, without.weights) == []
    assert_same_losses(with_it.losses, without.losses)
    assert with_it.learner.ledger.table() == without.learner.ledger.table()
    assert with_it.learner.evaluation_ledger.table() != without.learner.evaluation_ledger.table() == {}

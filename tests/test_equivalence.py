"""Nothing is lost by splitting: every layout trains to the same bits as the unsplit network.

The reference is a plain torch loop over the unsplit network, with one optimizer for all of it, fed the same rows in the
same order. Weights, buffers and losses are compared with `torch.equal`, never `allclose`. The net has a convolution,
batch norm in two and four dimensions and dropout; the optimizers have momentum and weight decay.

What dropout draws is by definition a function of (seed, block, epoch, mini-batch): a block that draws begins with
`torch.manual_seed(derive(seed, "draw", block, epoch, place))`. The reference seeds itself in the same way.
"""

import copy
from collections import OrderedDict
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from helpers import (
    ADAM,
    BLOCKS,
    SGD,
    Thaw,
    Unsplit,
    dealt,
    differences,
    make_network,
    make_rows,
    net,
    plainly,
    routed,
    run_blocks,
    smooth,
    train,
    weights_of,
)
from torch import nn

from splitlearn import layout as layouts
from splitlearn.layout import multi_hop, two_party, u_shaped, whole
from splitlearn.models.layers import dense_blocks, in_order, lazily
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Handoff, Personal, Shared

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


five_alices = partial(train, rows=make_rows(25), num_alices=5, batch_size=3)
policies = pytest.mark.parametrize("policy", ["reset", "keep", "carry"])


def assert_equal_to_one_loop(run, layout, make, bottom_optimizer):
    """One net, one optimizer for the top, and for the bottom whatever `bottom_optimizer` says."""
    unsplit = net()
    owned = {role: [n for s in layout.stages if s.role == role for n in s.blocks] for role in ("alice", "bob")}
    alice, bob = ([p for name in owned[role] for p in unsplit.get_submodule(name).parameters()] for role in owned)
    of, top = bottom_optimizer(make, alice), make(bob)
    losses = plainly(Unsplit(unsplit), lambda taker: [of(taker), top], run, make_rows(25))
    assert differences(run.weights, unsplit.state_dict()) == []
    assert_same_losses(run.losses, losses)


def takers_of(run):
    """In each epoch, whose mini-batches those are."""
    return ["".join(taker[-1] for step in steps for taker in step.batches) for steps in run.steps]


@pytest.mark.parametrize("layout", [two_party(BLOCKS, 2), u_shaped(BLOCKS, [1, 3])], ids=["two_party", "u_shaped"])
@pytest.mark.parametrize(("policy", "bottom_optimizer"), [("carry", carried), ("keep", kept), ("reset", reset)])
@both_optimizers
def test_five_alices_in_turn_equal_one_loop_over_their_batches(layout, policy, bottom_optimizer, make):
    """Two epochs, so that the last Alice hands over to the first and `keep` finds an earlier state."""
    run = five_alices(layout, optimizer_state=policy, make=make)
    assert takers_of(run) == ["0011223344", "0011223344"]
    assert_equal_to_one_loop(run, layout, make, bottom_optimizer)


@pytest.mark.parametrize(
    ("schedule", "takers"),
    [
        ({"turn": 1}, ["0123401234", "0123401234"]),
        ({"order": "cyclic"}, ["0011223344", "1122334400"]),
        ({"order": "cyclic", "turn": 1, "local_epochs": 2}, ["01234" * 4, "12340" * 4]),
        ({"order": "random"}, None),
        ({"local_epochs": 2}, ["00001111222233334444"] * 2),
        ({"participation": 0.6, "order": "random"}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize(("policy", "bottom_optimizer"), [("keep", kept), ("reset", reset)])
def test_so_do_five_alices_in_any_order_of_turns(schedule, takers, policy, bottom_optimizer):
    layout = two_party(BLOCKS, 2)
    run = five_alices(layout, make=ADAM, schedule={"alice": Handoff(policy), **schedule})
    if takers is None:
        assert "0011223344" not in takers_of(run)
    else:
        assert takers_of(run) == takers
    assert_equal_to_one_loop(run, layout, ADAM, bottom_optimizer)


@pytest.mark.parametrize("policy", ["carry", "keep"])
def test_the_way_over_a_server_changes_no_bit(policy):
    runs = [
        five_alices(u_shaped(BLOCKS, [1, 3]), make=ADAM, schedule={"alice": Handoff(policy, handoff)})
        for handoff in ("peer", "server")
    ]
    assert differences(runs[0].weights, runs[1].weights) == []
    assert_same_losses(runs[0].losses, runs[1].losses)


@both_optimizers
def test_five_alices_who_carry_all_equal_one_optimizer_for_the_whole(make):
    run = five_alices(two_party(BLOCKS, 2), make=make)
    unsplit = net()
    optimizer = make(unsplit.parameters())
    plainly(Unsplit(unsplit), lambda taker: [optimizer], run, make_rows(25))
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


UNEQUAL = {"partition": dealt(8, 6, 5, 3, 3)}  # three, two or one mini-batch, short ones among them
FEW = {"data": UNEQUAL, "make": ADAM}
PLAIN = partial(torch.optim.SGD, lr=0.1)
UNCUT = whole(BLOCKS)
CUTS = (two_party(BLOCKS, 1), two_party(BLOCKS, 3), u_shaped(BLOCKS, [1, 3]), multi_hop(BLOCKS, [1, 2, 3]))


def mean_of(states, weights):
    """The weighted mean of the tensors of some parties, in double precision; of counts the largest.

    Who lacks one that another has counts as zeros.
    """

    weights = list(weights)

    def mean(name):
        values = {i: state[name] for i, state in enumerate(states) if name in state}
        first = next(iter(values.values()))
        if name == "step" or not first.is_floating_point():
            return torch.stack([*values.values()]).amax(0)
        return (sum(weights[i] * value.double() for i, value in values.items()) / sum(weights)).to(first.dtype)

    return {name: mean(name) for name in dict.fromkeys(name for state in states for name in state)}


class Side:
    """A side of a cut in plain torch: `shared`, or a copy for each Alice, `averaged` behind a round or `personal`."""

    def __init__(self, side, how, make, takers, policy):
        self.how, self.make, self.policy = how, make, policy
        self.of = {taker: side if how == "shared" else copy.deepcopy(side) for taker in takers}
        self.optimizers = {taker: make(own.parameters()) for taker, own in self.of.items()}
        if how == "shared":
            self.optimizers = dict.fromkeys(takers, self.optimizers[takers[0]])

    def end_round(self, num_rows):
        if self.how != "averaged":
            return
        weights = mean_of([self.of[taker].state_dict() for taker in num_rows], num_rows.values())
        states = [self.optimizers[taker].state_dict()["state"] for taker in num_rows]
        for taker, own in self.of.items():
            own.load_state_dict(weights)
            if self.policy == "reset":
                self.optimizers[taker] = self.make(own.parameters())
            elif self.policy == "carry":
                state = {i: mean_of([state[i] for state in states], num_rows.values()) for i in states[0]}
                held = self.optimizers[taker].state_dict()
                self.optimizers[taker].load_state_dict({**held, "state": state})


def side_by_side(run, rows, make, bottoms, tops, policy="reset", model=net, cut=2):
    """Every Alice with a net of her own, one after the other, then the average. Return the two sides."""
    x, y = rows
    takers = list(run.data.shards)
    sides = [Side(model()[:cut], bottoms, make, takers, policy), Side(model()[cut:], tops, make, takers, policy)]
    for epoch, steps in enumerate(run.steps):
        num_rows = {}
        for place, step in enumerate(steps):
            ((taker, ids),) = step.batches.items()
            mine = [side.of[taker].train() for side in sides]
            optimizers = [side.optimizers[taker] for side in sides]
            blocks = [block for side in mine for block in side.named_children()]
            for side in mine:
                side.zero_grad()
            nn.functional.cross_entropy(run_blocks(blocks, x[ids], (epoch, place)), y[ids]).backward()
            for optimizer in optimizers:
                optimizer.step()
            num_rows[taker] = num_rows.get(taker, 0) + len(ids)
        for side in sides:
            side.end_round(num_rows)
    return sides


def weights_at(sides, taker):
    return {name: value for side in sides for name, value in side.of[taker].state_dict().items()}


MIXED = {"local_epochs": 2, "participation": 0.6, "order": "random"}


@policies
@both_optimizers
@pytest.mark.parametrize("more", [{}, MIXED], ids=["all", "three of five, two local epochs"])
def test_fedavg_equals_one_written_by_hand(make, policy, more):
    run = five_alices(UNCUT, **{**FEW, "make": make}, schedule={"alice": Average(policy), **more})
    assert len(run.losses) == run.trainer.global_step == sum(map(len, run.steps))
    sides = side_by_side(run, make_rows(25), make, "averaged", "averaged", policy)
    assert differences(run.weights, weights_at(sides, "alice0")) == []
    assert run.weights["block1.1.num_batches_tracked"].dtype == torch.int64


@policies
@both_optimizers
def test_splitfed_v1_equals_fedavg_wherever_it_is_cut(make, policy):
    """Three of the five Alices in each of two rounds, in a random order, each for two local epochs."""
    few = {**FEW, "make": make}
    fedavg = five_alices(UNCUT, **few, schedule={"alice": Average(policy), **MIXED})
    for layout in CUTS:
        v1 = five_alices(layout, **few, schedule={"alice": Average(policy), "bob": Average(policy), **MIXED})
        assert differences(v1.weights, fedavg.weights) == []
        assert_same_losses(v1.losses, fedavg.losses)


@both_optimizers
@pytest.mark.parametrize("turn", ["epoch", 1])
def test_so_it_does_with_everybody_and_with_a_round_every_mini_batch(make, turn):
    few = {**FEW, "make": make}
    fedavg = five_alices(UNCUT, **few, schedule={"alice": Average(), "turn": turn})
    for layout in CUTS:
        v1 = five_alices(layout, **few, schedule={"alice": Average(), "bob": Average(), "turn": turn})
        assert differences(v1.weights, fedavg.weights) == []


@policies
@both_optimizers
def test_splitfed_v2_equals_one_top_and_averaged_bottoms(make, policy):
    schedule = {"alice": Average(policy), "order": "random"}
    run = five_alices(two_party(BLOCKS, 2), **{**FEW, "make": make}, schedule=schedule)
    sides = side_by_side(run, make_rows(25), make, "averaged", "shared", policy)
    assert differences(run.weights, weights_at(sides, "alice0")) == []


def own_weights(run):
    """Each Alice's bottom where they are personal."""
    sharing, mine = run.learner.rounds.sharings["alice"], run.learner.rounds.weights["alice"]
    held = {**{taker: own["weights"] for taker, own in sharing.own.items()}, sharing.holder: mine.tensors}
    return {t: {name.split(".", 1)[1]: w for name, w in weights.items()} for t, weights in held.items()}


@policies
@both_optimizers
def test_splitfed_v3_equals_personal_bottoms_and_averaged_tops(make, policy):
    schedule = {"alice": Personal(), "bob": Average(policy)}
    run = five_alices(two_party(BLOCKS, 2), **{**FEW, "make": make}, schedule=schedule)
    bottoms, tops = side_by_side(run, make_rows(25), make, "personal", "averaged", policy)
    top = tops.of["alice0"].state_dict()
    assert differences({name: run.weights[name] for name in top}, top) == []
    mine = own_weights(run)
    assert sorted(mine) == sorted(bottoms.of)
    for taker, bottom in bottoms.of.items():
        assert differences(mine[taker], bottom.state_dict()) == []
    assert "block1.0.weight" in differences(mine["alice0"], mine["alice1"])


@pytest.mark.parametrize(("make", "policy"), [(PLAIN, "reset"), (SGD, "carry"), (ADAM, "carry")])
def test_one_alice_makes_averaging_schemes_sequential_and_centralised(make, policy):
    """The mean of one is herself."""
    cut, average = two_party(BLOCKS, 2), {"alice": Average(policy), "order": "random"}
    centralised = train(UNCUT, make=make, schedule={"alice": Shared()})
    others = {
        "sequential": train(cut, make=make),
        "splitfed_v2": train(cut, make=make, schedule=average),
        "splitfed_v1": train(cut, make=make, schedule={**average, "bob": Average(policy)}),
        "splitfed_v3": train(cut, make=make, schedule={"alice": Personal(), "bob": Average(policy)}),
        "fedavg": train(UNCUT, make=make, schedule=average),
        "large_batch": train(UNCUT, make=make, schedule={"alice": MeanGradient(), "turn": "step"}),
    }
    for name, run in others.items():
        assert differences(run.weights, centralised.weights) == [], name
        assert_same_losses(run.losses, centralised.losses)


@pytest.mark.parametrize("layout", [UNCUT, two_party(BLOCKS, 2)], ids=["fedavg", "splitfed_v1"])
def test_alices_of_one_row_and_of_a_short_last_batch_count_as_what_they_have(layout):
    shared = {"alice": Average()} if layout is UNCUT else {"alice": Average(), "bob": Average()}
    data = {"partition": dealt(1, 5, 3)}
    run = train(layout, smooth(), make_rows(9), num_alices=3, batch_size=2, schedule=shared, data=data)
    assert [len(ids) for step in run.steps[0] for ids in step.batches.values()] == [1, 2, 2, 1, 2, 1]
    sides = side_by_side(run, make_rows(9), SGD, "averaged", "averaged", model=smooth)
    assert differences(run.weights, weights_at(sides, "alice0")) == []


IDLE = partial(torch.optim.SGD, lr=0.0, momentum=0.9)
SCHEMES = {
    "sequential": (two_party(BLOCKS, 2), {}),
    "splitfed_v1": (two_party(BLOCKS, 2), {"alice": Average(), "bob": Average()}),
    "splitfed_v2": (two_party(BLOCKS, 2), {"alice": Average("carry"), "order": "random"}),
    "splitfed_v3": (two_party(BLOCKS, 2), {"alice": Personal(), "bob": Average("keep")}),
    "parallel": (two_party(BLOCKS, 2), {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"}),
    "fedavg": (UNCUT, {"alice": Average()}),
    "large_batch": (UNCUT, {"alice": MeanGradient(), "turn": "step"}),
}


@pytest.mark.parametrize(("layout", "schedule"), SCHEMES.values(), ids=SCHEMES)
def test_alices_who_change_nothing_leave_every_bit(layout, schedule):
    run = five_alices(layout, **{**FEW, "make": IDLE}, schedule=schedule)
    parameters = dict(net().named_parameters())
    assert differences({name: run.weights[name] for name in parameters}, parameters) == []


@pytest.mark.parametrize(
    ("name", "counts"),
    [("sequential", 2 * 9), ("splitfed_v1", 2 * 3), ("splitfed_v2", 2 * 3), ("fedavg", 2 * 3), ("parallel", 2 * 3)],
)
def test_counters_of_mini_batches_stay_whole(name, counts):
    """Nine mini-batches an epoch, and three of the Alice who has most; of what Alices count the largest stays."""
    layout, schedule = SCHEMES[name]
    run = five_alices(layout, **FEW, schedule=schedule)
    count = run.weights["block1.1.num_batches_tracked"]
    assert (count.item(), count.dtype) == (counts, torch.int64)


MEAN = {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"}
LARGE = {"alice": MeanGradient(), "turn": "step"}


def at_once(run, rows, make, personal=False, model=net, cut=2, uniform=False, thawing=None, **loss):
    """In each step every Alice from the same net, then one step by the mean gradient; bottoms may be personal.

    What is frozen at first is trained from the epoch `thawing` on.
    """
    x, y = rows
    one, takers = model(), list(run.data.shards)
    bottoms = {taker: copy.deepcopy(one[:cut]) if personal else one[:cut] for taker in takers}
    optimizers = {taker: make(bottom.parameters()) for taker, bottom in bottoms.items()}
    top = make(one[cut:].parameters() if personal else one.parameters())
    for epoch, steps in enumerate(run.steps):
        place = 0
        if epoch == thawing:
            one.requires_grad_()
        for step in steps:
            copies = {taker: copy.deepcopy(bottoms[taker]).extend(copy.deepcopy(one[cut:])) for taker in step.batches}
            for taker, ids in step.batches.items():
                copies[taker].train().zero_grad()
                blocks = zip(BLOCKS, copies[taker], strict=True)
                nn.functional.cross_entropy(run_blocks(blocks, x[ids], (epoch, place)), y[ids], **loss).backward()
                place += 1
            sizes = [1 if uniform else len(ids) for ids in step.batches.values()]
            gradients = [
                {i: p.grad for i, p in enumerate(own.parameters()) if p.grad is not None} for own in copies.values()
            ]
            mean, buffers = (
                mean_of(gradients, sizes),
                mean_of([dict(own.named_buffers()) for own in copies.values()], sizes),
            )
            for i, parameter in enumerate(one.parameters()):
                parameter.grad = mean.get(i)  # torch passes over a parameter that has none
            for buffer, new in zip(one.buffers(), buffers.values(), strict=True):
                buffer.copy_(new)
            top.step()
            for taker in step.batches if personal else ():
                for p, q in zip(bottoms[taker].parameters(), copies[taker].parameters(), strict=False):
                    p.grad = q.grad
                for p, q in zip(bottoms[taker].buffers(), copies[taker].buffers(), strict=False):
                    p.copy_(q)
                optimizers[taker].step()
    return one, bottoms


@both_optimizers
def test_parallel_equals_copies_and_a_mean_written_by_hand_at_any_cut(make):
    """Of unequal shards, with batch norm: its statistics are the mean of the Alices'."""
    few = {**FEW, "make": make}
    large = five_alices(UNCUT, **few, schedule=LARGE)
    assert [len(step.batches) for step in large.steps[0]] == [5, 3, 1]
    one, _ = at_once(large, make_rows(25), make)
    assert differences(large.weights, one.state_dict()) == []
    for layout in CUTS:
        parallel = five_alices(layout, **few, schedule=MEAN)
        assert differences(parallel.weights, large.weights) == []
        assert_same_losses(parallel.losses, large.losses)


@both_optimizers
def test_parallel_with_personal_bottoms_equals_one_written_by_hand(make):
    schedule = {"alice": Personal(), "bob": MeanGradient(), "turn": "step"}
    run = five_alices(two_party(BLOCKS, 2), **{**FEW, "make": make}, schedule=schedule)
    one, bottoms = at_once(run, make_rows(25), make, personal=True)
    top = one[2:].state_dict()
    assert differences({name: run.weights[name] for name in top}, top) == []
    for taker, weights in own_weights(run).items():
        assert differences(weights, bottoms[taker].state_dict()) == []


@both_optimizers
def test_what_a_callback_unfreezes_steps_by_the_mean_of_all_gradients_from_then_on(make):
    """Also where one Alice, who takes part in few steps, must catch up, and to the byte of what crosses."""

    def frozen():
        model = net()
        model.block1[0].requires_grad_(False)
        return model

    run = five_alices(two_party(BLOCKS, 2), **{**FEW, "make": make}, schedule=MEAN, trainer={"callbacks": [Thaw()]})
    one, _ = at_once(run, make_rows(25), make, model=frozen, thawing=1)
    assert differences(run.weights, one.state_dict()) == []
    assert "block1.0.weight" in differences(one.state_dict(), frozen().state_dict())
    all_bytes = 4 * sum(p.numel() for p in net()[:2].parameters())
    held = 4 * sum(p.numel() for p in net().block1[0].parameters())
    crossed = run.learner.ledger.table()["alice0->server"]["weight_gradient"]
    assert crossed == 3 * (all_bytes - held) + 3 * all_bytes


def test_a_parameter_of_which_nobody_has_a_gradient_is_passed_over():
    """By Adam's moments, its count of steps and weight decay alike: parallel equals copies, and one large batch."""
    run = five_alices(two_party(BLOCKS, 2), model=routed(), **FEW, schedule=MEAN)
    one, _ = at_once(run, make_rows(25), ADAM, model=routed)
    assert differences(run.weights, one.state_dict()) == []
    steps = {
        name.split(".", 1)[1]: int(run.learner.stepper.optimizers[role].state[parameter]["step"])
        for role, weights in run.learner.rounds.weights.items()
        for name, parameter in weights.trained.items()
    }
    assert [steps[name] for name in ("block2.2.weight", "block3.weight")] == [6, 6]
    assert 0 < steps["block2.1.layer.weight"] < 6
    assert 0 < steps["head.0.layer.weight"] < 6
    precise = in_double(two_party(BLOCKS, 2), ADAM, MEAN, UNEQUAL, model=routed)
    assert distance(precise.weights, centralised(precise, ADAM, model=routed)) < 1e-12


@pytest.mark.parametrize("loss", [{}, {"weight": torch.tensor([1.0, 5.0, 0.25])}, {"reduction": "sum"}], ids=str)
def test_under_a_uniform_mean_a_personal_bottom_steps_by_her_own_loss_whatever_it_divides_by(loss):
    schedule = {"alice": Personal(), "bob": MeanGradient("uniform"), "turn": "step"}
    run = five_alices(two_party(BLOCKS, 2), **FEW, schedule=schedule, loss=loss)
    one, bottoms = at_once(run, make_rows(25), ADAM, personal=True, uniform=True, **loss)
    top = one[2:].state_dict()
    assert differences({name: run.weights[name] for name in top}, top) == []
    for taker, weights in own_weights(run).items():
        assert differences(weights, bottoms[taker].state_dict()) == []


def in_double(layout, make, schedule, data, model=smooth, **more):
    """Train in double precision, where what rounding leaves is far below what a mistake would."""
    double = {"precision": "64-true"}
    return five_alices(layout, model(), make=make, schedule=schedule, data=data, trainer=double, **more)


def centralised(run, make, model=smooth, **loss):
    """One net on the rows of all Alices of a step at once."""
    criterion = nn.CrossEntropyLoss(**loss).double()
    x, y = make_rows(25)
    model = model().double()
    optimizer = make(model.parameters())
    for step in (step for steps in run.steps for step in steps):
        ids = torch.cat(list(step.batches.values()))
        optimizer.zero_grad()
        criterion(model(x[ids].double()), y[ids]).backward()
        optimizer.step()
    return model.state_dict()


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("data", [{}, UNEQUAL], ids=["equal shards", "unequal shards"])
@both_optimizers
def test_large_batch_and_parallel_equal_centralised_on_all_their_rows_at_once(make, data):
    """The mean by rows of the mean gradients is the gradient of the mean."""
    large = in_double(UNCUT, make, LARGE, data)
    assert distance(large.weights, centralised(large, make)) < 1e-12
    assert distance(large.weights, smooth().double().state_dict()) > 1e-3
    for layout in (two_party(BLOCKS, 1), u_shaped(BLOCKS, [1, 3])):
        parallel = in_double(layout, make, MEAN, data)
        assert distance(parallel.weights, centralised(parallel, make)) < 1e-12


LOSSES = {
    "class weights": {"weight": torch.tensor([1.0, 5.0, 0.25])},
    "ignored labels": {"ignore_index": 1},
    "a sum": {"reduction": "sum"},
    "smoothed": {"weight": torch.tensor([1.0, 5.0, 0.25]), "label_smoothing": 0.2},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_so_does_parallel_whatever_the_loss_divides_by(loss):
    parallel = in_double(two_party(BLOCKS, 2), partial(torch.optim.SGD, lr=0.01), MEAN, UNEQUAL, loss=loss)
    at_once = centralised(parallel, partial(torch.optim.SGD, lr=0.01), **loss)
    assert distance(parallel.weights, at_once) < 1e-12
    assert distance(at_once, centralised(parallel, partial(torch.optim.SGD, lr=0.01))) > 1e-4


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_so_do_micro_batches(loss):
    precise = {"trainer": {"precision": "64-true"}, "loss": loss, "batch_size": 9}
    make = partial(torch.optim.SGD, lr=0.01)
    whole, parts = (train(two_party(BLOCKS, 2), smooth(), make=make, micro_batches=n, **precise) for n in (1, 4))
    assert distance(parts.weights, whole.weights) < 1e-12
    assert parts.learner.mean_loss == pytest.approx(whole.learner.mean_loss)


def test_a_uniform_mean_is_another_one_where_mini_batches_are_unequal():
    uniform = {"alice": MeanGradient("uniform"), "turn": "step"}
    equal = in_double(UNCUT, SGD, uniform, {"partition": dealt(5, 5, 5, 5, 5)})
    assert distance(equal.weights, centralised(equal, SGD)) < 1e-12
    unequal = in_double(UNCUT, SGD, uniform, UNEQUAL)
    assert distance(unequal.weights, centralised(unequal, SGD)) > 1e-6


def test_fedavg_of_one_mini_batch_equals_large_batch():
    """With plain SGD, to average weights behind a step is to average gradients before it."""
    fedavg = in_double(UNCUT, PLAIN, {"alice": Average(), "turn": 1}, UNEQUAL)
    large = in_double(UNCUT, PLAIN, LARGE, UNEQUAL)
    assert distance(fedavg.weights, large.weights) < 1e-12


def test_epochs_may_have_unequal_numbers_of_mini_batches():
    """As those who take part have."""
    run = five_alices(UNCUT, **FEW, epochs=3, schedule={"alice": Average(), **MIXED})
    assert [len(steps) for steps in run.steps] == [12, 12, 10]
    assert len(run.losses) == run.trainer.global_step == 34
    sides = side_by_side(run, make_rows(25), ADAM, "averaged", "averaged")
    assert differences(run.weights, weights_at(sides, "alice0")) == []


@pytest.mark.parametrize(("layout", "schedule"), SCHEMES.values(), ids=SCHEMES)
def test_evaluation_in_the_middle_of_a_round_changes_no_bit_of_the_training(layout, schedule):
    """It sees what all agreed on at its start, and everybody's own bottom."""
    few = {"rows": make_rows(43), "num_alices": 3, "val_fraction": 0.25, "schedule": schedule, "make": ADAM}
    with_it = train(layout, **few, trainer={"val_check_interval": 2})
    without = train(layout, **few, trainer={"limit_val_batches": 0})
    assert differences(with_it.weights, without.weights) == []
    assert_same_losses(with_it.losses, without.losses)
    assert with_it.learner.ledger.table() == without.learner.ledger.table()
    assert without.learner.evaluation_ledger.table() == {}


@pytest.mark.parametrize("layout", [two_party(BLOCKS, 2), u_shaped(BLOCKS, [1, 2]), whole(BLOCKS)])
@pytest.mark.parametrize("parts", [2, 3, 100])
def test_micro_batches_have_the_gradients_of_the_whole(layout, parts):
    """To rounding, without batch norm and dropout, which look at a batch or draw anew."""
    at_once, in_parts = train(layout, model=smooth()), train(layout, model=smooth(), micro_batches=parts)
    assert len(differences(in_parts.weights, smooth().state_dict())) == 8  # all were trained
    for name, value in at_once.weights.items():
        torch.testing.assert_close(in_parts.weights[name], value, rtol=1e-4, atol=1e-6)
    assert in_parts.learner.mean_loss == pytest.approx(at_once.learner.mean_loss, rel=1e-5)
    assert in_parts.learner.ledger.table() == at_once.learner.ledger.table()


class LeaveOut(pl.Callback):
    """As after the loss of an Alice."""

    def on_fit_start(self, trainer, learner):
        learner.rounds.leave_out(["alice0"])


@pytest.mark.parametrize("sharing", [MeanGradient, Personal])
def test_steps_that_only_the_gone_would_have_taken_change_nothing(sharing):
    """alice0 has seven mini-batches, alice1 three: from then on nobody is there."""
    schedule = {"turn": "step", "alice": sharing(), "bob": MeanGradient()}
    arranged = {"num_alices": 2, "batch_size": 2, "schedule": schedule, "data": {"partition": dealt(13, 6)}}
    layout = two_party(BLOCKS, 2)

    def weights(**trainer):
        run = train(layout, model=smooth(), epochs=1, trainer={"callbacks": [LeaveOut()], **trainer}, **arranged)
        return run.weights

    three, all_seven = weights(max_steps=3), weights()
    assert len(differences(three, smooth().state_dict())) == 8  # all were trained
    assert differences(three, all_seven) == []

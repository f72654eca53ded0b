"""A model cut into segments: shapes, first weights, draws, modes, and what does not fit."""

import copy
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers import BLOCKS, Recorder, differences, make_batch, make_network, make_rows, net, train, weights_of
from runs import fit, make_data
from torch import Tensor, nn
from torch.nn import functional as F

from splitlearn.errors import InputError
from splitlearn.layout import extended_vanilla, multi_hop, two_party, u_shaped, vertical, whole
from splitlearn.models.layers import lazily
from splitlearn.network import SplitNetwork

AB = ("a", "b")
ALICE_AND_BOB = {"alice": "alice0", "bob": "bob"}


def ab(a: nn.Module, b: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(a=a, b=b))


@lazily()
def lazy() -> nn.Sequential:
    return ab(nn.Sequential(nn.LazyConv2d(2, 3), nn.Flatten()), nn.LazyLinear(3))


class Functional(nn.Module):
    """A block without modules to look at."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def in_place_relu() -> nn.Module:
    return Functional(lambda x: F.relu(x, inplace=True))


@pytest.mark.parametrize(
    ("model", "kind"),
    [(nn.Linear(24, 3), "Linear"), (nn.Sequential(), "Sequential"), (nn.ModuleList(net()), "ModuleList")],
)
def test_a_model_must_be_a_sequence_of_blocks(model, kind):
    rule = rf"^`model` \(={kind}\) must be an nn.Sequential of at least one block: .*; return nn.Sequential\("
    with pytest.raises(ValueError, match=rule):
        make_network(two_party(AB, 1), model)


CURE = "per sample: change the model or the data "


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ab(nn.Linear(5, 4), nn.Linear(4, 3)), rf"^block `a` does not fit its input of shape 1x4x6 \(float32\) {CURE}"),
        (ab(nn.Flatten(), nn.Linear(5, 3)), rf"^block `b` does not fit its input of shape 24 \(float32\) {CURE}"),
        (
            ab(nn.Flatten(), nn.Linear(24, 3).double()),
            rf"^block `b` does not fit its input of shape 24 \(float32\) {CURE}",
        ),
        (ab(nn.Conv2d(1, 1, 5), nn.Flatten()), rf"^block `a` does not fit its input of shape 1x4x6 \(float32\) {CURE}"),
        (ab(nn.Flatten(), nn.LSTM(24, 3)), "^block `b` returns a tuple: every block must return one tensor$"),
    ],
    ids=["first", "second", "dtype", "kernel", "tuple"],
)
@pytest.mark.parametrize("layout", [two_party(AB, 1), whole(AB)], ids=["two_party", "whole"])
def test_a_block_that_does_not_fit_is_named(layout, model, message):
    with pytest.raises(ValueError, match=message):
        make_network(layout, model)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.ELU])
def test_an_in_place_block_behind_a_cut_is_made_safe(activation):
    def trained(inplace):
        torch.manual_seed(0)
        first = nn.Sequential(nn.Flatten(), nn.Linear(24, 5))
        return train(two_party(AB, 1), ab(first, nn.Sequential(activation(inplace=inplace), nn.Linear(5, 3))))

    run, expected = trained(inplace=True), trained(inplace=False)
    assert differences(run.weights, expected.weights) == []


@pytest.mark.parametrize(
    "block",
    [
        in_place_relu(),
        Functional(lambda x: x.add_(1)),
        Functional(lambda x: x.view(-1).mul_(2).view_as(x)),
        nn.Sequential(nn.Flatten(), in_place_relu()),
    ],
    ids=["relu", "add_", "a view of it", "inside a block"],
)
def test_a_function_that_writes_into_what_crossed_is_refused(block):
    model = ab(nn.Sequential(nn.Flatten(), nn.Linear(24, 5)), nn.Sequential(block, nn.Linear(5, 3)))
    rule = "^block `b` writes into its input in place, which fails right behind a cut: make it out of place$"
    with pytest.raises(ValueError, match=rule):
        make_network(two_party(AB, 1), model)


def test_a_function_that_writes_in_place_elsewhere_is_welcome():
    b = nn.Sequential(nn.Linear(5, 5), in_place_relu(), nn.Linear(5, 3))
    run = train(two_party(AB, 1), ab(nn.Sequential(nn.Flatten(), nn.Linear(24, 5)), b))
    assert len(run.losses) == 10


def test_lazy_blocks_take_their_shapes_and_a_seed_of_their_own():
    network = make_network(two_party(AB, 1), lazy())
    assert {name: list(value.shape) for name, value in weights_of(network).items()} == {
        "a.0.weight": [2, 1, 3, 3],
        "a.0.bias": [2],
        "b.weight": [3, 16],
        "b.bias": [3],
    }
    assert network.sample_output.shape == (2, 3)
    torch.rand(5)
    assert differences(weights_of(network), weights_of(make_network(whole(AB), lazy()))) == []
    assert len(differences(weights_of(network), weights_of(make_network(two_party(AB, 1), lazy(), seed=4)))) == 4


def test_a_block_does_not_care_who_its_neighbours_are():
    neighbours = lazy(), ab(nn.Sequential(nn.Flatten(), nn.Linear(24, 16)), lazy().b)
    first, second = (weights_of(make_network(two_party(AB, 1), model))["b.weight"] for model in neighbours)
    assert torch.equal(first, second)


def test_making_a_network_leaves_the_random_numbers_and_the_statistics_alone():
    model, before = net(), torch.get_rng_state()
    network = make_network(two_party(BLOCKS, 2), model)
    assert torch.equal(torch.get_rng_state(), before)
    assert differences(weights_of(network), net().state_dict()) == []
    assert network.training
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    "layout", [vertical(AB, 1, 2), extended_vanilla((*AB, "c"), [1, 2], 2)], ids=lambda it: it.kind
)
def test_each_owner_of_columns_has_a_bottom_of_her_own(layout):
    x, y = make_rows(2)
    model = lazy()
    model.add_module("c", nn.Linear(3, 3))
    model = model if layout.kind != "vertical" else model[:2]
    network = SplitNetwork(model, layout, {"x0": x[..., :3], "x1": x[..., 3:], "y": y})
    bottoms = [network.segments[name].a[0] for name in ("bottom0", "bottom1")]
    assert not torch.equal(bottoms[0].weight, bottoms[1].weight)
    assert [len(network.parameters_of(role)) for role in ("alice0", "alice1")] == [2, 2]
    assert len({id(p) for role in layout.roles for p in network.parameters_of(role)}) == len(list(network.parameters()))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


@pytest.mark.parametrize(
    ("block", "draws"),
    [
        (nn.Dropout(0.5), True),
        (nn.Dropout2d(0.5), True),
        (Noise(), True),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.AlphaDropout(0.5))), True),
        (nn.RReLU(), True),
        (nn.ReLU(), False),
        (nn.BatchNorm2d(1), False),
    ],
)
def test_the_network_finds_out_which_blocks_draw(block, draws):
    model = ab(block, nn.Sequential(nn.Flatten(), nn.Linear(24, 3)))
    assert make_network(two_party(AB, 1), model).segments["bottom"].drawing == ({"a"} if draws else set())


def test_draws_belong_to_the_mini_batch_and_to_the_block():
    ones = torch.ones(1, 200)
    blocks = nn.Sequential(OrderedDict(a=nn.Dropout(), b=nn.Flatten(), c=nn.Dropout()))
    segments = SplitNetwork(blocks, two_party(("a", "b", "c"), 1), {"x": ones, "y": ones}).segments
    drawn = {number: segments["bottom"](ones, number) for number in [(0, 0), (0, 1), (1, 0)]}
    assert len({tuple(each.flatten().tolist()) for each in drawn.values()}) == 3
    assert not torch.equal(segments["top"](ones, (0, 0)), drawn[0, 0])
    torch.rand(3)
    assert torch.equal(segments["bottom"](ones, (0, 0)), drawn[0, 0])


def test_evaluation_draws_nothing():
    network, before = make_network(two_party(BLOCKS, 2)).eval(), torch.get_rng_state()
    outputs = [network(make_batch(5, number), ALICE_AND_BOB)[0] for number in [(0, 0), (0, 1)]]
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0], net().eval()(make_rows(5)[0]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", [u_shaped(BLOCKS, [1, 3]), multi_hop(BLOCKS, [1, 2, 3])], ids=lambda it: it.kind)
def test_train_and_eval_reach_every_segment(layout):
    network = make_network(layout)
    for mode in (False, True):
        network.train(mode)
        assert {name: {m.training for m in segment.modules()} for name, segment in network.segments.items()} == {
            stage.name: {mode} for stage in layout.stages
        }
        assert all(segment.training is mode for _, segment in network.program)


def test_each_block_runs_once_in_each_mini_batch():
    """A second forward pass before the backward would draw and count statistics twice."""
    model, sizes = net(), {name: [] for name in BLOCKS}
    for name, block in model.named_children():
        block.register_forward_hook(lambda module, inputs, output, seen=sizes[name]: seen.append(len(output)))
    train(u_shaped(BLOCKS, [1, 3]), model)
    for seen in sizes.values():
        assert [size for size in seen if size > 2] == [4, 4, 4, 4, 3] * 2  # what it is tried out on has two rows or one


def test_the_tape_says_who_sent_what_to_whom():
    network = make_network(u_shaped(BLOCKS, [1, 3]))
    output, labels, tape = network(make_batch(5), ALICE_AND_BOB)
    assert [(hop.sender, hop.receiver, list(hop.received.shape)) for hop in tape] == [
        ("alice0", "bob", [5, 2, 4, 6]),
        ("bob", "alice0", [5, 7]),
    ]
    assert output.shape == (5, 3)
    assert torch.equal(labels, make_rows(5)[1])
    assert "label" not in str(network.wire.ledger.table())


def test_a_role_has_the_parameters_of_all_its_segments_but_the_frozen():
    network = make_network(u_shaped(BLOCKS, [1, 3]))
    head, tail, body = (network.segments[name] for name in ("head", "tail", "body"))
    assert network.segments_of("alice") == {"head": head, "tail": tail}
    assert [id(p) for p in network.parameters_of("alice")] == [id(p) for s in (head, tail) for p in s.parameters()]
    assert [id(p) for p in network.parameters_of("bob")] == [id(p) for p in body.parameters()]
    head.requires_grad_(False)
    assert [id(p) for p in network.parameters_of("alice")] == [id(p) for p in tail.parameters()]


@pytest.mark.parametrize("training", [True, False])
def test_a_look_shows_what_crosses_and_sends_nothing(training):
    network = make_network(two_party(BLOCKS, 2, labels="alice")).train(training)
    network.wire.taps = [Recorder("alice"), Recorder("alice0")]
    before = copy.deepcopy(weights_of(network))
    x, y = make_rows(5)
    tape, ledger = network.look({"x": x, "y": y})
    assert [(hop.sender, hop.receiver) for hop in tape] == [("alice", "bob")]
    assert torch.equal(tape[0].received, net().eval()[:2](x))
    assert ledger.table() == {"alice->bob": {"activation": 5 * 10 * 4, "label": 5 * 8}}
    assert network.training is network.segments["bottom"].training is training
    assert network.wire.ledger.table() == {}
    assert network.cut.wire is network.wire
    assert [tap.messages for tap in network.wire.taps] == [[], []]
    assert differences(weights_of(network), before) == []


def test_a_look_that_fails_leaves_the_network_as_it_was():
    network = make_network(two_party(BLOCKS, 2))
    wire = network.wire
    with pytest.raises(RuntimeError):
        network.look({"x": torch.zeros(2, 5, 4, 6), "y": torch.zeros(2)})
    assert network.wire is network.cut.wire is wire
    assert network.training


def test_a_block_that_cannot_train_on_one_row_is_told_before_training():
    network = make_network(two_party(BLOCKS, 2))
    network.check_sizes({"alice0": 4, "alice1": 2})
    error = r"^block `block3` cannot train on one row .*, and alice1 has a mini-batch of one: change `data.batch_size`"
    with pytest.raises(InputError, match=error):
        network.check_sizes({"alice0": 4, "alice1": 1})
    smooth = nn.Sequential(OrderedDict(bottom=nn.Flatten(), top=nn.Linear(24, 3)))
    make_network(two_party(("bottom", "top"), 1), smooth).check_sizes({"alice0": 1})


def test_an_alice_left_with_one_row_is_told_at_the_start(tmp_path):
    with pytest.raises(InputError, match=r"alice2 has a mini-batch of one"):
        fit(tmp_path, make_data(11, num_alices=3, sizes=[4, 2, 5]))


class Stateful(nn.Module):
    """A linear layer that each forward in training scales by something that no checkpoint has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.count, self.seen = kind, nn.Linear(24, 5), 0, None
        self.register_buffer("counted", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.count += 1
        self.counted = self.counted + 1
        self.seen = x.detach()
        scales = {
            "attribute": lambda: self.count,
            "numpy": lambda: float(np.random.rand()),
            "random": random.random,
            "buffer": lambda: self.counted,
            "torch": lambda: torch.rand(()),
            "nothing": lambda: 1.0,
        }
        return self.linear(x) * scales[self.kind]()


@pytest.mark.parametrize("kind", ["attribute", "numpy", "random"])
def test_a_block_that_keeps_or_draws_what_no_checkpoint_has_is_refused(kind):
    model = nn.Sequential(OrderedDict(first=Stateful(kind), head=nn.Linear(5, 3)))
    x, y = make_rows(4)
    with pytest.raises(ValueError, match=r"^block `first` makes different things of one input: .* register_buffer"):
        SplitNetwork(model, two_party(model, 1), {"x": x, "y": y})


@pytest.mark.parametrize(("kind", "draws"), [("buffer", False), ("torch", True), ("nothing", False)])
def test_one_that_keeps_buffers_looks_at_itself_or_draws_by_torch_is_not(kind, draws):
    model = nn.Sequential(OrderedDict(first=Stateful(kind), head=nn.Linear(5, 3)))
    x, y = make_rows(4)
    network = SplitNetwork(model, two_party(model, 1), {"x": x, "y": y})
    assert network.segments["bottom"].drawing == ({"first"} if draws else set())
    assert model.first.count == 1  # of the run that made the shapes; the rest was tried on copies

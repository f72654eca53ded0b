"""FLOPs by hand, and by torch's own counter around the real thing; a sum over parties is the whole network."""

import copy
from collections import OrderedDict

import pytest
import torch
from helpers import BLOCKS, make_batch, make_network, make_rows, net, run_blocks, train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from splitlearn.costs import flops
from splitlearn.costs.flops import Cost, Meter, add_up, clients, cost_of
from splitlearn.layout import extended_vanilla, multi_hop, two_party, u_shaped, vertical, whole
from splitlearn.network import SplitNetwork
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Handoff, Personal, Shared

ROWS = 4
# Multiply-adds of one row in each block of `net`: two 3x3 filters over 4x6 pixels, and three linear layers.
MACS = {"block1": 2 * 9 * 4 * 6, "block2": 48 * 10, "block3": 10 * 7, "head": 7 * 3}


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def linear(num_in: int, num_out: int) -> int:
    return 2 * ROWS * num_in * num_out


@pytest.mark.parametrize(
    ("segment", "shape", "forward"),
    [
        (nn.Linear(3, 5), (3,), linear(3, 5)),
        (nn.Linear(3, 5, bias=False), (3,), linear(3, 5)),
        (nn.Linear(3, 5), (7, 3), 7 * linear(3, 5)),
        # of every pixel that comes out: output channels x input channels of its group x the filter's pixels
        (nn.Conv2d(2, 4, 3), (2, 8, 6), 2 * ROWS * (6 * 4) * 4 * 2 * 9),
        (nn.Conv2d(2, 4, 3, padding=1), (2, 8, 6), 2 * ROWS * (8 * 6) * 4 * 2 * 9),
        (nn.Conv2d(2, 4, (3, 1), stride=2, padding=(1, 0)), (2, 8, 6), 2 * ROWS * (4 * 3) * 4 * 2 * 3),
        (nn.Conv2d(2, 4, 3, dilation=2), (2, 8, 6), 2 * ROWS * (4 * 2) * 4 * 2 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 8, 8), 2 * ROWS * (4 * 4) * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 8, 8), 2 * ROWS * (6 * 6) * 4 * 1 * 9),
        (nn.Conv1d(2, 4, 5), (2, 9), 2 * ROWS * 5 * 4 * 2 * 5),
        # here of every pixel that goes in
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), 2 * ROWS * (5 * 5) * 4 * 6 * 9),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), 2 * ROWS * (5 * 5) * 4 * 3 * 9),
    ],
    ids=repr,
)
def test_a_layer_costs_as_much_for_either_gradient_as_forward(segment, shape, forward):
    x = torch.zeros(ROWS, *shape)
    assert cost_of(segment, [x], wants_input_gradient=False) == (forward, forward)
    assert cost_of(segment, [x], wants_input_gradient=True) == (forward, 2 * forward)
    assert cost_of(frozen(segment), [x], wants_input_gradient=False) == (forward, 0)
    assert cost_of(segment, [x], wants_input_gradient=True) == (forward, forward)


@pytest.mark.parametrize(
    "segment",
    [nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Softmax(1)],
    ids=repr,
)
def test_what_multiplies_no_matrices_counts_nothing(segment):
    assert cost_of(segment, [torch.zeros(ROWS, 2, 8, 6)], wants_input_gradient=True) == (0, 0)


def convolutions() -> nn.Sequential:
    """Rows [N, 1, 8, 8]; 2 filters of 3x3, pooled to 4x4, 3 filters of 1x1, and a linear layer of 48."""
    first = [nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(2, 3, 1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 5))


@pytest.mark.parametrize(
    ("freeze", "wants", "gradients"),
    [
        # how many gradients each of the three layers computes
        ([], False, (1, 2, 2)),
        ([], True, (2, 2, 2)),
        ([0], True, (1, 2, 2)),
        ([0], False, (0, 2, 2)),  # batch norm behind it has parameters
        ([0, 1], False, (0, 1, 2)),
        ([0, 1, 4], False, (0, 0, 1)),
        ([0, 1, 4, 7], False, (0, 0, 0)),
        ([0, 1, 4, 7], True, (1, 1, 1)),
        ([4], False, (1, 1, 2)),
    ],
)
def test_only_gradients_that_somebody_wants_are_counted(freeze, wants, gradients):
    layers = (2 * ROWS * 64 * 2 * 9, 2 * ROWS * 16 * 3 * 2, linear(48, 5))
    segment = convolutions()
    for i in freeze:
        frozen(segment[i])
    backward = sum(count * layer for count, layer in zip(gradients, layers, strict=True))
    assert cost_of(segment, [torch.zeros(ROWS, 1, 8, 8)], wants) == (sum(layers), backward)


def test_an_embedding_only_looks_up():
    words = torch.zeros(ROWS, 6, dtype=torch.int64)
    segment = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 5))
    assert cost_of(segment, [words], wants_input_gradient=True) == (6 * linear(3, 5), 2 * 6 * linear(3, 5))


def test_attention_is_two_products_of_matrices():
    """Of 6 words and 2 heads: the projections in and out, and 6x6 scores, computed and applied."""
    scores = 2 * (2 * ROWS * 2 * (6 * 6) * 4)
    forward = 6 * (linear(8, 24) + linear(8, 8)) + scores
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    cost = cost_of(attention_of_itself(attention), [torch.zeros(ROWS, 6, 8)], wants_input_gradient=True)
    assert cost == (forward, 2 * forward)


def attention_of_itself(attention: nn.Module) -> nn.Module:
    class Itself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    return Itself()


def test_macs_are_half_the_flops():
    cost = cost_of(nn.Linear(3, 5), [torch.zeros(ROWS, 3)], wants_input_gradient=True)
    assert (cost.total, cost.macs) == (3 * 2 * ROWS * 15, 3 * ROWS * 15)


class Looks(nn.Module):
    """Looks at a value: no meta tensor has one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x):
        return self.linear(x) if x.sum().item() < 1e9 else x


def test_a_block_that_looks_at_values_is_measured_too():
    assert cost_of(Looks(), [torch.zeros(ROWS, 3)], wants_input_gradient=False) == (linear(3, 5), linear(3, 5))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "segment", [convolutions(), nn.Sequential(convolutions(), nn.Dropout(0.5), nn.Linear(5, 3), Looks())]
)
def test_measuring_changes_nothing_in_the_middle_of_an_evaluation(segment, mode):
    segment.eval()
    before, random = copy.deepcopy(segment.state_dict()), torch.get_rng_state()
    with mode():
        cost = cost_of(segment, [torch.zeros(ROWS, 1, 8, 8)], wants_input_gradient=False)
    assert cost.backward > cost.forward > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in segment.state_dict().items())
    assert all(parameter.grad is None for parameter in segment.parameters())
    assert not segment.training


def counted(run) -> int:
    """What torch counts while `run` runs in earnest."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def unsplit(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor):
    nn.functional.cross_entropy(run_blocks(model.named_children(), x, (0, 0)), y).backward()


CHAINS = {
    "whole": whole(BLOCKS),
    **{f"two_party, {cut}": two_party(BLOCKS, cut) for cut in (1, 2, 3)},
    "labels at alice": two_party(BLOCKS, 2, labels="alice"),
    "multi_hop": multi_hop(BLOCKS, [1, 2, 3]),
    "u_shaped": u_shaped(BLOCKS, [1, 3]),
}


@pytest.mark.parametrize("layout", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("num_frozen", [0, 1, 2])
def test_the_stages_of_a_chain_cost_what_the_network_costs_in_one_piece(layout, num_frozen):
    model = net()
    frozen(model[:num_frozen])
    network = make_network(layout, copy.deepcopy(model))
    costs = Meter(network, network.wire.ledger).of_pass(5)
    batch = make_batch(5)
    assert add_up(costs.values()).total == counted(lambda: unsplit(model, batch.fields["x"], batch.fields["y"]))
    for stage in layout.stages:
        assert costs[stage.name].forward == 2 * 5 * sum(MACS[block] for block in stage.blocks)


@pytest.mark.parametrize("frozen_bottoms", [[], [0], [0, 1]])
@pytest.mark.parametrize("kind", ["vertical", "extended_vanilla"])
def test_the_stages_of_columns_cost_what_one_net_with_branches_costs(kind, frozen_bottoms):
    blocks = {
        "bottom": nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout(0.5)),
        "middle": nn.Linear(10, 7),
        "head": nn.Linear(7, 3),
    }
    model = nn.Sequential(OrderedDict(blocks))
    layout = vertical(list(blocks), 1, 2) if kind == "vertical" else extended_vanilla(list(blocks), [1, 2], 2)
    x, y = make_rows(5)
    columns = x[..., :3], x[..., 3:]
    fields = {"x0": columns[0], "x1": columns[1], "y": y}
    network = SplitNetwork(model, layout, fields)
    bottoms = [copy.deepcopy(model.bottom) for _ in range(2)]
    for i in frozen_bottoms:
        frozen(bottoms[i])
        frozen(network.segments[f"bottom{i}"])

    def branches() -> None:
        joined = torch.cat([bottom(part) for bottom, part in zip(bottoms, columns, strict=True)], dim=1)
        nn.functional.cross_entropy(model.head(model.middle(joined)), y).backward()

    costs = Meter(network, network.wire.ledger).of_pass(5)
    assert add_up(costs.values()).total == counted(branches)
    assert costs["bottom1"] == (2 * 5 * 60, 0 if 1 in frozen_bottoms else 2 * 5 * 60)


@pytest.mark.parametrize("layout", CHAINS.values(), ids=CHAINS)
def test_a_split_pass_in_earnest_costs_what_the_meter_says(layout):
    network, batch = make_network(layout), make_batch(5)

    def split() -> None:
        output, labels, tape = network(batch, layout.cast("alice0"))
        network.backward(nn.functional.cross_entropy(output, labels), tape)

    assert add_up(Meter(network, network.wire.ledger).of_pass(5).values()).total == counted(split)


def test_no_stage_is_measured_on_real_tensors_for_its_dropout_or_the_precision_of_the_run(monkeypatch):
    devices = []
    run = flops._run
    monkeypatch.setattr(flops, "_run", lambda *args: devices.append(args[-1]) or run(*args))
    network = make_network(two_party(BLOCKS, 2))
    costs = Meter(network, network.wire.ledger).of_pass(5)
    assert Meter(network.to(torch.float64), network.wire.ledger).of_pass(5) == costs
    assert devices == ["meta"] * 4


def test_each_number_of_rows_is_measured_once(monkeypatch):
    network = make_network(two_party(BLOCKS, 2))
    meter = Meter(network, network.wire.ledger)
    five, four = meter.of_pass(5), meter.of_pass(4)
    monkeypatch.setattr(flops, "_run", None)
    assert (meter.of_pass(5), meter.of_pass(4)) == (five, four)


CENTRALISED = {"alice": Shared(), "bob": Shared()}
SCHEMES = {
    "sequential": (two_party(BLOCKS, 2), {"alice": Handoff()}),
    "splitfed_v1, u-shaped": (u_shaped(BLOCKS, [1, 3]), {"alice": Average(), "bob": Average()}),
    "splitfed_v3, multi-hop": (multi_hop(BLOCKS, [1, 2]), {"alice": Personal(), "bob": Average()}),
    "parallel": (two_party(BLOCKS, 2), {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"}),
    "fedavg": (whole(BLOCKS), {"alice": Average()}),
}


@pytest.mark.parametrize(("layout", "schedule"), SCHEMES.values(), ids=SCHEMES)
def test_many_alices_and_bob_cost_what_centralised_training_costs_on_the_same_rows(layout, schedule):
    together = train(layout, num_alices=3, schedule=schedule).learner.meter.by_party()
    alone = train(whole(BLOCKS), schedule=CENTRALISED).learner.meter.by_party()
    forward, first = sum(MACS.values()), MACS["block1"]
    assert alone == {"alice0": (2 * 38 * forward, 2 * 38 * (2 * forward - first))}
    assert add_up(together.values()) == alone["alice0"]
    per_row = {together[f"alice{i}"].forward // rows for i, rows in enumerate((14, 12, 12))}
    mine = sum(MACS[block] for stage in layout.stages if stage.role == "alice" for block in stage.blocks)
    assert per_row == {2 * mine}


def test_everybody_is_told_by_name_and_many_alices_as_one():
    learner = train(two_party(BLOCKS, 2), num_alices=3).learner
    bottom, top = MACS["block1"] + MACS["block2"], MACS["block3"] + MACS["head"]
    back = MACS["block1"] + 2 * MACS["block2"]
    flops = learner.meter.by_party()
    assert flops == {
        "alice0": (2 * 14 * bottom, 2 * 14 * back),
        "alice1": (2 * 12 * bottom, 2 * 12 * back),
        "alice2": (2 * 12 * bottom, 2 * 12 * back),
        "bob": (2 * 38 * top, 2 * 38 * 2 * top),
    }
    assert clients(flops) == [2 * rows * (bottom + back) for rows in (14, 12, 12)]
    assert learner.meter.by_party(merge=True) == {"alice*": (2 * 38 * bottom, 2 * 38 * back), "bob": flops["bob"]}


def test_owners_of_columns_are_clients_each_with_a_bottom_of_her_own():
    layout = vertical(["bottom", "top"], 1, 2)
    blocks = {"bottom": nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), "top": nn.Linear(10, 3)}
    learner = train(
        layout, nn.Sequential(OrderedDict(blocks)), num_alices=2, data={"columns": [[0, 1, 2], [3, 4, 5]]}
    ).learner
    bottom = Cost(2 * 38 * 60, 2 * 38 * 60)
    assert learner.meter.by_party() == {"alice0": bottom, "alice1": bottom, "bob": (2 * 38 * 30, 2 * 38 * 60)}


def test_only_training_is_counted():
    """Of 19 rows 5 are held out for validation, and 14 make four mini-batches an epoch."""
    learner = train(two_party(BLOCKS, 2), val_fraction=0.25).learner
    assert learner.evaluation_ledger.num_bytes != {}
    assert learner.ledger.passes == {("alice0", 4): 2 * 3, ("alice0", 2): 2}
    assert learner.evaluation_ledger.passes == {}


class Keeps(nn.Linear):
    """Keeps its last output, which hangs on a graph."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("block", [Keeps(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))])
def test_a_block_that_keeps_what_it_computed_is_measured(block):
    heard = []
    block.register_forward_hook(lambda module, inputs, output: heard.append(output.device.type))
    block(torch.ones(2, 3))
    assert cost_of(block, [torch.ones(2, 3)], wants_input_gradient=False) == (2 * 2 * 3 * 4, 2 * 2 * 3 * 4)
    assert heard == ["cpu"]

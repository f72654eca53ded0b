"""What blocks may share wherever a network is cut, in every process; what they may not share, or be."""

import copy
import re
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from federated import tied
from helpers import SGD, Unsplit, differences, make_network, make_rows, plainly, train
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import make_data, make_learner, make_trainer
from torch import nn

from splitlearn.costs.by_cut import Terms, compare, measure
from splitlearn.federation.party import Federation
from splitlearn.federation.remote_wire import WIDEST, RemoteWire
from splitlearn.layout import Layout, multi_hop, two_party, u_shaped, vertical, whole
from splitlearn.models.layers import lazily
from splitlearn.models.zoo import cut_up
from splitlearn.network import SplitNetwork
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Handoff, Personal
from splitlearn.training.checks import warn_of_raw_rows
from splitlearn.wire import Wire

NAMES = ("a", "b", "c", "d", "e", "f", "g")
TWO_PARTY = two_party(tuple(tied(3)._modules), 2)
MEAN = {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"}


def in_order(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(zip(NAMES, blocks, strict=False)))


def wire_of(party: str | None) -> Wire:
    """That of the simulator, or of the process of a party."""
    return Wire() if party is None else RemoteWire(party)


def bottom() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 6))


def repeated() -> nn.Sequential:
    """One activation and one dropout on both sides of every cut, and one layer at two places of the top."""
    torch.manual_seed(1)
    act, dropout, layer = nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 6)
    blocks = {"first": bottom(), "act1": act, "block1": dropout, "layer1": nn.Linear(6, 6), "act2": act}
    blocks |= {"block3": dropout, "layer2": layer, "act3": act, "layer3": layer, "head": nn.Linear(6, 3)}
    return nn.Sequential(OrderedDict(blocks))


PLACES = tuple(repeated()._modules)


def assert_equals_the_unsplit(layout: Layout, model, make=SGD) -> None:
    unsplit = model()
    optimizer = make(unsplit.parameters())
    run = train(layout, model(), make=make)
    losses = plainly(Unsplit(unsplit), lambda taker: [optimizer], run)
    assert torch.equal(torch.stack(run.losses), torch.stack(losses))
    assert differences(run.weights, unsplit.state_dict()) == []


@pytest.mark.parametrize(
    "layout",
    [whole(PLACES), two_party(PLACES, 3), two_party(PLACES, 5), multi_hop(PLACES, [2, 4]), u_shaped(PLACES, [2, 4])],
    ids=lambda it: f"{it.kind} {len(it.stages[0].blocks)}",
)
def test_an_object_that_stands_twice_runs_at_every_place(layout):
    assert_equals_the_unsplit(layout, repeated)


@lazily()
def test_it_may_be_lazy():
    def model():
        layer = nn.LazyLinear(6)
        return in_order(nn.Flatten(), nn.Linear(24, 6), layer, nn.Tanh(), layer, nn.Linear(6, 3))

    first, second = (make_network(layout, model()) for layout in (whole(NAMES[:6]), two_party(NAMES[:6], 2)))
    layer = second.segments["top"].c
    assert layer is second.segments["top"].e
    assert torch.equal(layer.weight, first.segments["whole"].c.weight)
    assert len(second.parameters_of("bob")) == 4


def tie_of(one: str, other: str):
    """Blocks a to e, with the weight of one in place of the other's."""

    def model() -> nn.Sequential:
        torch.manual_seed(1)
        blocks = in_order(bottom(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6))
        blocks.add_module("f", nn.Linear(6, 3))
        blocks.get_submodule(other).weight = blocks.get_submodule(one).weight
        return blocks

    return model


@pytest.mark.parametrize("optimizer_state", ["carry", "reset"])
def test_tied_weights_are_averaged_as_in_fedavg(optimizer_state):
    mean, model = Average(optimizer_state), tie_of("b", "e")
    cut = train(u_shaped(NAMES[:6], [2, 4]), model(), num_alices=3, schedule={"alice": mean, "bob": mean})
    uncut = train(whole(NAMES[:6]), model(), num_alices=3, schedule={"alice": mean})
    assert differences(cut.weights, uncut.weights) == []
    hers = [24 * 6 + 6, 6 * 6 + 6, 6, 6 * 3 + 3]  # of a, b, e and f, the tied weight once
    state = 2 * 4 * sum(hers) * (optimizer_state == "carry")  # SGD's momentum, in either epoch
    crossed = cut.learner.ledger.table()["alice0->server"]
    assert crossed == {"weights": 2 * 4 * sum(hers), **({"optimizer_state": state} if state else {})}


def share_buffer(blocks: nn.Sequential) -> None:
    blocks.e.register_buffer("running", torch.zeros(6))
    blocks.b.register_buffer("running", blocks.e.running, persistent=False)


def share_memory(blocks: nn.Sequential) -> None:
    blocks.e.weight = nn.Parameter(blocks.b.weight)


def share_module(blocks: nn.Sequential) -> None:
    blocks.e = nn.Sequential(nn.Tanh(), blocks.b)


def stand_twice(blocks: nn.Sequential) -> None:
    blocks.e = blocks.b


@lazily()
def share_lazy(blocks: nn.Sequential) -> None:
    blocks.b, blocks.e = nn.LazyLinear(6), nn.LazyLinear(6)
    blocks.e.weight = blocks.b.weight


@pytest.mark.parametrize(
    ("tie", "one", "other"),
    [
        (share_buffer, "b.running", "e.running"),
        (share_memory, "b.weight", "e.weight"),
        (share_module, "b.weight", "e.1.weight"),
        (stand_twice, "b.weight", "e.weight"),
        (share_lazy, "b.weight", "e.weight"),
    ],
    ids=lambda it: getattr(it, "__name__", ""),
)
@pytest.mark.parametrize("wire", [None, "alice0", "bob", "server"])
def test_what_two_parties_would_share_is_refused(tie, one, other, wire):
    model, (x, y) = tie_of("f", "f")(), make_rows(2)
    tie(model)
    rule = f"`{one}` of alice and `{other}` of bob are one tensor (tied weights), which two parties cannot train: untie"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}"):
        SplitNetwork(model, two_party(NAMES[:6], 2), {"x": x, "y": y}, wire_of(wire))


def test_weights_that_only_lie_side_by_side_are_not_tied():
    model = tie_of("f", "f")()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    model.a.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)
    assert make_network(two_party(NAMES[:6], 2), model).describe().startswith("a of 150, b of 42")


def test_a_lazy_layer_that_is_tied_to_another_by_half_is_named():
    model = tie_of("f", "f")()
    share_lazy(model)
    model.b = nn.LazyLinear(6, bias=False)
    model.e.weight = model.b.weight  # torch then draws the weight again for the bias, and fails
    with pytest.raises(ValueError, match=r"^block `e` does not fit its input"):
        make_network(whole(NAMES[:6]), model)


def test_a_tie_counts_once_wherever_the_weights_live():
    model = tie_of("b", "e")()
    layout = u_shaped(NAMES[:6], [2, 4])
    (x, y), said = make_rows(2), set()
    for party in (None, "alice0", "bob"):
        network = SplitNetwork(copy.deepcopy(model), layout, {"x": x, "y": y}, wire_of(party))
        said.add(network.describe())
    assert said == {"a of 150, b of 42, c of 0, d of 42, e of 6, f of 21"}


@pytest.mark.parametrize("sharing", [Handoff(), Average(), Average("keep"), Personal(), MEAN], ids=repr)
@pytest.mark.parametrize("anew", [True, False], ids=["anew", "in place"])
def test_a_buffer_travels_however_it_is_kept(sharing, anew):
    schedule = sharing if isinstance(sharing, dict) else {"alice": sharing}
    kinds = {"anew": anew, "persistent": False}, {"anew": False, "persistent": True}
    runs = [train(TWO_PARTY, tied(3, **kind), num_alices=3, schedule=schedule) for kind in kinds]
    assert torch.equal(torch.stack(runs[0].losses), torch.stack(runs[1].losses))
    assert runs[0].learner.ledger.table() == runs[1].learner.ledger.table()
    buffers = [dict(run.learner.network.named_buffers()) for run in runs]
    assert differences(*buffers) == []
    assert all(value > 1 for value in buffers[0].values())


def test_a_message_may_be_as_large_as_the_largest_buffer():
    model = tied(3)
    model.block1.register_buffer("mask", torch.zeros(70, 80), persistent=False)
    network, sizes = make_network(TWO_PARTY, model), []
    party = SimpleNamespace(
        learner=SimpleNamespace(network=network),
        data=SimpleNamespace(batch_size=4, eval_batch_size=3),
        wiring=SimpleNamespace(check_size=sizes.append),
    )
    assert Federation._largest(party) == 2 * sizes[0] == WIDEST * 70 * 80


@pytest.mark.parametrize("sharing", [Handoff(), Average()], ids=["handoff", "average"])
def test_a_resumed_run_has_buffers_that_were_made_anew(tmp_path, sharing):
    def run(folder, ckpt=None, saves=True):
        data = make_data(19, num_alices=3)
        schedule = {"alice": copy.deepcopy(sharing)}
        learner = make_learner(data, TWO_PARTY, model=tied(3, anew=True), schedule=schedule)
        each = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(folder, callbacks=[each] if saves else [])
        trainer.fit(learner, datamodule=data, ckpt_path=ckpt)
        return {**learner.network.state_dict(), **learner.network.unsaved()}

    whole_run = run(tmp_path)
    assert "segments.bottom.block1.7.scale" in whole_run
    assert differences(run(tmp_path, tmp_path / "saved" / "step=7.ckpt", saves=False), whole_run) == []


RAW = (
    "{} sends raw data: {}, all that she has before the cut, have no weights, so whoever receives it can read her rows"
)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (two_party("abcd", 1), [("alice", "a")]),
        (two_party("abcd", 2), [("alice", "a, b")]),
        (two_party("abcd", 3), []),
        (whole("abcd"), []),
        (u_shaped("abcd", [1, 3]), [("alice", "a")]),
        (multi_hop("abcd", [1, 2]), [("alice", "a"), ("bob", "b")]),
        (vertical("abcd", 1, 2), [("alice0", "a"), ("alice1", "a")]),
    ],
    ids=lambda it: getattr(it, "kind", ""),
)
def test_raw_rows_are_warned_of_where_their_owner_plays(layout, told):
    blocks = {"a": nn.Flatten(), "b": nn.Dropout(), "c": nn.Linear(24, 4), "d": nn.Linear(4, 3)}
    x, y = make_rows(2)
    fields = {"x": x} if layout.fields == ("x",) else {"x0": x[..., :3], "x1": x[..., 3:]}
    for party in (None, "alice0", "bob"):
        model = nn.Sequential(OrderedDict(copy.deepcopy(blocks)))
        network = SplitNetwork(model, layout, {**fields, "y": y}, wire_of(party))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_raw_rows(network)
        heard = [RAW.format(*each) for each in told if network.wire.hosts(each[0])]
        assert [str(warning.message).rpartition(": cut")[0] for warning in caught] == heard


class Phase(nn.Module):
    """Complex inside, real outside, or not."""

    def __init__(self, back: bool, weight: bool) -> None:
        super().__init__()
        self.back = back
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.complex64)) if weight else None

    def forward(self, x):
        spectrum = torch.fft.fft(x) if self.weight is None else torch.fft.fft(x) * self.weight
        return torch.fft.ifft(spectrum).real if self.back else spectrum


class Real(nn.Module):
    def forward(self, x):
        return x.real


@pytest.mark.parametrize("block", [Phase(False, False), Phase(True, True)], ids=["output", "weight"])
@pytest.mark.parametrize("wire", [None, "alice0", "bob"])
@pytest.mark.parametrize("layout", [two_party("abcd", 2), two_party("abcd", 1)], ids=["at the cut", "behind it"])
def test_complex_numbers_are_refused_in_every_process(layout, block, wire):
    blocks = {
        "a": nn.Sequential(nn.Flatten(), nn.Linear(24, 4)),
        "b": copy.deepcopy(block),
        "c": Real(),
        "d": nn.Linear(4, 3),
    }
    x, y = make_rows(2)
    rule = r"^block `b` computes complex numbers, which do not cross: take torch.view_as_real$"
    with pytest.raises(ValueError, match=rule):
        SplitNetwork(nn.Sequential(OrderedDict(blocks)), layout, {"x": x, "y": y}, wire_of(wire))


def test_complex_numbers_inside_a_block_are_welcome():
    blocks = {"a": nn.Sequential(nn.Flatten(), nn.Linear(24, 4)), "b": Phase(True, False), "c": nn.Linear(4, 3)}
    assert len(train(two_party("abc", 2), nn.Sequential(OrderedDict(blocks))).losses) == 10


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def hooked() -> nn.Sequential:
    model = repeated()
    model.register_forward_pre_hook(lambda module, args: (args[0] / 255,))
    return model


@pytest.mark.parametrize("model", [Skip(*repeated()), hooked()], ids=["forward", "hook"])
def test_what_a_model_does_beside_its_blocks_is_refused(model):
    rule = (
        rf"^`model` \(={type(model).__name__}\) has a forward or hooks of its own, .*: put what it does into a block$"
    )
    with pytest.raises(ValueError, match=rule):
        make_network(two_party(list(model._modules), 1), model)


@pytest.mark.parametrize("name", ["seed", "labels", "shape"])
def test_a_name_that_a_segment_has_itself_is_refused(name):
    model = nn.Sequential(OrderedDict({"first": bottom(), name: nn.Linear(6, 3)}))
    with pytest.raises(ValueError, match=f"^block `{name}` has a name that every segment uses itself: give it another"):
        make_network(two_party(("first", name), 1), model)


def test_a_block_may_be_called_blocks():
    model = nn.Sequential(OrderedDict(patches=bottom(), blocks=nn.Linear(6, 3)))
    assert make_network(two_party(("patches", "blocks"), 1), model).segments["top"].blocks is model.blocks


def test_advice_needs_a_cut_that_no_tie_crosses():
    layer = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=r"^`model` has weights that are tied across every cut: untie them"):
        compare(measure(in_order(layer, layer), torch.randn(4, 6)), Terms([4], 2))


def test_a_run_of_a_layer_that_stands_twice_is_metered_twice():
    run = train(two_party(PLACES, 5), repeated())
    apart = train(two_party(PLACES, 5), nn.Sequential(OrderedDict(copy.deepcopy(list(repeated()._modules.items())))))
    flops = run.learner.meter.by_party()
    assert flops == apart.learner.meter.by_party()
    products = (19 * 2) * 2 * (6 * 6 * 2 + 6 * 3)
    assert flops["bob"].forward == products
    assert flops["bob"].backward == 2 * products  # by weights and by inputs


class TiedInside(nn.Module):
    """One weight under two names, between which there may be no cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x)).relu()).relu())


def test_the_cutter_leaves_tied_weights_in_one_block():
    assert list(cut_up(TiedInside(), "net")._modules) == ["a", "c", "d"]

"""A run that starts from weights equals a plain loop of torch that has loaded them, to the bit."""

import json
import shutil
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from federated import TINY, run_tiny, started, tied
from helpers import BLOCKS, Run, Unsplit, differences, make_network, make_rows, net, plainly, weights_of
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

import splitlearn
from splitlearn.build import build
from splitlearn.data import Source
from splitlearn.errors import InputError
from splitlearn.federation.greetings import check_initial
from splitlearn.layout import two_party
from splitlearn.models.zoo import torchvision as from_zoo
from splitlearn.network import SplitNetwork
from splitlearn.saved.initial import start_from
from splitlearn.train import CONF, train

SEEDED = (*TINY, "seed=3", "trainer.max_epochs=1")  # as `helpers` draw
UNTOLD = SimpleNamespace(classes=None, preparation=lambda field: {"mean": None, "std": None, "columns": None})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run that has ended, of two parties with two blocks each."""
    folder = tmp_path_factory.mktemp("trained")
    fixed = (f"output_dir={folder}", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", [*fixed, *SEEDED])
    train(cfg)
    return folder


def an_epoch(configure, *asked: str, epochs: int = 1) -> Run:
    """Train for an epoch as asked."""
    own = [part for part in SEEDED if not (any(a.startswith("layout") for a in asked) and part.startswith("layout"))]
    made = build(configure(*own, *asked))
    made.trainer.fit(made.learner, datamodule=made.data)
    steps = [made.trainer.train_dataloader.steps(epoch) for epoch in range(epochs)]
    return Run(made.learner, made.data, made.trainer, [], steps)


def loaded(folder: Path, model: nn.Sequential | None = None, only: str = "") -> nn.Sequential:
    """The uncut model as it is drawn, with the weights of a run's folder, or of the party `only`."""
    model = net() if model is None else model
    files = sorted(folder.glob(f"{only or '*'}/model/weights.safetensors"))
    assert files
    model.load_state_dict({name: t for path in files for name, t in load_file(path).items()}, strict=not only)
    return model


def plain(run: Run, model: nn.Sequential, frozen: tuple[str, ...] = ()) -> nn.Sequential:
    """An epoch of plain torch on the same mini-batches; what is frozen is in evaluation mode."""
    x, y = make_rows(57)

    class Still(Unsplit):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            for name in frozen:
                self.model.get_submodule(name).requires_grad_(False).eval()
            return self

    still = Still(model).train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
    plainly(still, lambda taker: [optimizer], run, (x[:50], y[:50]))
    return model


# Start from weights


@pytest.mark.parametrize(
    "layout",
    [("layout.cut=2",), ("layout.cut=1",), ("layout=u_shaped", "layout.cuts=[1,3]"), ("layout=whole",)],
    ids=["the same cut", "another cut", "u_shaped", "whole"],
)
def test_a_run_from_weights_equals_a_plain_loop_from_them(layout, trained, configure):
    run = an_epoch(configure, f"init={trained}", *layout)
    assert differences(run.weights, plain(run, loaded(trained)).state_dict()) == []


@pytest.mark.parametrize("place", ["{}/alice0", "{}/alice0/model", "[{}/alice0]"])
def test_what_is_not_given_stays_as_it_is_drawn(place, trained, configure, caplog):
    with caplog.at_level("INFO"):
        made = build(configure(*SEEDED, f"init={place.format(trained)}"))
    assert differences(weights_of(made.learner.network), loaded(trained, only="alice0").state_dict()) == []
    told = f"Initial weights: block1, block2 from {trained}/alice0/model; block3, head fresh"
    assert made.learner.network.origins == told
    assert told in caplog.text


def test_parts_of_a_list_go_together(trained, configure):
    made = build(configure(*SEEDED, f"init=[{trained}/bob,{trained}/alice0]"))
    assert differences(weights_of(made.learner.network), loaded(trained).state_dict()) == []


def test_everything_but_the_model_is_free(trained, configure):
    free = ("optimizer=sgd", "data.batch_size=7", "num_alices=2", "schedule=splitfed_v1", "trainer.precision=64-true")
    made = build(configure(*SEEDED, f"init={trained}", *free))
    expected = {n: t.double() if t.is_floating_point() else t for n, t in loaded(trained).state_dict().items()}
    assert differences(weights_of(made.learner.network), expected) == []


@pytest.mark.parametrize("name", ["state.pth", "state.safetensors"])
def test_a_file_of_weights_gives_what_it_has(name, trained, configure, tmp_path):
    state = {n: t for n, t in loaded(trained).state_dict().items() if n.startswith("block3")}
    (torch.save if name.endswith("pth") else save_file)(state, tmp_path / name)
    made = build(configure(*SEEDED, f"init=[{trained}/alice0,{tmp_path}/{name}]"))
    expected = {**loaded(trained).state_dict(), **{f"head.{n}": t for n, t in net().head.state_dict().items()}}
    assert differences(weights_of(made.learner.network), expected) == []
    assert made.learner.network.origins.endswith(f"block3 from {tmp_path / name}; head fresh")


def four_classes() -> Source:
    x, y = make_rows(57)
    return Source(TensorDataset(x[:50], y[:50] + 1), TensorDataset(x[50:], y[50:] + 1), 4)


def headed(num_classes: int) -> nn.Sequential:
    model = net()
    model.head = nn.Linear(7, num_classes)
    return model


def test_a_head_of_other_classes_is_left_fresh_where_that_is_asked_for(trained, configure):
    other = ("data.source._target_=test_init.four_classes", "model._target_=test_init.headed", f"init={trained}")
    told = r"head.bias is \[3\] there and \[4\] here, head.weight is .* here: take .*, init_fresh=\[head\]$"
    with pytest.raises(InputError, match=rf"^`init` \(={trained}/bob/model\) does not fit: {told}"):
        build(configure(*SEEDED, *other))
    made = build(configure(*SEEDED, *other, "init_fresh=[head]"))
    assert made.learner.network.origins.endswith(f"block3 from {trained}/bob/model; head fresh")
    expected = {**headed(4).state_dict(), **loaded(trained)[:3].state_dict()}
    assert differences(weights_of(made.learner.network), expected) == []


@pytest.mark.parametrize("blocks", [("",), ("conv1.", "bn1.", "layer1.0.")], ids=["whole", "of a party"])
def test_a_file_of_torchvision_gives_its_blocks(blocks, tmp_path):
    """As older torch left it, without counters."""
    torch.manual_seed(0)
    whole, model, x = torchvision.models.resnet18(num_classes=5), from_zoo(5, "resnet18"), torch.rand(2, 3, 32, 32)
    state = {n: t for n, t in whole.state_dict().items() if n.startswith(blocks) and "num_batches" not in n}
    torch.save(state, tmp_path / "resnet18.pth")
    layout = two_party(model, "layer1_0")
    network = SplitNetwork(model, layout, {"x": x, "y": torch.tensor([0, 1])})
    bottom = network.segments["bottom"].eval()
    origins = start_from(network, [tmp_path / "resnet18.pth"], [], UNTOLD)
    assert bool(origins.fresh) == (len(blocks) > 1)
    with torch.no_grad():
        expected = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool, whole.layer1[0]).eval()(x)
        assert torch.equal(bottom(x), expected)
        if not origins.fresh:
            assert torch.equal(network.segments["top"].eval()(expected), whole.eval()(x))


# One process per party


def shares(folder: Path, *places: str) -> dict[str, torch.Tensor]:
    return {n: t for place in places for n, t in load_file(folder / place / "model" / "weights.safetensors").items()}


@pytest.mark.parametrize(
    ("asked", "parties"),
    [
        pytest.param("freeze=[alice]", ("alice0", "bob"), marks=pytest.mark.slow),
        *(
            pytest.param(f"wire={wire} {asked}", parties, marks=pytest.mark.slow)
            for wire in ("gloo", "grpc")
            for asked, parties in (
                ("num_alices=2", ("alice0", "alice1", "bob")),
                ("num_alices=2 freeze=[block1] schedule=splitfed_v1", ("alice0", "alice1", "bob", "server")),
                ("num_alices=2 freeze=[block1] schedule=splitfed_v3", ("alice0", "alice1", "bob")),
                ("layout=u_shaped layout.cuts=[1,3] freeze=[head,block2]", ("alice0", "bob")),
            )
        ),
    ],
)
def test_one_process_per_party_equals_the_simulator(asked, parties, trained, configure, tmp_path):
    words = (f"init={trained}", "data.batch_size=5", *asked.split())
    one, other = tmp_path / "whole", tmp_path / "run"
    ours = run_tiny(configure, one, *(word for word in words if not word.startswith("wire")))
    theirs = run_tiny(configure, other, *words, "engine=processes")
    assert ours == theirs  # bytes and FLOPs, too
    for party in parties:
        assert differences(shares(one, party), shares(other, party)) == []


@pytest.mark.slow
def test_each_party_names_its_own_folder_and_alices_who_hand_on_the_same(trained, tmp_path):
    """Two of three terminals begin with the folder of their own; the third with one in which a value is another."""
    odd = tmp_path / "odd.safetensors"
    save_file({name: value + (name == "block1.0.bias") for name, value in shares(trained, "alice0").items()}, odd)
    mine = {"bob": trained / "bob", "alice0": trained / "alice0", "alice1": trained / "alice0"}
    for name, places, told in (
        ("same", mine, ""),
        (
            "other",
            {**mine, "alice1": odd},
            "alice0 and alice1 start from other weights",
        ),
    ):
        (tmp_path / name).mkdir()
        with started(tmp_path / name, *SEEDED, "engine=processes", "num_alices=2", "data.batch_size=6") as start:
            running = [start(party, f"init={place}") for party, place in places.items()]
            assert [process.wait(120) == 0 for process in running] == [not told] * 3
        log = (tmp_path / name / "bob.log").read_text()
        assert told in log
        assert f"Initial weights: block3, head from {trained}/bob/model\n" in log


@pytest.mark.parametrize(("digests", "told"), [(("a", "a"), None), (("a", "b"), "x and y"), (("", "b"), "x and y")])
def test_who_hands_on_starts_from_the_same(digests, told):
    greetings = {"bob": {"initial": None}, **{p: {"initial": d} for p, d in zip("xy", digests, strict=True)}}
    refused = pytest.raises(InputError, match=rf"^{told} start from other weights, .* by `init`$")
    with refused if told else nullcontext():
        check_initial(greetings)


# Freeze


FROZEN = {
    "a party": ("[alice]", ("block1", "block2")),
    "blocks of both": ("[block2,block3]", ("block2", "block3")),
    "a party and a block": ("[alice,block3]", ("block1", "block2", "block3")),
    "the top": ("[bob]", ("block3", "head")),
}


@pytest.mark.parametrize(("asked", "blocks"), FROZEN.values(), ids=FROZEN)
def test_what_is_frozen_equals_a_plain_loop_that_freezes_it(asked, blocks, trained, configure):
    """Batch norm and dropout of frozen blocks are in evaluation mode, so all weights and buffers stay."""
    run = an_epoch(configure, f"init={trained}", f"freeze={asked}")
    assert differences(run.weights, plain(run, loaded(trained), blocks).state_dict()) == []
    moved = differences(run.weights, loaded(trained).state_dict())
    assert {name.partition(".")[0] for name in moved} == {"block1", "block2", "block3", "head"} - {*blocks}
    held = [p for optimizer in run.learner.stepper.optimizers.values() for p in optimizer.state]
    assert len(held) == len([p for name, p in net().named_parameters() if name.partition(".")[0] not in blocks])


def test_a_frozen_bottom_is_sent_no_gradient_and_computes_none(trained, configure, tmp_path, capsys):
    run = an_epoch(configure, f"init={trained}", "freeze=[alice]")
    sent = 4 * sum(len(ids) for ids in run.data.shards.values()) * 10
    assert run.learner.ledger.table() == {"alice0->bob": {"activation": sent}}
    flops = run.learner.meter.by_party()
    assert flops["alice0"].backward == 0 < flops["alice0"].forward
    assert flops["bob"].backward > 0
    drawn = capsys.readouterr().out
    assert "| alice -> bob: activation 4 x 10 float32, 160 bytes\n" in drawn
    left = splitlearn.load(tmp_path / "run" / "alice0", net())["bottom"]
    assert differences(left.state_dict(), loaded(trained)[:2].state_dict()) == []


@pytest.mark.parametrize("schedule", ["sequential", "splitfed_v1", "splitfed_v3", "parallel"])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_what_is_frozen_is_not_handed_on_or_averaged(schedule, precision, trained, configure, tmp_path):
    """Everybody has it, so it does not cross; of `block2` alone, which trains, the bytes are as computed by hand."""
    asked = ("num_alices=3", "data.batch_size=5", f"schedule={schedule}", f"trainer.precision={precision}")
    run = an_epoch(configure, f"init={trained}", "freeze=[block1]", *asked)
    width = 8 if precision == "64-true" else 4
    moved = {
        (src, dst, kind): count for (src, dst, kind), count in run.learner.ledger.num_bytes.items() if "weight" in kind
    }
    moving = width * (48 * 10 + 10)
    assert set(moved.values()) <= {moving, len(run.steps[0]) * moving}
    assert bool(moved) == (schedule != "splitfed_v3")
    still = {name: value for name, value in loaded(trained).state_dict().items() if name.startswith("block1")}
    for alice in run.data.takers:
        files = load_file(tmp_path / "run" / alice / "model" / "weights.safetensors")
        assert differences({n: files[n].to(still[n].dtype) for n in still}, still) == []
        assert {n for n in files if n.startswith("block2")}


def test_frozen_blocks_do_not_mind_one_row(configure):
    """Batch norm in evaluation mode can do with one: of 42 rows in batches of 41 one is left."""
    asked = ("data.batch_size=41", "freeze=[block1,block3]")
    run = an_epoch(configure, *asked)
    assert [len(ids) for step in run.steps[0] for ids in step.batches.values()] == [41, 1]


def test_a_run_with_frozen_blocks_goes_on_as_it_was(trained, configure, tmp_path):
    train(configure(*SEEDED, "freeze=[block1]"))
    more = (*SEEDED, "trainer.max_epochs=2", f"ckpt={tmp_path}/run/checkpoints/last.ckpt")
    with pytest.raises(InputError, match=r"`freeze` is block1 in the checkpoint and nothing here"):
        train(configure(*more))
    train(configure(*more, "freeze=[block1]"))
    gone_on = load_file(tmp_path / "run" / "alice0" / "model" / "weights.safetensors")
    train(configure(*SEEDED, "freeze=[block1]", "trainer.max_epochs=2"))
    assert differences(gone_on, load_file(tmp_path / "run" / "alice0" / "model" / "weights.safetensors")) == []


def test_all_that_may_be_named(configure):
    network = partial(make_network, two_party(BLOCKS, 2))
    for asked, blocks in ((["alice"], ["block1", "block2"]), (["head", "block1"], ["block1", "head"]), ([], [])):
        frozen = network()
        frozen.freeze(asked)
        assert frozen.frozen == blocks
        assert {n.split(".")[2] for n, p in frozen.named_parameters() if not p.requires_grad} == {*blocks}
        frozen.train()
        still = [segment.get_submodule(name) for segment in frozen.segments.values() for name in segment.frozen]
        assert not any(part.training for block in still for part in block.modules())
    names = "parties, alice, bob, or blocks, block1, block2, block3, head"
    with pytest.raises(InputError, match=rf"^`freeze` \(=hidden1\) must name {names}$"):
        network().freeze(["alice", "hidden1"])
    with pytest.raises(InputError, match=r"^`freeze` \(=alice, bob\) leaves nothing to train: leave a party or a bloc"):
        network().freeze(["alice", "bob"])


def test_a_layer_that_is_frozen_and_trains_is_refused():
    """`block2` is a layer of `block1`, and `drop` one that draws."""
    layout = two_party(tied(3), 5)
    for names, message in (
        (
            ["block2"],
            r"`freeze` \(=block2\) shares a layer with block1, which trains: freeze both, or give each its own",
        ),
        (["block1", "block2"], r"`freeze` \(=block1\) shares a layer with drop"),
    ):
        with pytest.raises(InputError, match=message):
            make_network(layout, tied(3)).freeze(names)
    make_network(layout, tied(3)).freeze(["alice"])


def test_what_a_callback_unfreezes_is_refused(configure):
    with pytest.raises(
        InputError, match=r"block1.0.weight` of alice is in a block that `freeze` names, and a callback"
    ):
        train(configure(*SEEDED, "freeze=[block1]", "trainer.max_epochs=2", "+callbacks.thaw={_target_: helpers.Thaw}"))


# What is refused, or warned of


ASKED = {
    "init=nowhere": r"`init` \(=nowhere\) must be the folder of a run, a party's in it, or a file .*: name one",
    "init=[]": r"`init` \(=\[\]\) must be a folder, a file, or a list of them",
    "init=[1]": r"`init` \(=\[1\]\) must be a folder, a file, or a list of them",
    "init_fresh=[head]": r"`init_fresh` \(=\['head'\]\) leaves blocks out of `init`: give init=FOLDER, too",
    "init={} init_fresh=[tail]": r"`init_fresh` \(=tail\) must name blocks with weights: block1, block2, block3, head",
    "init={} init_fresh=head": r"`init_fresh` \(=head\) must be a list of names: init_fresh=\[head\]",
    "freeze=alice": r"`freeze` \(=alice\) must be a list of names: freeze=\[head\]",
    "freeze=[carol]": r"`freeze` \(=carol\) must name parties, alice, bob, or blocks, block1, .*",
    "init={} ckpt={}/checkpoints/last.ckpt": r"`init` \(=.*\) starts a run and `ckpt` .* goes on with one",
    "init={} weights={}/checkpoints/last.ckpt": r"`init` \(=.*\) and `weights` \(=.*\) both start a run: take one",
    "init=[{}/bob,{}/bob/model]": r"`init` has block block3 in .*/bob/model and in .*/bob/model: name one .*",
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_cannot_be_asked_is_told_in_one_line(asked, trained, configure):
    with pytest.raises(InputError, match=f"^{ASKED[asked]}") as caught:
        build(configure(*SEEDED, *asked.format(*[trained] * 2).split()))
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy, to be damaged."""
    for party in ("alice0", "bob"):
        shutil.copytree(trained / party / "model", tmp_path / "copy" / party / "model")
    return tmp_path / "copy"


def rewrite(folder: Path, party: str, /, **changes: object) -> None:
    path = folder / party / "model" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def manifest(folder: Path, party: str) -> dict:
    return json.loads((folder / party / "model" / "manifest.json").read_text())


def make_stale(folder: Path) -> None:
    rewrite(folder, "alice0", weights={**manifest(folder, "alice0")["weights"], "stale": True, "trained_at": "alice1"})


def mix(folder: Path) -> None:
    rewrite(folder, "bob", run={**manifest(folder, "bob")["run"], "schedule": "another"})


def damage(folder: Path) -> None:
    path = folder / "bob" / "model" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def make_personal(folder: Path) -> None:
    shutil.copytree(folder / "alice0", folder / "alice1")
    rewrite(folder, "alice1", party="alice1", weights={**manifest(folder, "alice0")["weights"], "digest": "0"})


def empty(folder: Path) -> None:
    shutil.rmtree(folder / "alice0")
    shutil.rmtree(folder / "bob")


WRONG = {
    "stale": (make_stale, "alice0/model is stale: alice1 has what is trained of alice; take the folder of that party"),
    "two runs": (mix, "are of two runs: `schedule` is .* in one and another in the other; take the folders of one run"),
    "damaged": (damage, r"bob/model/weights.safetensors is damaged \(.*\): take the folder as the run left it"),
    "personal": (
        make_personal,
        r"has another bottom of each Alice \(alice0, alice1\): say whose, init=\[.*/alice0,.*bob",
    ),
    "empty": (empty, "has no model: name the folder of a run that has ended, or a party's in it"),
}


def start(folder: Path | list[Path], data: object = UNTOLD, leave_fresh: tuple[str, ...] = ()) -> SplitNetwork:
    network = make_network(two_party(BLOCKS, 2))
    start_from(network, folder if isinstance(folder, list) else [folder], leave_fresh, data)
    return network


@pytest.mark.parametrize(("how", "message"), WRONG.values(), ids=WRONG)
def test_folders_that_are_wrong_are_refused_by_name(how, message, folder):
    start(folder)
    how(folder)
    with pytest.raises(InputError, match=message):
        start(folder)
    if message.startswith("are of two"):
        with pytest.raises(InputError, match=message):
            start([folder / "alice0", folder / "bob"])


FILES = {
    "nested": ({"state_dict": {}}, "must hold tensors by name alone: save the model's state_dict"),
    "other": (
        {"one.weight": torch.zeros(2)},
        "has the blocks one, and the model here has block1, block2, block3, head",
    ),
    "extra": (
        {**net().state_dict(), "head.scale": torch.zeros(2)},
        r"does not fit: head.scale is \[2\] there and missing here: take .* init_fresh=\[head\]",
    ),
    "less": ({"head.bias": torch.zeros(3)}, r"does not fit: head.weight is missing there and \[3, 7\] here: take"),
    "code": ({"head.bias": Path("x")}, r"cannot be read \(UnpicklingError\): take another one"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_files_that_are_wrong_are_refused_by_name(content, message, tmp_path):
    torch.save(content, tmp_path / "state.pth")
    with pytest.raises(InputError, match=rf"^`init` \(={tmp_path}/state.pth\) {message}"):
        start(tmp_path / "state.pth")


def prepared(mean: object = None, columns: object = None, classes: object = None) -> SimpleNamespace:
    return SimpleNamespace(classes=classes, preparation=lambda field: {"mean": mean, "std": None, "columns": columns})


def test_what_inputs_and_classes_meant_is_compared(folder):
    """As far as the blocks see it that are taken: the first sees columns, the last tells classes."""
    field = manifest(folder, "alice0")["inputs"]["x"]
    rewrite(folder, "alice0", inputs={"x": {**field, "mean": [0.5], "columns": ["a", "b"]}})
    rewrite(folder, "bob", classes=["ill", "well"])
    same = {"mean": [0.5], "columns": ["a", "b"], "classes": ["ill", "well"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(folder, prepared(**same))
        other = prepared([0.1], ["b", "a"], ["well", "ill"])
        start(folder, other, leave_fresh=("block1", "head"))
    for what, there, here in (("columns", "a, b", "b, a"), ("classes", "ill, well", "well, ill")):
        told = f"was trained for the {what} {there}, and here they are {here}: bring them into the order of there$"
        with pytest.raises(InputError, match=told):
            start(folder, prepared(**{**same, what: here.split(", ")}))
    with pytest.warns(
        UserWarning, match=r"was trained on rows with data.mean \[0.5\], and here they have data.mean \[0.1"
    ):
        start(folder, prepared(**{**same, "mean": [0.1]}))
    with pytest.warns(
        UserWarning, match=r"for the classes ill, well, and here they are cat, dog: leave the block fresh"
    ):
        start(folder, prepared(**{**same, "classes": ["cat", "dog"]}))

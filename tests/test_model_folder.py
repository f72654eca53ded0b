"""What a run leaves of its network, read back, equals what it trained: merged, party by party, in both engines."""

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from federated import TINY, Drifting, run_tiny, tied, tied_ends
from helpers import BLOCKS, Recorder, Run, dealt, differences, make_rows, net, train
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import make_data, make_learner, make_trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import splitlearn
from splitlearn import layout as layouts
from splitlearn.callbacks.model_folder import ModelFolder
from splitlearn.data import Source, SplitData
from splitlearn.errors import InputError
from splitlearn.layout import Layout
from splitlearn.models.zoo import torchvision as from_zoo
from splitlearn.network import Batch
from splitlearn.saved.manifest import Manifest, read_manifest
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Handoff, Personal
from splitlearn.segment import evaluating
from splitlearn.train import train as train_as_asked

LAYOUTS = {
    "whole": layouts.whole(BLOCKS),
    "two_party": layouts.two_party(BLOCKS, 2),
    "u_shaped": layouts.u_shaped(BLOCKS, [1, 3]),
    "multi_hop": layouts.multi_hop(BLOCKS, [1, 3]),
    "vertical": layouts.vertical(BLOCKS, 1, num_alices=2),
    "extended_vanilla": layouts.extended_vanilla(BLOCKS, [1, 3], num_alices=2),
}
CHAINS = ("whole", "two_party", "u_shaped", "multi_hop")
TWO_PARTY = LAYOUTS["two_party"]
SCHEDULES = {
    "sequential": {"alice": Handoff()},
    "by the server": {"alice": Handoff(handoff="server")},
    "splitfed_v1": {"alice": Average(), "bob": Average()},
    "parallel": {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"},
}


def trained(folder: Path, layout: Layout = TWO_PARTY, callback: Callable = ModelFolder, **options: object) -> Run:
    """Train `net` with a model folder; no Alice has a mini-batch of one row, on which batch norm could not train."""
    if sizes := {2: (11, 8), 3: (7, 6, 6)}.get(options.get("num_alices", 1)):
        options["data"] = {"partition": dealt(*sizes)}
    return train(layout, trainer={"callbacks": [callback(folder)], **options.pop("trainer", {})}, **options)


def output_of(run: Run, x: Tensor, alice: str = "alice0") -> Tensor:
    """What the split network makes of the training rows, in evaluation."""
    fields = next(iter(run.data.rows.stream([torch.arange(len(x))], torch.device("cpu"))))
    network, cast = run.learner.network, run.learner.layout.cast(alice)
    with torch.no_grad(), evaluating(network), run.learner.rounds.as_of(alice):
        return network(Batch(torch.arange(len(x)), fields, (0, 0)), cast)[0]


def merged(folder: Path) -> dict[str, Tensor]:
    """All tensors of all parties, read by safetensors alone."""
    return {name: value for path in sorted(folder.rglob("*.safetensors")) for name, value in load_file(path).items()}


def told(folder: Path, party: str) -> dict:
    return json.loads((folder / party / "model" / "manifest.json").read_text())


def weights_in(folder: Path, party: str) -> dict[str, Tensor]:
    return load_file(folder / party / "model" / "weights.safetensors")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_all_parts_together_equal_the_network(kind, tmp_path):
    run, (x, _) = trained(tmp_path, LAYOUTS[kind]), make_rows(19)
    loaded = splitlearn.load(tmp_path, lambda num_classes: net())
    assert type(loaded) is nn.Sequential
    with torch.no_grad():
        assert torch.equal(loaded(x), output_of(run, x))


@pytest.mark.parametrize("kind", CHAINS)
def test_all_files_together_load_into_the_uncut_model(kind, tmp_path):
    run, (x, _), plain = trained(tmp_path, LAYOUTS[kind]), make_rows(19), net()
    plain.load_state_dict(merged(tmp_path), strict=True)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), output_of(run, x))


@pytest.mark.parametrize(
    ("kind", "owned"),
    [
        ("whole", {"alice0": ["block1", "block2", "block3", "head"]}),
        ("two_party", {"alice0": ["block1", "block2"], "bob": ["block3", "head"]}),
        ("u_shaped", {"alice0": ["block1", "head"], "bob": ["block2", "block3"]}),
        ("multi_hop", {"alice0": ["block1"], "bob": ["block2", "block3"], "carol": ["head"]}),
        ("vertical", {"alice0": ["bottom0"], "alice1": ["bottom1"], "bob": ["block2", "block3", "head"]}),
        (
            "extended_vanilla",
            {"alice0": ["bottom0"], "alice1": ["bottom1"], "carol": ["block2", "block3"], "bob": ["head"]},
        ),
    ],
)
def test_a_party_has_its_own_segments_and_nothing_else(kind, owned, tmp_path):
    run, found = trained(tmp_path, LAYOUTS[kind]), {}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(owned)
    for party, names in owned.items():
        assert list(dict.fromkeys(name.partition(".")[0] for name in sorted(weights_in(tmp_path, party)))) == names
        segments = splitlearn.load(tmp_path / party, net())
        assert list(segments) == list(told(tmp_path, party)["stages"])
        assert not any(part.training for part in segments.modules())
        found |= {f"segments.{name}": value for name, value in segments.state_dict().items()}
    assert differences(found, run.learner.network.state_dict()) == []


def test_a_manifest_says_what_one_needs(tmp_path):
    trained(tmp_path, num_alices=2)
    manifest = told(tmp_path, "alice1")
    assert (manifest["format"], manifest["party"], manifest["role"]) == (1, "alice1", "alice")
    assert manifest["run"]["layout"] == TWO_PARTY.describe()
    assert manifest["stages"] == {"bottom": {"shape": [1, 4, 6], "dtype": "float32"}}
    crossing = {"value": "bottom", "src": "alice", "dst": "bob", "shape": [10], "dtype": "float32"}
    assert manifest["crosses"] == [crossing] == told(tmp_path, "bob")["crosses"]
    assert manifest["inputs"]["x"]["shape"] == [1, 4, 6]
    assert told(tmp_path, "bob")["inputs"] == {}
    assert manifest["versions"]["torch"] == torch.__version__
    assert (manifest["num_classes"], manifest["weights"]["step"]) == (3, 10)


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (partial(tied, 3), layouts.two_party(list(tied(3)._modules), 2)),
        (partial(tied, 3, anew=True, persistent=True), layouts.two_party(list(tied(3)._modules), 6)),
        (partial(tied_ends, 3), layouts.u_shaped(list(tied_ends(3)._modules), [1, 2])),
        (partial(tied_ends, 3), layouts.vertical(list(tied_ends(3)._modules), 3, num_alices=1 + 1)),
    ],
    ids=["unsaved", "anew", "two ends", "vertical"],
)
def test_tied_weights_and_unsaved_buffers_are_there(make, layout, tmp_path):
    """Buffers that drift in training change what comes out, and no `state_dict` has them."""
    model = make() if layout.kind != "vertical" else _narrower(make())
    run, (x, _) = trained(tmp_path, layout, model=model), make_rows(19)
    loaded = splitlearn.load(tmp_path, make() if layout.kind != "vertical" else _narrower(make()))
    drifted = [part.scale for part in loaded.modules() if isinstance(part, Drifting)]
    assert drifted
    assert all(scale > 1 for scale in drifted)
    with torch.no_grad():
        assert torch.equal(loaded(x), output_of(run, x))
    ties = sum(1 for _ in loaded.named_parameters(remove_duplicate=False)) - sum(1 for _ in loaded.parameters())
    assert ties > 0


def _narrower(model: nn.Sequential) -> nn.Sequential:
    """For bottoms of three of the six columns each, whose activations are joined in front of the head."""
    model.block1[1], model.head = nn.Linear(12, 9), nn.Linear(18, 3)
    return model


def test_lazy_layers_have_their_shapes(tmp_path):
    def lazy(num_classes: int) -> nn.Sequential:
        blocks = {"flat": nn.Flatten(), "first": nn.LazyLinear(8), "head": nn.LazyLinear(num_classes)}
        return nn.Sequential(OrderedDict(blocks))

    run, (x, _) = trained(tmp_path, layouts.two_party(["flat", "first", "head"], 2), model=lazy(3)), make_rows(19)
    loaded = splitlearn.load(tmp_path, lazy)
    assert [type(part) for part in loaded] == [nn.Flatten, nn.Linear, nn.Linear]
    assert torch.equal(loaded(x), output_of(run, x))


def test_doubles_stay_doubles(tmp_path):
    run, (x, _) = trained(tmp_path, trainer={"precision": "64-true"}), make_rows(19)
    assert told(tmp_path, "bob")["stages"]["top"]["dtype"] == "float64"
    assert torch.equal(splitlearn.load(tmp_path, net())(x.double()), output_of(run, x))


def test_of_a_torchvision_model_all_parts_load_into_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 32, 32, generator=generator)
    model = from_zoo(3, "resnet18")
    layout, rows = layouts.u_shaped(model, ["layer1_0", "layer3_0"]), (x, torch.arange(6) % 3)
    asked = {"_target_": "splitlearn.models.zoo.torchvision", "name": "resnet18", "weights": "DEFAULT"}
    small = partial(torch.optim.SGD, lr=1e-3)
    run = trained(tmp_path, layout, partial(ModelFolder, model=asked), model=model, rows=rows, epochs=1, make=small)
    plain = torchvision.models.resnet18(num_classes=3)
    plain.load_state_dict({name.partition(".")[2]: value for name, value in merged(tmp_path).items()}, strict=True)
    with torch.no_grad():
        expected = output_of(run, x)
        assert torch.equal(plain.eval()(x), expected)
        assert torch.equal(splitlearn.load(tmp_path)(x), expected)  # and nothing is fetched


class Best(ModelCheckpoint):
    """Of the first epoch, by what is measured."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "best", monitor="val/loss", save_on_train_epoch_end=False)


@pytest.mark.parametrize("test", ["last", "best"])
def test_the_weights_are_those_of_the_best_checkpoint(test, tmp_path):
    """With a rate that diverges the first epoch is the best."""
    data = make_data(val_rows=6, num_alices=2)
    learner = make_learner(data, make=partial(torch.optim.SGD, lr=2.0), schedule={"alice": Handoff()})
    best = Best(tmp_path)
    trainer = make_trainer(tmp_path, [ModelFolder(tmp_path / "run"), best])
    trainer.fit(learner, datamodule=data)
    last = {name: value.clone() for name, value in learner.network.state_dict().items()}
    saved = torch.load(best.best_model_path, weights_only=True)
    expected = {name.split(".", 3)[3]: value for name, value in saved["state_dict"].items() if "segments" in name}
    assert differences(merged(tmp_path / "run"), expected) == []
    assert differences(merged(tmp_path / "run"), {n.split(".", 2)[2]: v for n, v in last.items()}) != []
    assert differences(learner.network.state_dict(), last) == []  # the last ones are still at hand
    trainer.test(learner, datamodule=data, ckpt_path=best.best_model_path if test == "best" else None, verbose=False)
    manifest = told(tmp_path / "run", "bob")
    assert manifest["weights"]["step"] == saved["global_step"] == 10
    assert (manifest["weights"]["of"], manifest["weights"]["monitor"]) == ("best", "val/loss")
    assert manifest["metrics"]["val/loss"] == pytest.approx(manifest["weights"]["score"])
    assert ("test/loss" in manifest["metrics"]) == (test == "best")


def test_parties_without_one_best_checkpoint_leave_the_last_weights(tmp_path, monkeypatch):
    """A callback of its own at each host may know another best."""
    data, best = make_data(val_rows=6), Best(tmp_path)
    learner = make_learner(data)
    monkeypatch.setattr(learner.network.wire, "gather", lambda value: [value, 7])
    with pytest.warns(UserWarning, match="the last weights, since the parties do not have one best checkpoint: give"):
        make_trainer(tmp_path, [ModelFolder(tmp_path / "run"), best]).fit(learner, datamodule=data)
    assert told(tmp_path / "run", "bob")["weights"]["of"] == "last"
    live = {name.split(".", 2)[2]: value for name, value in learner.network.state_dict().items()}
    assert differences(merged(tmp_path / "run"), live) == []


class Remembering(nn.Linear):
    """Has state that is no tensor."""

    def get_extra_state(self) -> dict:
        return {"seen": 3}

    def set_extra_state(self, state: dict) -> None: ...


def test_state_that_is_no_tensor_is_told(tmp_path):
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), first=Remembering(24, 4), head=nn.Linear(4, 3)))
    with pytest.warns(UserWarning, match=r"^first._extra_state is no weight and no buffer, and not in the model fold"):
        trained(tmp_path, layouts.two_party(model, 2), model=model)
    assert list(weights_in(tmp_path, "alice0")) == ["first.bias", "first.weight"]


def test_the_test_adds_its_metrics(tmp_path):
    run = trained(tmp_path, val_fraction=0.2)
    assert set(told(tmp_path, "bob")["metrics"]) == {"val/loss", "val/accuracy"}
    run.trainer.test(run.learner, datamodule=run.data, verbose=False)
    metrics = told(tmp_path, "bob")["metrics"]
    assert set(metrics) == {"val/loss", "val/accuracy", "test/loss", "test/accuracy"}
    assert metrics["test/loss"] == float(run.trainer.callback_metrics["test/loss"])


@pytest.mark.parametrize("turn", ["epoch", "step"])
def test_personal_bottoms_are_each_alices_own(turn, tmp_path):
    schedule = {"alice": Personal(), "turn": turn, "bob": MeanGradient() if turn == "step" else Average()}
    run, (x, _) = trained(tmp_path, num_alices=3, schedule=schedule), make_rows(19)
    outputs = []
    for alice in ("alice0", "alice1", "alice2"):
        loaded = splitlearn.load(tmp_path, net(), alice=alice)
        outputs.append(loaded(x))
        assert torch.equal(outputs[-1], output_of(run, x, alice))
    assert not torch.equal(outputs[0], outputs[1])
    rule = r"has another bottom of each Alice \(alice0, alice1, alice2\): say whose, .*alice='alice0'"
    with pytest.raises(InputError, match=rule):
        splitlearn.load(tmp_path, net())


NUM_BYTES = 4 * (2 * 9 + 2 + 4 * 2 + 48 * 10 + 10) + 8  # weights and buffers of blocks 1 and 2
GIVEN = {
    "sequential": {"alice2->alice0": NUM_BYTES, "alice2->alice1": NUM_BYTES},
    "by the server": {"alice2->server": 2 * NUM_BYTES, "server->alice0": NUM_BYTES, "server->alice1": NUM_BYTES},
    "splitfed_v1": {f"server->alice{i}": NUM_BYTES for i in range(3)},
    "parallel": {},
}


@pytest.mark.parametrize(("schedule", "given"), GIVEN.items())
def test_all_are_given_the_trained_bottom_and_training_costs_no_more(schedule, given, tmp_path):
    """All Alices' folders equal the live weights; the ledger of training is that of a run without the callback."""
    run = trained(tmp_path, num_alices=3, schedule=SCHEDULES[schedule])
    alone = train(TWO_PARTY, num_alices=3, schedule=SCHEDULES[schedule], data={"partition": dealt(7, 6, 6)})
    assert run.learner.ledger.table() == alone.learner.ledger.table()
    assert run.learner.evaluation_ledger.table() == alone.learner.evaluation_ledger.table()
    assert run.learner.final_ledger.table() == {pair: {"weights": num} for pair, num in given.items()}
    live = {name: value for name, value in run.weights.items() if name.startswith(("block1", "block2"))}
    server = ["server"] if schedule in ("splitfed_v1", "parallel") else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alice0", "alice1", "alice2", "bob", *server]
    for party in ("alice0", "alice1", "alice2", *server):
        assert differences(weights_in(tmp_path, party), live) == []
    assert differences(alone.weights, run.weights) == []


def test_equal_weights_stand_on_the_disk_once(tmp_path):
    trained(tmp_path, num_alices=3)
    assert len({(tmp_path / f"alice{i}" / "model" / "weights.safetensors").stat().st_ino for i in range(3)}) == 1


class Zeros(Recorder):
    """Sends zeros where weights are due at the end."""

    def hear(self, message):
        return torch.zeros_like(message.tensor) if message.kind == "weights" and message.dst == "alice0" else None


def test_who_is_given_something_else_has_it(tmp_path):
    """A tap of the last Alice's replaces what alice0 is given, and nobody else's folder has that."""
    trained(tmp_path, num_alices=3, epochs=1, taps=[Zeros("alice2")])
    weights = [weights_in(tmp_path, f"alice{i}") for i in range(3)]
    assert not any(value.any() for value in weights[0].values())
    assert differences(weights[1], weights[2]) == []
    assert all(value.any() for name, value in weights[1].items() if name.endswith("weight"))


@pytest.mark.parametrize(
    ("schedule", "fresh", "stale"),
    [("sequential", "alice2", ["alice0", "alice1"]), ("splitfed_v1", "server", ["alice0", "alice1", "alice2"])],
)
def test_with_last_the_others_are_told_who_has_the_trained_one(schedule, fresh, stale, tmp_path):
    trained(tmp_path, num_alices=3)  # an earlier run into the same folder
    last, (x, _) = partial(ModelFolder, final="last"), make_rows(19)
    run = trained(tmp_path, callback=last, num_alices=3, schedule=SCHEDULES[schedule])
    assert run.learner.final_ledger.table() == {}
    for alice in stale:
        weights = told(tmp_path, alice)["weights"]
        assert (weights["stale"], weights["trained_at"]) == (True, fresh)
        assert [path.name for path in (tmp_path / alice / "model").iterdir()] == ["manifest.json"]
        with pytest.raises(InputError, match=rf"is stale: {fresh} has what is trained of alice; take .*final=all$"):
            splitlearn.load(tmp_path / alice, net())
    assert not told(tmp_path, fresh)["weights"]["stale"]
    assert torch.equal(splitlearn.load(tmp_path, net())(x), output_of(run, x, "alice2"))


def test_a_round_that_was_broken_off_leaves_the_weights_of_its_start(tmp_path):
    """As evaluation does: 19 rows are five mini-batches, and the second round ends after the seventh."""
    schedule = {"alice": Average(), "bob": Average()}
    broken = trained(tmp_path / "broken", schedule=schedule, trainer={"max_steps": 7, "max_epochs": -1})
    assert broken.learner.rounds.halfway
    trained(tmp_path / "whole", schedule=schedule, epochs=1)
    assert differences(merged(tmp_path / "broken"), merged(tmp_path / "whole")) == []


def test_final_must_be_all_or_last(configure):
    with pytest.raises(InputError, match=r"^`final` \(=first\) must be one of all, last$"):
        train_as_asked(configure(*TINY, "final=first"))


# What cannot be read back


@pytest.fixture
def run_folder(tmp_path) -> Path:
    trained(tmp_path / "run", epochs=1)
    return tmp_path / "run"


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def newer(content: bytes) -> bytes:
    return json.dumps({**json.loads(content), "format": 2}).encode()


def without(key: str) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != key}).encode()


DAMAGED = {
    "cut": ("weights.safetensors", lambda content: content[:-5], r"weights.safetensors is damaged \(.*\): take"),
    "empty": ("weights.safetensors", lambda content: b"", r"weights.safetensors is damaged \(.*\): take"),
    "a bit": (
        "weights.safetensors",
        flip,
        r"weights.safetensors is damaged, or of another run than the manifest: take",
    ),
    "newer": ("manifest.json", newer, r"json has format 2, and this splitlearn reads up to 1: install a newer one$"),
    "cut words": ("manifest.json", lambda content: content[:-5], r"json is damaged \(JSONDecodeError.*\): take"),
    "no layout": ("manifest.json", without("layout"), r"json is damaged \(KeyError: 'layout'\): take"),
    "no format": ("manifest.json", without("format"), r"json is damaged \(KeyError: 'format'\): take"),
    "a list": ("manifest.json", lambda content: b"[]", r"json is damaged \(.*\): take"),
    "no text": ("manifest.json", lambda content: b"\xff\xfe", r"json is damaged \(UnicodeDecodeError.*\): take"),
    "dtype": ("manifest.json", lambda content: content.replace(b"float32", b"load"), r"json is damaged \(Val.*: take"),
}


@pytest.mark.parametrize(("name", "how", "message"), DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("where", [".", "bob"], ids=["run", "party"])
def test_what_is_damaged_is_told_in_one_line(where, name, how, message, run_folder):
    damage(run_folder / "bob" / "model" / name, how)
    with pytest.raises(InputError, match=message) as caught:
        splitlearn.load(run_folder / where, net())
    assert "\n" not in str(caught.value)


def test_no_model_in_a_folder(tmp_path, run_folder):
    rule = r"has no model: name the folder of a run that has ended, or a party's in it$"
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=rule):
            splitlearn.load(folder)
    (run_folder / "alice0" / "model" / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"alice0/model has no weights.safetensors: take the folder as the run left"):
        splitlearn.load(run_folder, net())


def test_a_missing_part_is_named(run_folder):
    (run_folder / "bob").rename(run_folder.parent / "bob")
    with pytest.raises(InputError, match=r"run lacks the part of bob: put the folder of that party there, bob/model$"):
        splitlearn.load(run_folder, net())
    with pytest.raises(InputError, match=r"lacks the part of alice7"):
        splitlearn.load(run_folder, net(), alice="alice7")


OTHER = {
    "data": (
        {"rows": (make_rows(19)[0] + 1, make_rows(19)[1])},
        "`data` is seed 3, .* in one and seed 3, .* in the other",
    ),
    "epochs": ({"epochs": 2}, "`mini-batches` is 10 in one and 5 in the other"),
    "settings": ({"callback": partial(ModelFolder, config="ab")}, "`configuration` is ab in one and None in the other"),
}


@pytest.mark.parametrize(("other", "message"), OTHER.values(), ids=OTHER)
def test_parts_of_two_runs_are_refused(other, message, run_folder, tmp_path):
    trained(tmp_path / "other", **{"epochs": 1, **other})
    (run_folder / "alice0").rename(tmp_path / "alice0")
    (tmp_path / "other" / "alice0").rename(run_folder / "alice0")
    with pytest.raises(InputError, match=rf"are of two runs: {message}; take the folders of one run$"):
        splitlearn.load(run_folder, net())


def test_weights_of_another_run_are_refused(run_folder, tmp_path):
    trained(tmp_path / "other", epochs=2)
    place = Path("bob", "model", "weights.safetensors")
    (tmp_path / "other" / place).rename(run_folder / place)
    with pytest.raises(InputError, match="is damaged, or of another run than the manifest"):
        splitlearn.load(run_folder / "bob", net())


def test_a_folder_runs_no_code_of_its_own(run_folder):
    """What a manifest names is imported only where it is splitlearn's own."""
    ours = r"which is not splitlearn's own and is not imported .*: give it, model=my_net, or on the .*$"
    with pytest.raises(InputError, match=rf"a model that no configuration names, {ours}"):
        splitlearn.load(run_folder)
    for target in ("os.system", "splitlearn.models_of_mine.net", "builtins.eval"):
        for party in ("alice0", "bob"):
            path = run_folder / party / "model" / "manifest.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "model": {"_target_": target}}))
        with pytest.raises(InputError, match=rf"has the model {target}, {ours}"):
            splitlearn.load(run_folder)


def test_a_model_that_does_not_fit_is_told(run_folder):
    wider = net()
    wider.block3, wider.head = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3)
    rule = r"does not fit: block3.0.bias is \[7\] there and \[8\] in the model, .*, and 2 more: give the `model`"
    with pytest.raises(InputError, match=rule):
        splitlearn.load(run_folder, wider)
    with pytest.raises(InputError, match=r"cannot be made \(it has no block block1\): give the trained one, model=..."):
        splitlearn.load(run_folder, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match=r"cannot be made \(.*\): give the trained one, model=..."):
        splitlearn.load(run_folder, lambda: net())


def test_an_earlier_format_is_read(run_folder, monkeypatch):
    monkeypatch.setattr("splitlearn.saved.manifest.FORMAT", 7)
    assert read_manifest(run_folder / "bob" / "model").format == 1


# Preparation


def small(num_columns: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(OrderedDict(first=nn.Linear(num_columns, 5), head=nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("layout", "columns", "owned"),
    [
        (layouts.two_party(["first", "head"], 1), None, {"alice0": ("x", [0, 1, 2, 3])}),
        (
            layouts.vertical(["first", "head"], 1, num_alices=2),
            [["pressure", "age"], ["weight", "height"]],
            {"alice0": ("x0", [3, 0]), "alice1": ("x1", [1, 2])},
        ),
    ],
    ids=["two_party", "vertical"],
)
def test_mean_and_deviation_of_a_table_are_in_the_manifest(layout, columns, owned, tmp_path):
    """Of the rows that are trained on, column by column; each Alice knows those of her own columns alone."""
    names, generator = ["age", "weight", "height", "pressure"], torch.Generator().manual_seed(0)
    x, y = 5 + 3 * torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    x[:, 2] = 7.0  # a column of one value
    source = Source(TensorDataset(x, y), None, 3, names, ["a", "b", "c"])
    data = SplitData(source, layout, 1, columns, standardise=True, val_fraction=0.25)
    width = len(owned["alice0"][1])
    learner = make_learner(data, layout, model=small(width))
    make_trainer(tmp_path, [ModelFolder(tmp_path)], max_epochs=1).fit(learner, datamodule=data)

    (rows,) = (x[ids].double().T.tolist() for ids in data.shards.values())
    mean = [sum(column) / len(column) for column in rows]
    std = [(sum((v - m) ** 2 for v in c) / len(c)) ** 0.5 or 1.0 for c, m in zip(rows, mean, strict=True)]
    for alice, (field, places) in owned.items():
        assert list(told(tmp_path, alice)["inputs"]) == [field]
        found = told(tmp_path, alice)["inputs"][field]
        assert found["mean"] == pytest.approx([mean[i] for i in places], rel=1e-12)
        assert found["std"] == pytest.approx([std[i] for i in places], rel=1e-12)
        assert found["columns"] == [names[i] for i in places]
        assert found["places"] == (None if columns is None else places)
    assert told(tmp_path, "bob")["classes"] == ["a", "b", "c"]

    mean, std = (torch.tensor(data.normalised[f"data.{name}"]) for name in ("mean", "std"))
    fields, network = next(iter(data.rows.stream([torch.arange(40)], torch.device("cpu")))), learner.network
    with torch.no_grad(), evaluating(network):
        expected, _, _ = network(Batch(torch.arange(40), fields, (0, 0)), layout.cast("alice0"))
        assert torch.equal(splitlearn.load(tmp_path, small(width))((x - mean) / std), expected)


# As it is asked for


def test_a_run_leaves_folders_and_says_where(configure, tmp_path, capsys):
    train_as_asked(configure("+experiment=digits_2party", "trainer.max_epochs=1", "num_alices=2", "logger=none"))
    folders = f"{tmp_path}/run/{{alice0,alice1,bob}}/model"
    line = f"The trained models are in {folders}: splitlearn.load('{tmp_path}/run') reads them"
    assert capsys.readouterr().out.splitlines()[-1] == line
    manifest = told(tmp_path / "run", "alice0")
    assert manifest["model"]["_target_"] == "splitlearn.models.mlp"
    assert manifest["config"] == told(tmp_path / "run", "bob")["config"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert manifest["metrics"].items() >= results["test"].items()
    assert results["final_bytes"] == {"alice1->alice0": {"weights": 4 * (64 * 64 + 64)}}
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    loaded = splitlearn.load(tmp_path / "run").state_dict()
    assert differences(loaded, {name.split(".", 3)[3]: value for name, value in last.items()}) == []


def test_another_setting_is_another_configuration(configure, tmp_path):
    quick = ("+experiment=digits_2party", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "logger=none")
    for name, more in (("one", "metric=null"), ("same", "trainer.log_every_n_steps=7"), ("other", "optimizer.lr=0.1")):
        train_as_asked(configure(*quick, more, f"output_dir={tmp_path}/{name}"))
    one, same, other = (told(tmp_path / name, "bob")["config"] for name in ("one", "same", "other"))
    assert one == same != other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "parties"),
    [
        ("num_alices=3", "alice0 alice1 alice2 bob"),
        ("num_alices=3 schedule.alice.handoff=server", "alice0 alice1 alice2 bob"),
        ("num_alices=2 final=last", "alice0 alice1 bob"),
        ("num_alices=2 schedule=splitfed_v1", "alice0 alice1 bob server"),
        ("num_alices=2 schedule=splitfed_v3", "alice0 alice1 bob"),
        ("num_alices=3 schedule=parallel schedule.participation=0.67", "alice0 alice1 alice2 bob server"),
        ("num_alices=2 callbacks.checkpoint.monitor=val/loss optimizer.lr=0.5", "alice0 alice1 bob"),
        ("num_alices=2 layout=vertical partition=columns layout.cut=1", "alice0 alice1 bob"),
        ("layout=u_shaped layout.cuts=[1,3]", "alice0 bob"),
    ],
)
def test_one_process_per_party_leaves_the_same(asked, parties, configure, tmp_path):
    """The same files to the byte, and manifests but for the date and the digest of a configuration with processes."""
    one, other = tmp_path / "whole", tmp_path / "run"
    ours, theirs = (
        run_tiny(configure, folder, *asked.split(), *engine)
        for folder, engine in ((one, ()), (other, ["engine=processes"]))
    )
    assert ours == theirs  # final_bytes, too
    for party in parties.split():
        manifests = told(one, party), told(other, party)
        for manifest in manifests:
            del manifest["date"], manifest["config"]
        assert manifests[0] == manifests[1]
        files = [folder / party / "model" / "weights.safetensors" for folder in (one, other)]
        if manifests[0]["weights"]["stale"]:
            assert not any(path.exists() for path in files)
        else:
            assert files[0].read_bytes() == files[1].read_bytes()
    mine = {"alice": "alice1"} if "splitfed_v3" in asked else {}
    loaded = [splitlearn.load(folder, net(), **mine).state_dict() for folder in (one, other)]
    assert differences(*loaded) == []


def test_a_file_of_safetensors_alone_is_no_folder(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="has no model"):
        splitlearn.load(tmp_path)


def test_the_page_does_what_it_says(configure, tmp_path, monkeypatch):
    """The commands of docs/after_training.md are in tests/test_docs.py; here is its Python."""
    page = (Path(__file__).parents[1] / "docs" / "after_training.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    quick = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "logger=none", f"output_dir={tmp_path}/my_run")
    train_as_asked(configure("+experiment=digits_2party", *quick))
    monkeypatch.chdir(tmp_path)
    made: dict = {}
    exec(code, made)
    x = torch.rand(3, 1, 8, 8)
    activation = splitlearn.load("my_run/alice0")["bottom"](x)
    assert torch.equal(made["segments"]["top"](activation), made["network"](x))
    (keys,) = (part for part in page.split("\n## ") if part.startswith("The manifest"))
    assert set(told(tmp_path / "my_run", "bob")) == set(re.findall("`([a-z_]+)`", keys)) & set(Manifest.__annotations__)

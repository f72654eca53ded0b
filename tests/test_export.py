"""What is exported does what the split network does, read by torch.export or onnxruntime alone."""

import importlib.metadata
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from helpers import BLOCKS, Run, dealt, make_rows, net, train
from runs import make_learner, make_trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import splitlearn
from splitlearn import export as module
from splitlearn import layout as layouts
from splitlearn.callbacks.model_folder import ModelFolder
from splitlearn.data import Source, SplitData
from splitlearn.errors import InputError
from splitlearn.layout import Layout
from splitlearn.models import lenet
from splitlearn.models.zoo import torchvision as from_zoo
from splitlearn.network import Batch
from splitlearn.saved import programs
from splitlearn.saved.exporting import _uncut, export
from splitlearn.saved.programs import FORMATS, Joined, compare, write_program
from splitlearn.schedules.sharing import Personal
from splitlearn.segment import evaluating
from splitlearn.train import train as train_as_asked

onnxruntime = pytest.importorskip("onnxruntime")  # pip install 'splitlearn[export]'

LAYOUTS = {
    "two_party": layouts.two_party(BLOCKS, 1),
    "later cut": layouts.two_party(BLOCKS, 3),
    "u_shaped": layouts.u_shaped(BLOCKS, [1, 3]),
    "vertical": layouts.vertical(BLOCKS, 1, num_alices=2),
}
CHAINS = ("two_party", "later cut", "u_shaped")


def trained(
    folder: Path, layout: Layout = LAYOUTS["two_party"], asked: Mapping | None = None, **options: object
) -> Run:
    if sizes := {2: (11, 8), 3: (7, 6, 6)}.get(options.get("num_alices", 1)):
        options["data"] = {"partition": dealt(*sizes)}  # no mini-batch of one row
    callback = ModelFolder(folder, model=asked)
    return train(layout, epochs=1, trainer={"callbacks": [callback], **options.pop("trainer", {})}, **options)


def output_of(run: Run, x: Tensor) -> Tensor:
    """What the split network makes of the training rows, in evaluation."""
    fields = next(iter(run.data.rows.stream([torch.arange(len(x))], torch.device("cpu"))))
    network, cast = run.learner.network, run.learner.layout.cast("alice0")
    with torch.no_grad(), evaluating(network):
        return network(Batch(torch.arange(len(x)), fields, (0, 0)), cast)[0]


def by_torch(path: Path, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(*inputs)


def by_onnxruntime(path: Path, **inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return torch.from_numpy(output)


def notes(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())["files"]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_near(found: Tensor, expected: Tensor) -> bool:
    """The same classes, and the same values to what a float32 has of them."""
    apart = float((found - expected).abs().max())
    return torch.equal(found.argmax(1), expected.argmax(1)) and apart <= 1e-5 * float(expected.abs().max())


def some(kinds: Iterable[str]) -> list:
    """One of them in the fast tests: a program of ONNX takes seconds."""
    return [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "two_party")) for kind in kinds]


@pytest.mark.parametrize("kind", some(LAYOUTS))
def test_the_network_in_one_piece_is_the_split_network(kind, tmp_path):
    run, (x, _) = trained(tmp_path, LAYOUTS[kind]), make_rows(19)
    expected = output_of(run, x)
    lines = list(export(tmp_path, rows=5, model=net()))
    place = tmp_path / "export"
    assert files_in(place) == ["export.json", "model.onnx", "model.pt2", "weights.safetensors"]
    for rows in (slice(19), slice(3, 4)):  # other numbers than the two that are traced, and the five that are checked
        assert is_near(by_onnxruntime(place / "model.onnx", x=x[rows]), expected[rows])
        assert is_near(by_torch(place / "model.pt2", x[rows]), expected[rows])
    assert torch.equal(by_torch(place / "model.pt2", x), expected)
    stages = ", ".join(stage.name for stage in LAYOUTS[kind].stages)
    assert lines[0] == f"{tmp_path}: the network in one piece equals {stages} one after the other, to the bit on 5 rows"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        f"{place}/{name}" for name in ("weights.safetensors", "model.pt2", "model.onnx")
    ]


@pytest.mark.parametrize("kind", some(["two_party", "u_shaped", "vertical"]))
def test_the_parts_one_after_the_other_are_the_split_network(kind, tmp_path):
    """Fed by name, from party to party."""
    layout = LAYOUTS[kind]
    run, (x, _) = trained(tmp_path, layout), make_rows(19)
    list(export(tmp_path, "parts", model=net()))
    fields = next(iter(run.data.rows.stream([torch.arange(19)], torch.device("cpu"))))
    exact, near = dict(fields), dict(fields)
    for stage in layout.stages:
        place = tmp_path / (f"{stage.role}0" if stage.role == "alice" else stage.role) / "export"
        (out,) = notes(place)[f"{stage.name}.onnx"]["outputs"]
        near[out] = by_onnxruntime(place / f"{stage.name}.onnx", **{name: near[name] for name in stage.inputs})
        exact[out] = by_torch(place / f"{stage.name}.pt2", *(exact[name] for name in stage.inputs))
    assert torch.equal(exact[layout.stages[-1].name], output_of(run, x))
    assert is_near(near[layout.stages[-1].name], output_of(run, x))


@pytest.mark.parametrize("kind", CHAINS)
def test_the_weights_are_those_of_the_uncut_model(kind, tmp_path):
    run, (x, _), plain = trained(tmp_path, LAYOUTS[kind]), make_rows(19), net()
    list(export(tmp_path, formats="torch", model=net()))
    plain.load_state_dict(load_file(tmp_path / "export" / "weights.safetensors"), strict=True)
    assert torch.equal(plain.eval()(x), output_of(run, x))


def trained_zoo(folder: Path, name: str, size: int, **options: object) -> tuple[Run, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, size, size, generator=generator)
    model = from_zoo(3, name, **options)
    asked = {"_target_": "splitlearn.models.zoo.torchvision", "name": name, "weights": "DEFAULT", **options}
    small = partial(torch.optim.SGD, lr=1e-3)
    layout = layouts.two_party(model, len(model) // 2)
    return trained(folder, layout, asked, model=model, rows=(x, torch.arange(6) % 3), make=small), x


@pytest.mark.slow  # a program of ONNX takes seconds
def test_the_weights_of_a_torchvision_model_load_into_it(tmp_path):
    run, x = trained_zoo(tmp_path, "resnet18", 32)
    list(export(tmp_path, formats="torch"))
    plain = torchvision.models.resnet18(num_classes=3)
    plain.load_state_dict(load_file(tmp_path / "export" / "weights.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), output_of(run, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 32, {}),
        ("mobilenet_v3_small", 64, {}),
        ("googlenet", 64, {"aux_logits": False, "init_weights": False}),
        ("vit_b_16", 224, {}),
    ],
)
def test_large_models_export(name, size, options, tmp_path):
    run, x = trained_zoo(tmp_path, name, size, **options)
    list(export(tmp_path, rows=4))
    place, expected = tmp_path / "export", output_of(run, x)
    for found in (by_torch(place / "model.pt2", x), by_onnxruntime(place / "model.onnx", x=x)):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    plain = torchvision.models.get_model(name, weights=None, num_classes=3, **options)
    plain.load_state_dict(load_file(place / "weights.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), expected)


@pytest.mark.slow
def test_of_maxvit_only_fixed_indices_are_missing():
    """A trace has them as constants of names of its own, which are left out."""
    asked = SimpleNamespace(model={"_target_": "splitlearn.models.zoo.torchvision", "name": "maxvit_t"})
    found = _uncut(from_zoo(3, "maxvit_t"), [SimpleNamespace(manifest=asked)], None)
    missing, unexpected = torchvision.models.maxvit_t(num_classes=3).load_state_dict(found, strict=False)
    assert {name.rpartition(".")[2] for name in missing} == {"relative_position_index"}
    assert unexpected == []


def test_what_a_file_is_stands_beside_it(tmp_path):
    trained(tmp_path)
    list(export(tmp_path, rows=7, model=net()))
    told = notes(tmp_path / "export")["model.onnx"]
    assert told["inputs"]["x"]["shape"] == [1, 4, 6]
    assert told["inputs"]["x"]["dtype"] == "float32"
    assert told["outputs"] == {"output": {"shape": [3], "dtype": "float32"}}
    assert (told["rows"], told["num_classes"], told["rtol"]) == (7, 3, 1e-5)
    assert 0 <= told["difference"] <= 2 * told["atol"]  # which is 1e-5 of the largest value
    assert told["versions"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    digests = {
        role: json.loads((tmp_path / party / "model" / "manifest.json").read_text())["weights"]["digest"]
        for role, party in (("alice", "alice0"), ("bob", "bob"))
    }
    assert told["weights"] == digests


def small(num_columns: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(OrderedDict(first=nn.Linear(num_columns, 5), head=nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("layout", "columns"),
    [
        (layouts.two_party(["first", "head"], 1), None),
        (layouts.vertical(["first", "head"], 1, num_alices=2), [["pressure", "age"], ["weight", "height"]]),
    ],
    ids=["two_party", "vertical"],
)
def test_mean_and_deviation_of_a_whole_table_are_told(layout, columns, tmp_path):
    """With them the raw rows, in the order of the table, give what the split network gives."""
    names, generator = ["age", "weight", "height", "pressure"], torch.Generator().manual_seed(0)
    x, y = 5 + 3 * torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    source = Source(TensorDataset(x, y), None, 3, names, ["a", "b", "c"])
    data = SplitData(source, layout, 1, columns, standardise=True)
    width = 4 if columns is None else 2
    learner = make_learner(data, layout, model=small(width))
    make_trainer(tmp_path, [ModelFolder(tmp_path)], max_epochs=1).fit(learner, datamodule=data)
    list(export(tmp_path, model=small(width)))
    told = notes(tmp_path / "export")["model.onnx"]
    assert told["inputs"]["x"]["columns"] == names
    assert told["classes"] == ["a", "b", "c"]
    mean, std = (torch.tensor(told["inputs"]["x"][name]) for name in ("mean", "std"))
    fields, network = next(iter(data.rows.stream([torch.arange(40)], torch.device("cpu")))), learner.network
    with torch.no_grad(), evaluating(network):
        expected, _, _ = network(Batch(torch.arange(40), fields, (0, 0)), layout.cast("alice0"))
    assert is_near(by_onnxruntime(tmp_path / "export" / "model.onnx", x=(x - mean) / std), expected)

    list(export(tmp_path, "parts", formats="torch", model=small(width)))
    for alice, field in (("alice0", "x"),) if columns is None else (("alice0", "x0"), ("alice1", "x1")):
        (own,) = notes(tmp_path / alice / "export").values()
        model = json.loads((tmp_path / alice / "model" / "manifest.json").read_text())["inputs"][field]
        assert {key: own["inputs"][field][key] for key in ("mean", "std", "columns")}.items() <= model.items()
        assert "classes" not in own
    assert notes(tmp_path / "bob" / "export")["top.pt2"]["classes"] == ["a", "b", "c"]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x).mean(1)


def test_whole_numbers_go_in(tmp_path):
    layout, rows = layouts.two_party(["words", "head"], 1), (torch.arange(95).reshape(19, 5) % 9, torch.arange(19) % 3)

    def made(num_classes: int) -> nn.Sequential:
        return nn.Sequential(OrderedDict(words=Words(), head=nn.Linear(4, num_classes)))

    run = trained(tmp_path, layout, model=made(3), rows=rows)
    list(export(tmp_path, model=made))
    told, expected = notes(tmp_path / "export")["model.onnx"], output_of(run, rows[0])
    assert told["inputs"]["x"]["dtype"] == "int64"
    assert is_near(by_onnxruntime(tmp_path / "export" / "model.onnx", x=rows[0]), expected)


def test_doubles_stay_doubles(tmp_path):
    layout, (x, _) = layouts.two_party(list(small(24)._modules), 1), make_rows(19)
    rows, options = (x.flatten(1), torch.arange(19) % 3), {"trainer": {"precision": "64-true"}}
    run = trained(tmp_path, layout, model=small(24), rows=rows, **options)
    list(export(tmp_path, model=small(24)))
    found = by_onnxruntime(tmp_path / "export" / "model.onnx", x=rows[0].double())
    assert notes(tmp_path / "export")["model.onnx"]["rtol"] == 1e-9
    assert torch.allclose(found, output_of(run, rows[0]), rtol=1e-9, atol=0)


# Several Alices


def test_alices_who_have_one_bottom_have_one_program(tmp_path):
    trained(tmp_path, num_alices=3)
    lines = list(export(tmp_path, "parts", formats="torch", model=net()))
    assert lines[1:3] == [f"{tmp_path}/alice{i}/export: the same as {tmp_path}/alice0/export" for i in (1, 2)]
    one, other = (tmp_path / f"alice{i}" / "export" for i in (0, 2))
    assert files_in(one) == files_in(other) == ["bottom.pt2", "export.json"]
    assert (one / "bottom.pt2").read_bytes() == (other / "bottom.pt2").read_bytes()
    list(export(tmp_path / "alice2", formats="torch", model=net()))
    assert notes(one) == notes(other)


def test_where_bottoms_are_personal_it_must_be_said_whose(tmp_path):
    trained(tmp_path, num_alices=2, schedule={"alice": Personal()})
    with pytest.raises(
        InputError, match=r"another bottom of each Alice \(alice0, alice1\): say whose, alice='alice0'$"
    ):
        list(export(tmp_path, formats="torch", model=net()))
    x, found = make_rows(19)[0], []
    for alice in ("alice0", "alice1"):
        list(export(tmp_path, formats="torch", model=net(), alice=alice))
        found.append(by_torch(tmp_path / "export" / "model.pt2", x))
        assert torch.equal(found[-1], splitlearn.load(tmp_path, net(), alice=alice)(x))
    assert not torch.equal(*found)
    list(export(tmp_path, "parts", formats="torch", model=net(), alice="alice1"))
    assert (tmp_path / "alice1" / "export").is_dir()
    assert not (tmp_path / "alice0" / "export").exists()


def test_who_is_behind_is_left_out(tmp_path):
    callback = ModelFolder(tmp_path, final="last")
    train(LAYOUTS["two_party"], num_alices=2, data={"partition": dealt(11, 8)}, trainer={"callbacks": [callback]})
    lines = list(export(tmp_path, "parts", formats="torch", model=net()))
    assert lines[0] == f"{tmp_path}/alice0/model: left out; alice1 has what is trained of alice"
    assert not (tmp_path / "alice0" / "export").exists()
    with pytest.raises(InputError, match=r"alice0/model is stale: alice1 has what is trained"):
        list(export(tmp_path / "alice0", model=net()))


# Again


def test_what_is_there_of_the_same_weights_stays_and_of_others_goes(tmp_path):
    place = tmp_path / "export"
    trained(tmp_path)
    for formats in ("onnx", "torch"):
        list(export(tmp_path, formats=formats, model=net()))
    assert set(files_in(place)) == {"export.json", *notes(place)}
    assert set(notes(place)) == {"weights.safetensors", "model.onnx", "model.pt2"}
    trained(tmp_path, batch_size=5)
    list(export(tmp_path, formats="torch", model=net()))
    assert files_in(place) == ["export.json", "model.pt2", "weights.safetensors"]


def test_a_file_that_is_wrong_is_not_kept(tmp_path, monkeypatch):
    """Nor one of that name from before: nobody shall take it for the new one."""
    trained(tmp_path)
    list(export(tmp_path, formats="torch", model=net()))
    read = FORMATS["torch"].read
    wrong = FORMATS["torch"]._replace(read=lambda path: lambda rows: read(path)(rows) * 1.001)
    monkeypatch.setitem(FORMATS, "torch", wrong)
    rule = r"export/model.pt2 is wrong, and not kept: its output differs from torch's by 0\.00\d+, where rtol=1e-05 and"
    with pytest.raises(InputError, match=rule):
        list(export(tmp_path, formats="torch", model=net()))
    assert files_in(tmp_path / "export") == ["export.json", "weights.safetensors"]
    assert set(notes(tmp_path / "export")) == {"weights.safetensors"}


class Fickle(nn.Module):
    """What no training sees: from some time on it answers otherwise at each call."""

    awake = False

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1) if Fickle.awake and not torch.compiler.is_compiling() else x


def test_parts_that_are_not_the_network_are_told(tmp_path, monkeypatch):
    model = net()
    model.block2.append(Fickle())
    trained(tmp_path, model=model)
    again = net()
    again.block2.append(Fickle())
    monkeypatch.setattr("splitlearn.saved.exporting.segments_of", _then_awake(monkeypatch))
    with pytest.raises(
        InputError, match=r"is not what its parts are one after the other, so nothing is exported: a bl"
    ):
        list(export(tmp_path, model=again))
    assert not (tmp_path / "export").exists()


def _then_awake(monkeypatch) -> Callable:
    from splitlearn.saved.loading import segments_of

    def found(*args: object) -> dict:
        monkeypatch.setattr(Fickle, "awake", False)
        segments = segments_of(*args)
        monkeypatch.setattr(Fickle, "awake", True)
        return segments

    return found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([[1.0, 2.0]]), r"it gives \[1, 2\] of torch.float32 for \[2, 2\] of torch.float32"),
        (torch.tensor([[1.0, 2], [3, 4]]).double(), r"of torch.float64 for"),
        (torch.tensor([[1.0, 2], [3, 4.0002]]), r"differs from torch's by 0.0002, where rtol=1e-05 and atol=4e-05"),
        (torch.tensor([[1.0, 2], [3, torch.nan]]), r"differs from torch's by nan"),
    ],
)
def test_other_outputs_are_refused(given, message):
    with pytest.raises(InputError, match=rf"^file is wrong, and not kept: .*{message}"):
        compare(torch.tensor([[1.0, 2], [3, 4]]), given, "file")


def test_outputs_within_the_tolerance_are_taken():
    expected = torch.tensor([[1.0, 2], [3, 4]])
    assert compare(expected, expected, "file") == (0.0, 1e-5, pytest.approx(4e-5))
    assert compare(expected, expected + 2e-5, "file").largest == pytest.approx(2e-5, rel=0.1)
    with pytest.raises(InputError, match="nothing finite, which proves nothing"):
        compare(expected * torch.nan, expected * torch.nan, "file")


# What cannot be exported


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1).reshape(2, 4) if len(x) == 2 else x


def with_block(block: nn.Module) -> Joined:
    torch.manual_seed(0)
    return Joined({"first": nn.Linear(4, 4), "odd": block, "head": nn.Linear(4, 2)}).eval()


@pytest.mark.slow  # a program of ONNX takes seconds
def test_a_block_that_onnx_lacks_is_named(tmp_path):
    model, x = with_block(Bessel()), {"x": torch.randn(5, 4)}
    rule = r"^block `odd` cannot be written as ONNX \(No ONNX function found for .*bessel_j0.*\): take format=torch$"
    with pytest.raises(InputError, match=rule):
        list(write_program(model, x, "output", [FORMATS["onnx"]], tmp_path / "model"))
    assert files_in(tmp_path) == []
    list(write_program(model, x, "output", [FORMATS["torch"]], tmp_path / "model"))
    assert torch.equal(by_torch(tmp_path / "model.pt2", x["x"]), model(x["x"]))


def test_half_of_the_bits_is_for_torch_alone(tmp_path):
    model, x = with_block(nn.Identity()).bfloat16(), {"x": torch.randn(5, 4).bfloat16()}
    with pytest.raises(InputError, match=r"^block `first` cannot be written as ONNX \(.*\): take format=torch$"):
        list(write_program(model, x, "output", [FORMATS["onnx"]], tmp_path / "model"))
    ((path, _, difference),) = write_program(model, x, "output", [FORMATS["torch"]], tmp_path / "model")
    assert (path.name, difference.rtol) == ("model.pt2", 5e-2)


@pytest.mark.parametrize("block", [ByValue(), Pairs()], ids=["by value", "pairs"])
def test_a_block_that_is_no_program_is_named(block, tmp_path, capfd):
    rule = (
        r"^block `odd` cannot be exported \(.*\): its forward must do the same whatever the values, and for any number"
    )
    with pytest.raises(InputError, match=rule):
        list(write_program(with_block(block), {"x": torch.randn(5, 4)}, "output", [FORMATS["torch"]], tmp_path / "m"))
    assert capfd.readouterr() == ("", "")


def test_without_onnx_it_is_said_what_to_install(tmp_path, monkeypatch):
    trained(tmp_path)
    there = lambda name: None if name.startswith("onnx") else name  # noqa: E731
    monkeypatch.setattr(programs, "find_spec", there)
    rule = (
        r"^ONNX needs onnx, onnxscript, onnxruntime, not installed here: pip install 'splitlearn\[export\]', or take f"
    )
    for formats in ("onnx", "all"):
        with pytest.raises(InputError, match=rule):
            list(export(tmp_path, formats=formats, model=net()))
    list(export(tmp_path, formats="torch", model=net()))
    assert (tmp_path / "export" / "model.pt2").is_file()


def test_bad_input_is_told(tmp_path):
    empty, run = tmp_path / "empty", tmp_path / "run"
    empty.mkdir()
    trained(run)
    asked = partial(export, model=net())
    for call, message in (
        (partial(export, empty), r"has no model: name the folder of a run that has ended, or a party's in it$"),
        (partial(asked, run, "whole"), r"^`what` \(=whole\) must be one of merged, parts, or left out$"),
        (partial(asked, run, formats="pickle"), r"^`format` \(=pickle\) must be one of torch, onnx, all$"),
        (partial(asked, run, rows=0), r"^`rows` \(=0\) must be a whole number of at least 1$"),
        (partial(asked, run, rows="ten"), r"^`rows` \(=ten\) must be a whole number of at least 1$"),
        (partial(asked, run, "parts", alice="alice7"), r"lacks the part of alice7: put the folder of that party there"),
        (partial(asked, run, alice="alice7"), r"lacks the part of alice7: put the folder of that party there"),
        (partial(asked, run / "bob", "merged"), r"bob lacks the part of alice: name the run's folder, or take what=p"),
        (
            partial(export, run),
            r"a model that no configuration names, which is not splitlearn's own .*: give it, model=",
        ),
    ):
        with pytest.raises(InputError, match=message):
            list(call())
    assert not list(run.rglob("export"))


def test_of_owners_of_columns_none_is_chosen(tmp_path):
    trained(tmp_path, LAYOUTS["vertical"])
    with pytest.raises(InputError, match=r"^`alice` \(=alice0\) chooses among Alices who take turns, and in vertical"):
        list(export(tmp_path, alice="alice0", model=net()))


def test_where_a_part_is_missing_the_others_are_exported(tmp_path):
    trained(tmp_path)
    (tmp_path / "alice0").rename(tmp_path.parent / f"{tmp_path.name} alice0")
    rule = r"lacks the part of alice: put the folder of that party there, alice/model, or take what=parts$"
    with pytest.raises(InputError, match=rule):
        list(export(tmp_path, "merged", formats="torch", model=net()))
    list(export(tmp_path, formats="torch", model=net()))
    assert files_in(tmp_path / "bob" / "export") == ["export.json", "top.pt2"]


def test_a_stage_is_no_path(tmp_path):
    trained(tmp_path)
    path = tmp_path / "bob" / "model" / "manifest.json"
    path.write_text(path.read_text().replace('"top"', '"../../top"'))
    with pytest.raises(InputError, match=r"has a stage ../../top, which is no name of a file"):
        list(export(tmp_path / "bob", formats="torch", model=net()))


# The command


def quick_run(configure: Callable, folder: Path, *asked: str) -> None:
    quick = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=none")
    train_as_asked(configure(*quick, f"output_dir={folder}", *asked))


@pytest.mark.parametrize(
    "asked",
    [["model=mlp", "layout.cut=1"], ["model=lenet", "layout=u_shaped", "layout.cuts=[2,4]"]],
    ids=["mlp", "lenet"],
)
def test_the_command_exports_and_says_so(asked, configure, tmp_path, monkeypatch, capsys):
    quick_run(configure, tmp_path / "run", *asked)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["splitlearn-export", f"run={tmp_path}/run", "rows=3"])
    module.main()
    out, err = capsys.readouterr()
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        str(tmp_path / "run"),
        *(f"{tmp_path}/run/export/{name}" for name in ("weights.safetensors", "model.pt2", "model.onnx")),
    ]
    assert err == ""
    assert files_in(here) == []  # nothing of Hydra's
    x = torch.rand(9, 1, 8, 8)
    with torch.no_grad():
        expected = splitlearn.load(tmp_path / "run")(x)
    assert is_near(by_onnxruntime(tmp_path / "run" / "export" / "model.onnx", x=x), expected)


def my_net(num_classes: int) -> nn.Sequential:
    return lenet(num_classes)


def test_the_command_takes_a_model_of_ones_own(configure, tmp_path, monkeypatch):
    name = f"{__name__}.my_net"
    quick_run(configure, tmp_path / "run", "model=custom", f"model._target_={name}", "layout.cut=1")
    words = ["splitlearn-export", f"run={tmp_path}/run", "format=torch"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(
        SystemExit, match=rf"^splitlearn: .* has the model {name}, .*: give it, model=my_net, or on the command line m"
    ):
        module.main()
    monkeypatch.setattr(sys, "argv", [*words, f"model._target_={name}"])
    module.main()
    assert (tmp_path / "run" / "export" / "model.pt2").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"`run` must be given: run=FOLDER, of a run that has ended"),
        (["run=nowhere"], r"nowhere has no model: name the folder of a run that has ended, or a party's in it"),
        (["run=nowhere", "rows=some"], r"`rows` \(=some\) must be a whole number of at least 1"),
        (["run=nowhere", "model._target_=nowhere.net"], r".*nowhere.*"),
    ],
)
def test_on_the_command_line_an_error_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["splitlearn-export", *words])
    with pytest.raises(SystemExit, match=rf"^splitlearn: {message}$"):
        module.main()


def test_the_console_script_is_named():
    scripts = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'splitlearn-export = "splitlearn.export:main"' in scripts


@pytest.mark.slow  # a program of ONNX takes seconds
def test_the_page_does_what_it_says(configure, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "after_training.md").read_text()
    (section,) = (part for part in page.split("\n## ") if part.startswith("Export it"))
    quick_run(configure, tmp_path / "my_run", "+experiment=digits_2party")
    monkeypatch.chdir(tmp_path)
    commands = [line.partition(" #")[0].split() for line in section.splitlines() if line.startswith("python -m")]
    assert len(commands) > 2
    for words in commands:
        assert words[:3] == ["python", "-m", "splitlearn.export"]
        monkeypatch.setattr(sys, "argv", words[2:])
        module.main()
    made: dict = {}
    exec(section.partition("```python\n")[2].partition("```")[0], made)
    expected = splitlearn.load("my_run")(torch.from_numpy(made["x"])).argmax(1)
    assert np.array_equal(made["classes"], expected.numpy())

"""Predictions equal what was tested, by the Trainer and by the command, from tables and from pictures."""

import csv
import math
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from commands import run_command
from helpers import differences
from hydra import compose, initialize_config_dir
from PIL import Image
from pytorch_lightning.callbacks import Callback
from sklearn.datasets import load_digits
from test_model_folder import LAYOUTS, trained
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder

import splitlearn
from splitlearn.data.new_rows import Kept, kind_of, new_rows, prepare
from splitlearn.data.sources import Pictures
from splitlearn.errors import InputError
from splitlearn.predict import predict
from splitlearn.schedules.sharing import Personal
from splitlearn.train import CONF, train

FEATURES, CLASSES = ["age", "weight", "pressure", "pulse"], ["ill", "well"]
FEW = ("trainer.max_epochs=1", "logger=none", "~callbacks.per_alice")


class Outputs(Callback):
    """Keeps what a test makes of the rows."""

    def __init__(self) -> None:
        self.seen: list = []

    def on_test_batch_end(self, trainer, learner, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.seen += [(part["output"], part["owners"]) for part in outputs]


def outcomes(run) -> tuple[list, list]:
    outputs = Outputs()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[outputs], enable_checkpointing=False
    )
    trainer.test(run.learner, datamodule=run.data, verbose=False)
    return outputs.seen, trainer.predict(run.learner, datamodule=run.data)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_trainer_predicts_what_it_tested(kind, tmp_path):
    run = trained(tmp_path, LAYOUTS[kind])
    tested, predicted = outcomes(run)
    assert torch.equal(torch.cat([part.output for part in predicted]), torch.cat([output for output, _ in tested]))
    assert torch.equal(torch.cat([part.ids for part in predicted]), run.data.test_ids)


def test_where_bottoms_are_personal_a_row_goes_through_its_owners(tmp_path):
    run = trained(tmp_path, num_alices=2, schedule={"alice": Personal()})
    tested, predicted = outcomes(run)
    assert {len(part.owners.unique()) for part in predicted} == {2}
    assert torch.equal(torch.cat([part.output for part in predicted]), torch.cat([output for output, _ in tested]))
    assert torch.equal(torch.cat([part.owners for part in predicted]), torch.cat([owners for _, owners in tested]))


def test_to_predict_leaves_training_and_its_bytes_as_they_were(tmp_path):
    run = trained(tmp_path, LAYOUTS["u_shaped"])
    before, counted = dict(run.learner.state_dict()), dict(run.learner.ledger.num_bytes)
    _, predicted = outcomes(run)
    assert differences(dict(run.learner.state_dict()), before) == []
    assert (run.learner.network.wire.ledger.num_bytes, len(predicted) > 0) == (counted, True)
    assert not any(kind == "label" for *_, kind in run.learner.evaluation_ledger.num_bytes)  # Alice has the loss


def asked(*overrides: str):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("predict", list(overrides))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def shares(lines: list[dict[str, str]], classes: list[str]) -> torch.Tensor:
    return torch.tensor([[float(line[name]) for name in classes] for line in lines], dtype=torch.float64)


def patients(path: Path, rows=range(60), columns=("id", *FEATURES, "diagnosis")) -> Path:
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(60, 4, generator=generator) * 20 + 100).round(decimals=2).tolist()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for i in rows:
            row = dict(zip(FEATURES, values[i], strict=True))
            writer.writerow({"id": f"p{i}", **row, "diagnosis": CLASSES[values[i][0] > 100]})
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, Path]:
    """Runs that were trained on a table: by one Alice, and by two with columns of their own."""
    folder = tmp_path_factory.mktemp("tables")
    path = patients(folder / "patients.csv")
    common = [*FEW, "data=table", f"data.root={path}", "data.label=diagnosis", "data.drop=[id]"]
    common += ["data.standardise=true", "data.batch_size=8", "trainer.accelerator=cpu"]
    common += ["trainer.enable_progress_bar=false", "hydra.output_subdir=null"]
    kinds = {"two_party": [], "vertical": ["layout=vertical", "num_alices=2", "partition=columns"]}
    for kind, more in kinds.items():
        run_command(*common, *more, f"hydra.run.dir={folder}/{kind}", cwd=folder).check_returncode()
    return {"patients": path, **{kind: folder / kind for kind in kinds}}


@pytest.mark.parametrize("kind", ["two_party", "vertical"])
def test_of_a_table_it_is_the_loaded_networks_output_whatever_the_order(kind, tables, tmp_path):
    new = patients(tmp_path / "new.csv", range(10), ("weight", "id", "pulse", "extra", "age", "pressure"))
    predict(asked(f"run={tables[kind]}", f"data.root={new}", f"out={tmp_path}/out.csv"))
    lines = read(tmp_path / "out.csv")
    assert list(lines[0]) == ["id", "predicted", *CLASSES]
    x = torch.tensor([[float(row[name]) for name in FEATURES] for row in read(new)])
    inputs = {}
    for path in sorted(tables[kind].glob("*/model/manifest.json")):
        inputs |= splitlearn.saved.manifest.read_manifest(path.parent).inputs
    mean, std = (torch.tensor([v for field in inputs.values() for v in field[key]]) for key in ("mean", "std"))
    with torch.no_grad():
        expected = splitlearn.load(tables[kind])(x.sub(mean).div(std)).double().exp()
    assert torch.equal(shares(lines, CLASSES), expected)
    assert [line["predicted"] for line in lines] == [CLASSES[i] for i in expected.argmax(dim=-1)]
    patients(new, reversed(range(10)))
    predict(asked(f"run={tables[kind]}", f"data.root={new}", f"out={tmp_path}/again.csv"))
    assert sorted(map(str, read(tmp_path / "again.csv"))) == sorted(map(str, lines))
    assert [line["id"] for line in read(tmp_path / "again.csv")] == [f"p{i}" for i in reversed(range(10))]


def test_where_rows_have_labels_the_metrics_are_those_of_the_test(tables, tmp_path, capsys):
    run = tables["two_party"]
    told = predict(
        asked(f"run={run}", f"data.root={tables['patients']}", "data.label=diagnosis", f"out={tmp_path}/o.csv")
    )
    lines = read(tmp_path / "o.csv")
    right = [line["predicted"] == row["diagnosis"] for line, row in zip(lines, read(tables["patients"]), strict=True)]
    assert told["accuracy"] == sum(right) / 60
    given = shares(lines, CLASSES)[range(60), [CLASSES.index(row["diagnosis"]) for row in read(tables["patients"])]]
    assert told["loss"] == pytest.approx(-given.log().mean().item(), rel=1e-6)
    assert "ms a row; bob has the outputs" in capsys.readouterr().out


def test_who_receives_the_outputs_is_sent_them(tables, tmp_path, capsys):
    files = [f"data.root={tables['patients']}", f"out={tmp_path}/o.csv"]
    predict(asked(f"run={tables['vertical']}", *files, "receiver=alice1"))
    said = capsys.readouterr().out
    assert re.search(r"bob->alice1 +│ prediction 480 bytes", said)  # two float32 a row
    assert "gradient" not in said


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    run = ["+experiment=digits_2party", *FEW, "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    run_command(*run, f"hydra.run.dir={folder}/run", cwd=folder).check_returncode()
    return folder / "run"


def test_pictures_are_read_in_the_order_of_their_names(digits, tmp_path):
    images = (torch.tensor(load_digits().images[:12]) * 15).to(torch.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image.numpy()).save(tmp_path / f"{i:02d}.png")
    predict(asked(f"run={digits}", f"data.root={tmp_path}", f"out={tmp_path}/out.csv"))
    lines = read(tmp_path / "out.csv")
    with torch.no_grad():
        expected = splitlearn.load(digits)(images.unsqueeze(1).float() / 255).double().exp()
    assert torch.equal(shares(lines, [str(i) for i in range(10)]), expected)
    assert [line["id"] for line in lines] == [f"{i:02d}.png" for i in range(12)]


def test_a_csv_of_values_without_names_is_shaped_as_the_input(digits, tmp_path):
    rows = load_digits().data[:5] / 16
    new = tmp_path / "new.csv"
    with new.open("w", newline="") as file:
        csv.writer(file).writerows([[f"pixel{i}" for i in range(64)], *rows.tolist()])
    predict(asked(f"run={digits}", f"data.root={new}", f"out={tmp_path}/out.csv", "batch_size=2"))
    with torch.no_grad():
        output = splitlearn.load(digits)(torch.tensor(rows).float().view(5, 1, 8, 8)).double()
    assert [line["predicted"] for line in read(tmp_path / "out.csv")] == [str(int(i)) for i in output.argmax(dim=-1)]
    assert [line["id"] for line in read(tmp_path / "out.csv")] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"run": "{folder}"}, "has no model: name the folder of a run that has ended"),
        ({"data.root": "{folder}/none.csv"}, r"`data.root` \(=.*none.csv\) is not there: name a CSV"),
        ({"data.root": "{folder}"}, r"is a folder, and the network was trained on no pictures: name a CSV"),
        ({"receiver": "dave"}, r"`receiver` \(=dave\) must be one of the parties: alice0, bob"),
        ({"out": "out.parquet"}, r"`out` \(=out.parquet\) must end in .csv"),
        ({"columns": ["id", "age", "weight"]}, "line 1: there is no column pressure, pulse, which the network was"),
        ({"columns": FEATURES[:3], "data.id": "age"}, "there is no column pulse, which the network was trained on"),
        ({"rows": [1, 1]}, "line 3: id `p1` is that of .*line 2 too; give each row one of its own"),
        ({"rows": []}, "has no line below its header"),
        ({"data.label": "pulse"}, r"line 2: the label `.*` must be one of ill, well, in all rows or in none"),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_told_in_one_line(changed, told, tables, tmp_path):
    columns, rows = changed.pop("columns", ("id", *FEATURES)), changed.pop("rows", range(3))
    (tmp_path / "folder").mkdir()
    new = patients(tmp_path / "new.csv", rows, columns)
    keys = {"run": tables["two_party"], "data.root": new, "out": tmp_path / "o.csv", **changed}
    keys = {key: str(value).format(folder=tmp_path / "folder") for key, value in keys.items()}
    with pytest.raises(InputError, match=f"^.*{told}[^\n]*$"):
        predict(asked(*[f"{key}={value}" for key, value in keys.items()]))
    assert not (tmp_path / "o.csv").exists()


def test_a_picture_of_another_size_is_named(digits, tmp_path):
    Image.new("L", (9, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png is 9x8 pixels, and the network takes 8x8: bring the pictures to"):
        predict(asked(f"run={digits}", f"data.root={tmp_path}", f"out={tmp_path}/o.csv"))


def pixels(path: Path, rows) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[f"pixel{i}" for i in range(len(rows[0]))], *rows])
    return path


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("bytes", 0.5, "has values that are no pixels: these are whole numbers from 0 to 255"),
        ("bytes", 256, "has values that are no pixels: these are whole numbers from 0 to 255"),
        ("shares", 16, "has values that are no pixels: these are numbers from 0 to 1"),
        ("own", 1, "was trained on a data set of your own, whose transforms no file tells: predict its rows in"),
    ],
)
def test_values_of_another_scale_than_the_trainings_are_refused(kind, value, told, tmp_path):
    path = pixels(tmp_path / "new.csv", [[0, 1, 1, value]])
    inputs = {"x": {"shape": [1, 2, 2], "kind": kind, "columns": None, "places": None}}
    with pytest.raises(ValueError, match=told):
        new_rows(path, inputs, None, Kept())


def test_bytes_are_read_as_bytes_from_both(tmp_path):
    inputs = {"x": {"shape": [1, 2, 2], "kind": "bytes", "columns": None, "places": None, "mean": None, "std": None}}
    read = new_rows(pixels(tmp_path / "new.csv", [[0, 1, 128, 255]]), inputs, None, Kept())
    (tmp_path / "pictures").mkdir()
    Image.fromarray(read.x[0, 0].numpy()).save(tmp_path / "pictures" / "a.png")
    assert torch.equal(new_rows(tmp_path / "pictures", inputs, None, Kept()).x, read.x)
    assert prepare(read.x, inputs)["x"].flatten().tolist() == pytest.approx([0, 1 / 255, 128 / 255, 1])
    with pytest.raises(ValueError, match=r"is a folder, and the network was trained on no pictures: name a CSV"):
        new_rows(tmp_path / "pictures", {"x": {**inputs["x"], "kind": "values"}}, None, Kept())


def test_what_rows_are_is_known_by_their_data_set(tmp_path):
    x, y = torch.rand(4, 1, 2, 2), torch.zeros(4)
    (tmp_path / "a").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "a" / "1.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "2.png")
    kinds = {"shares": x, "values": 2 * x, "bytes": (255 * x).to(torch.uint8)}
    assert {kind: kind_of(TensorDataset(values, y)) for kind, values in kinds.items()} == {k: k for k in kinds}
    assert kind_of(TensorDataset(x.flatten(1), y)) == "values"
    assert kind_of(Subset(TensorDataset(x, y), [0])) == "own"
    assert kind_of(ImageFolder(str(tmp_path))) == "own"
    assert kind_of(Pictures(str(tmp_path))) == "bytes"


def test_the_command_says_what_is_missing_and_leaves_nothing_else(tables, digits, tmp_path):
    done = run_command(module="predict", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "splitlearn: `data.root` must be given: data.root=...\n")
    done = run_command(f"run={tables['two_party']}", f"data.root={tables['patients']}", module="predict", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_the_command_of_the_page_runs(digits, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "after_training.md").read_text()
    ((command),) = re.findall(r"^python -m splitlearn\.predict (.*)$", page, re.MULTILINE)
    (tmp_path / "my_run").symlink_to(digits)
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[f"pixel{i}" for i in range(64)], load_digits().data[0] / 16])
    assert run_command(*command.split(), module="predict", cwd=tmp_path).returncode == 0
    assert len(read(tmp_path / "predictions.csv")) == 1


def log_softmax(num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, num_classes), nn.LogSoftmax(-1)),
    )


def test_a_model_of_ones_own_in_double_precision_is_given_by_name(tmp_path, configure):
    own = ["model=custom", "model._target_=test_predict.log_softmax", "loss._target_=torch.nn.NLLLoss"]
    more = ["data=digits", "trainer.precision=64-true", "layout.cut=1", f"output_dir={tmp_path}/run"]
    train(configure(*FEW, *own, *more))
    rows = load_digits().data[:4] / 16
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[f"pixel{i}" for i in range(64)], *rows.tolist()])
    files = [f"run={tmp_path}/run", f"data.root={tmp_path}/new.csv", f"out={tmp_path}/out.csv"]
    with pytest.raises(InputError, match="is not splitlearn's own and is not imported for a folder's asking"):
        predict(asked(*files))
    predict(asked(*files, "model._target_=test_predict.log_softmax"))
    found = shares(read(tmp_path / "out.csv"), [str(i) for i in range(10)])
    with torch.no_grad():
        network = splitlearn.load(tmp_path / "run", log_softmax)
        expected = network(torch.tensor(rows).float().double().view(4, 1, 8, 8)).exp()
    assert torch.equal(found, expected)
    assert math.isclose(found[0].sum(), 1)

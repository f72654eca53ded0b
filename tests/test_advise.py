import csv
import json
import math
from collections import OrderedDict
from importlib.util import find_spec

import pytest
from omegaconf import OmegaConf
from torch import nn

from splitlearn import advise as module
from splitlearn.advise import advise, main
from splitlearn.costs.by_cut import Cut
from splitlearn.errors import InputError
from splitlearn.train import train

THREE_ALICES = ("num_alices=3", "model=lenet", "layout.cut=conv2", "data.batch_size=200")


@pytest.mark.parametrize(
    "scheme",
    [
        ["layout.labels=alice"],
        ["schedule=parallel"],
        ["schedule.alice.handoff=server"],
        ["schedule=splitfed_v2"],
        ["schedule.local_epochs=3"],
        ["schedule=splitfed_v2", "schedule.participation=0.67"],
    ],
)
def test_the_bytes_of_an_epoch_are_those_that_a_run_counts(scheme, configure, tmp_path):
    quick = ("trainer.max_epochs=2", "logger=none", "trainer.enable_checkpointing=false")
    train(configure(*THREE_ALICES, *scheme, *quick))
    first, second = json.loads((tmp_path / "run" / "results.json").read_text())["epochs"]
    cuts = {cut.name: cut for cut in advise(configure(*THREE_ALICES, *scheme))}
    # In the second epoch: nobody hands on to whoever has the first turn.
    counted = second["bytes"] - first["bytes"]
    drawn = any("participation" in override for override in scheme)  # whose rows are not quite as many as expected
    assert cuts["conv2"].epoch_bytes == (pytest.approx(counted, rel=0.03) if drawn else counted)


def test_real_data_are_advised_on(configure, tmp_path, capsys):
    cuts = advise(configure("model=lenet"))
    shown = capsys.readouterr().out

    assert [cut.name for cut in cuts] == ["conv1", "conv2", "fc1", "fc2"]
    assert [cut.elements for cut in cuts] == [6 * 4 * 4, 16 * 2 * 2, 120, 84]
    assert all(-1 <= cut.leakage <= 1 for cut in cuts)
    num_rows = 1797 - round(0.2 * 1797) - round(0.1 * 1797)
    assert [cut.epoch_bytes for cut in cuts] == [2 * num_rows * 4 * cut.elements for cut in cuts]
    assert f"digits: {num_rows:,} rows, one Alice" in shown
    assert "leak-" in shown
    assert "K: from so many Alices on" in shown


@pytest.mark.parametrize(
    ("data", "rows", "elements"),
    [
        ("cifar10", 45_000, [6 * 16 * 16, 16 * 8 * 8, 120, 84]),
        ("cifar100", 45_000, [6 * 16 * 16, 16 * 8 * 8, 120, 84]),
        ("mnist", 54_000, [6 * 14 * 14, 16 * 7 * 7, 120, 84]),
        ("fashion_mnist", 54_000, [6 * 14 * 14, 16 * 7 * 7, 120, 84]),
    ],
)
def test_data_that_are_not_there_are_advised_on_by_their_shape(
    data, rows, elements, configure, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("splitlearn.data.sources._download", lambda *_: pytest.fail("fetched"))
    cuts = advise(configure(f"data={data}", "model=lenet", f"data.root={tmp_path}", "num_alices=7"))
    shown = capsys.readouterr().out
    assert [cut.elements for cut in cuts] == elements
    handed_on = [7 * 4 * cut.parameters for cut in cuts]
    assert [cut.epoch_bytes for cut in cuts] == [
        2 * rows * 4 * n + weights for n, weights in zip(elements, handed_on, strict=True)
    ]
    assert [cut.leakage for cut in cuts] == [None] * 4
    assert f"No data in {tmp_path}, so by their shape alone: rows dealt evenly, no leakage" in shown
    assert f"{rows:,} rows, 7 Alices" in shown
    assert "leak-" not in shown


@pytest.mark.usefixtures("few_cifar")
def test_real_and_missing_data_give_the_same_costs(configure, tmp_path, monkeypatch):
    monkeypatch.setitem(module.KNOWN, "cifar10", ((3, 32, 32), 10, 30))  # as few rows as the real ones here are
    real = advise(configure("data=cifar10", "model=lenet"))
    monkeypatch.undo()
    monkeypatch.setitem(module.KNOWN, "cifar10", ((3, 32, 32), 10, 30))
    missing = advise(configure("data=cifar10", "model=lenet", f"data.root={tmp_path}"))
    assert [cut._replace(leakage=None) for cut in real] == missing


def test_a_torchvision_model_is_advised_on_by_its_shape(configure, tmp_path):
    cuts = advise(configure("data=cifar10", "model=torchvision", "model.name=squeezenet1_1", f"data.root={tmp_path}"))
    assert len(cuts) == 17
    assert cuts[0][:2] == ("features_2", 3 * 64 * 9 + 64)
    assert cuts[0].elements == 64 * 7 * 7


def test_the_table_is_kept_as_a_csv(configure, tmp_path):
    cuts = advise(configure("model=lenet"))
    with (tmp_path / "run" / "advice.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header == list(Cut._fields)
    assert lines == [["" if value is None else str(value) for value in cut] for cut in cuts]


def test_the_least_of_each_column_has_a_star(configure, tmp_path, capsys):
    advise(configure("model=mlp", "model.hidden_sizes=[4,2]"))
    first, second = (line for line in capsys.readouterr().out.splitlines() if "hidden" in line)
    # 64-4-2-10: 260 + 10 + 30 weights, 2 x 512 + 3 x 16 + 3 x 40 FLOPs
    assert first.split()[:7] == ["hidden1", "260", "87%*", "1.02k", "86%*", "4", "16"]
    assert second.split()[:7] == ["hidden2", "270", "90%", "1.07k", "90%", "2*", "8*"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1k"),
        (1024, "1.02k"),
        (999_600, "1M"),
        (3.14159e9, "3.14G"),
        (math.inf, "never"),
    ],
)
def test_numbers_have_three_digits(number, text):
    assert module._short(number) == text


def test_a_link_tells_the_seconds(configure, capsys):
    cfg = configure("model=mlp", "model.hidden_sizes=[4]", "data.batch_size=1258")  # all rows in one mini-batch
    link = {"_target_": "splitlearn.costs.link.Link", "bandwidth": "8kbit/s", "latency": "2s"}
    OmegaConf.update(cfg, "link", link, force_add=True)
    (cut,) = advise(cfg)
    assert cut.epoch_seconds == pytest.approx(2 * (2 + 1258 * 16 / 1000))
    shown = capsys.readouterr().out
    assert "s: of transfer" in shown
    assert " hidden1 " in shown  # unbroken, in the 80 characters of a line, beside all columns


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["trainer.precision=bf16-mixed"], "`trainer.precision` (=bf16-mixed)"),
        (["num_alices=2", "optimizer=adam"], "`schedule.alice.optimizer_state` (=carry)"),
        (["num_alices=2", "optimizer.momentum=0.9"], "`schedule.alice.optimizer_state` (=carry)"),
        (["num_alices=2", "+optimizer@optimizers.alice=adam"], "`schedule.alice.optimizer_state` (=carry)"),
    ],
)
def test_what_the_bytes_leave_out_is_said(overrides, note, configure, capsys):
    advise(configure("model=lenet", *overrides))
    assert note in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        ["num_alices=2", "trainer.precision=32-true"],
        ["num_alices=2", "optimizer=adam", "schedule.alice.optimizer_state=reset"],
        ["num_alices=2", "optimizer=adam", "+optimizer@optimizers.alice=sgd"],
    ],
)
def test_where_the_bytes_leave_nothing_out_nothing_is_said(overrides, configure, capsys):
    advise(configure("model=lenet", *overrides))
    shown = capsys.readouterr().out
    assert "trainer.precision" not in shown
    assert "optimizer_state" not in shown


def test_owners_of_columns_are_advised_on_uncut(configure):
    by_columns = advise(configure("model=lenet", "layout=vertical", "partition=columns", "num_alices=2"))
    assert by_columns == advise(configure("model=lenet", "layout=vertical", "num_alices=2"))


def test_what_a_scheme_brings_holds(configure, capsys):
    advise(configure("model=lenet", "schedule=centralised", "num_alices=3"))
    assert "one Alice" in capsys.readouterr().out


def test_a_leakage_that_is_no_number_is_a_dash_and_never_the_least(capsys):
    cut = Cut("first", 1, 0.5, 1, 0.5, 1, 1, 1, None, 1, 1, math.nan)
    cuts = [cut, cut._replace(name="second", leakage=0.5), cut._replace(name="third", leakage=0.7)]
    module.Console().print(module._table(cuts, "title"))
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "50%" in line]
    assert shown == ["-", "0.5*", "0.7"]


def test_another_layout_is_said_to_be_left_aside(configure, capsys):
    cuts = advise(configure("model=lenet", "layout=u_shaped"))
    assert len(cuts) == 4
    assert "one cut between two parties, whatever `layout` (=u_shaped) says" in capsys.readouterr().out


def tied(num_classes: int) -> nn.Sequential:
    layer = nn.Linear(8, 8)
    blocks = {"first": nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), "second": layer, "act": nn.ReLU(), "third": layer}
    return nn.Sequential(OrderedDict(**blocks, head=nn.Linear(8, num_classes)))


def test_cuts_that_would_part_what_is_tied_are_left_out_and_it_says_so(configure, capsys):
    cuts = advise(configure("model=custom", "model._target_=test_advise.tied", "layout.cut=1"))
    assert [(cut.name, cut.parameters) for cut in cuts] == [("first", 520), ("third", 592)]
    assert cuts[1].parameter_share == 592 / (592 + 90)
    assert "No cut behind second, act: later blocks share their weights" in capsys.readouterr().out


def test_without_matplotlib_there_is_no_picture_and_it_says_so(configure, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    advise(configure("model=lenet"))
    assert not (tmp_path / "run" / "advice.png").exists()
    assert "No advice.png: matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_picture_is_drawn(configure, tmp_path):
    advise(configure("model=lenet"))
    assert (tmp_path / "run" / "advice.png").read_bytes()[1:4] == b"PNG"


def one_block(num_classes: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(only=nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=custom", f"model._target_={__name__}.one_block"],
            r"`model` has one block \(only\) and nothing to cut",
        ),
        (["data=image_folder", "data.root=nowhere"], r"`data.root` \(=.*nowhere\) is not a folder"),
        (["model=torchvision"], "block `conv1` does not fit its input of shape 1x8x8"),
        (["model=torchvision", "model.name=resnet81"], "is no classification model of torchvision"),
    ],
)
def test_what_cannot_be_advised_on_says_why(overrides, message, configure):
    with pytest.raises(InputError, match=message):
        advise(configure(*overrides))


@pytest.mark.parametrize("data", [["data=digits"], ["data=mnist", "data.root=nowhere"]])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=0", r"`data.batch_size` \(=0\) must be a whole number"),
        ("num_alices=0", r"`num_alices` \(=0\) must be a whole number"),
        ("num_alices=60000", r"`num_alices` \(=60000\) must lie between|`data.val_fraction` holds out .* Alices"),
        ("data.val_fraction=2", r"`data.val_fraction` \(=2\) must lie in"),
        ("schedule.turn=foo", r"`schedule.turn` \(=foo\) must be a whole number"),
        ("schedule.participation=2", r"`schedule.participation` \(=2\) must lie in"),
        ("schedule.alice.optimizer_state=lost", r"`optimizer_state` \(=lost\) must be one of"),
    ],
)
def test_with_or_without_data_settings_are_checked_as_a_runs(data, override, message, configure):
    with pytest.raises(InputError, match=message):
        advise(configure("model=lenet", *data, override))


def test_on_the_command_line_an_error_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["advise", "seed=-1", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit, match=r"^splitlearn: `seed` \(=-1\) must be a whole number"):
        main()

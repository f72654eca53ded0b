"""The tutorial's loop by hand, and the one command that does the same: equal to the bit, losses, bytes and weights."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from splitlearn.train import CONF, train

TUTORIAL = Path(__file__).parents[1] / "experiments" / "tutorial"
OPTIONS = ("data=digits", "trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
QUIET = ("logger=none", "~callbacks.progress_bar", "~callbacks.interrupt")


def load(script: str) -> dict:
    return runpy.run_path(str(TUTORIAL / script))


def run_by_hand(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["by_hand.py", *map(str, args)])
    load("by_hand.py")["main"]()


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `python -m splitlearn.train +experiment=mnist_2party`, two epochs on the digits."""
    folder = tmp_path_factory.mktemp("lightning")
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["+experiment=mnist_2party", *OPTIONS, *QUIET, f"output_dir={folder}"])
    train(cfg)
    return folder


def test_by_hand_has_the_losses_and_the_bytes_of_lightning(lightning, tmp_path, monkeypatch, capsys):
    run_by_hand(monkeypatch, "--data", "digits", "--epochs", 2, "--results", tmp_path / "by_hand.json")
    by_hand, theirs = (json.loads(p.read_text()) for p in (tmp_path / "by_hand.json", lightning / "results.json"))
    assert by_hand["epochs"] == [{name: epoch[name] for name in ("epoch", "train/loss")} for epoch in theirs["epochs"]]
    # 1,438 of the 1,797 rows are for training; 640 floats cross for each, twice.
    assert by_hand["bytes"] == theirs["bytes"]
    assert by_hand["bytes"] == {
        "alice0->bob": {"activation": 2 * 1438 * 640 * 4},
        "bob->alice0": {"gradient": 2 * 1438 * 640 * 4},
    }
    losses = [epoch["train/loss"] for epoch in theirs["epochs"]]
    assert capsys.readouterr().out.splitlines() == [f"Epoch {i} - Training loss: {losses[i]}" for i in range(2)]


def test_by_hand_ends_with_the_weights_of_lightning(lightning):
    by_hand = load("by_hand.py")
    data = by_hand["load"]("digits")
    network = by_hand["split"](data)
    by_hand["train"](network, data, 2)
    theirs = torch.load(lightning / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    differ = [k for k, v in network.state_dict().items() if not torch.equal(v, theirs[f"network.{k}"])]
    assert differ == []
    assert len(theirs) == 6


def test_without_mnist_the_error_names_the_folder_and_the_digits(tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("splitlearn.data.sources._download", fail)
    monkeypatch.setenv("SPLITLEARN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"by_hand: MNIST is not in .*nowhere.*no route to host.*digits"):
        run_by_hand(monkeypatch)


def write(path: Path, losses: list[float], num_bytes: int = 4) -> Path:
    epochs = [{"epoch": i, "train/loss": loss} for i, loss in enumerate(losses)]
    path.write_text(json.dumps({"epochs": epochs, "bytes": {"alice0->bob": {"activation": num_bytes}}}))
    return path


def test_the_comparison_takes_equal_runs(tmp_path, capsys):
    load("compare.py")["compare"](write(tmp_path / "a", [0.5, 0.25]), write(tmp_path / "b", [0.5, 0.25]))
    assert capsys.readouterr().out.splitlines()[-1] == "equal to the bit: 2 of 2 epochs"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (([0.5, math.nextafter(0.25, 1)], 4), "the losses differ in epoch 1"),
        (([0.5, 0.25], 5), "other bytes crossed"),
        (([0.5], 4), "1 epochs through Lightning"),
    ],
)
def test_the_comparison_refuses_a_difference_in_the_last_bit_in_bytes_or_in_length(tmp_path, other, message):
    with pytest.raises(SystemExit, match=message):
        load("compare.py")["compare"](write(tmp_path / "a", [0.5, 0.25]), write(tmp_path / "b", *other))

"""Every experiment runs and leaves what it should; every option of every config group makes a run."""

import json
import math
import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from splitlearn.build import build
from splitlearn.train import CONF, train

FEW = ("trainer.max_epochs=1", "trainer.limit_train_batches=5")
TINY_BATCHES = (
    "data.batch_size=4",
    "data.eval_batch_size=4",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
)
TINY_VGG = (*TINY_BATCHES, "model.hidden_sizes=[8]")
TWENTY_EACH = ("data.batch_size=40", "data.val_fraction=0.0", "metric=train/loss")  # of 200, dealt to ten Alices
SIX_EACH = (*TINY_VGG, "num_alices=5", "data.batch_size=6", "data.val_fraction=0.0", "metric=train/loss")  # of 30
TINY = {
    "cifar10_vgg16_2party": TINY_VGG,
    "schemes": TWENTY_EACH,
    "forgetting": TWENTY_EACH,
    "accuracy_vs_client_flops": (*TWENTY_EACH, "num_alices=10"),
    "accuracy_vs_client_flops_cifar10": SIX_EACH,
}

# What crosses in five mini-batches of 40 rows (4 at the VGG): rows x elements at the cut x 4 bytes, and back.
HIDDEN1, HIDDEN2 = 200 * 128 * 4, 200 * 640 * 4
WEIGHTS = (784 * 128 + 128 + 128 * 640 + 640) * 4  # of both hidden layers
CONVS = (6 * 25 + 6 + 16 * 6 * 25 + 16) * 4  # weights of LeNet's first two blocks
TEN_ALICES = {
    **{f"alice{i}->bob": {"activation": 20 * 16 * 7 * 7 * 4} for i in range(5)},
    **{f"bob->alice{i}": {"gradient": 20 * 16 * 7 * 7 * 4} for i in range(5)},
    **{f"alice{i}->alice{i + 1}": {"weights": CONVS} for i in range(4)},
}
EXPERIMENTS = {
    "digits_2party": {"alice0->bob": {"activation": 200 * 64 * 4}, "bob->alice0": {"gradient": 200 * 64 * 4}},
    "mnist_2party": {"alice0->bob": {"activation": HIDDEN2}, "bob->alice0": {"gradient": HIDDEN2}},
    "mnist_3party": {
        "alice0->bob": {"activation": HIDDEN1},
        "bob->claire": {"activation": HIDDEN2},
        "claire->bob": {"gradient": HIDDEN2},
        "bob->alice0": {"gradient": HIDDEN1},
    },
    "mnist_folded": {
        "alice0->bob": {"activation": HIDDEN1, "gradient": HIDDEN2},
        "bob->alice0": {"activation": HIDDEN2, "gradient": HIDDEN1},
    },
    "mnist_vertical": {
        "alice0->bob": {"activation": HIDDEN1},
        "alice1->bob": {"activation": HIDDEN1},
        "bob->alice0": {"gradient": HIDDEN1},
        "bob->alice1": {"gradient": HIDDEN1},
    },
    "mnist_5alices": {
        **{f"alice{i}->bob": {"activation": HIDDEN2 // 5} for i in range(5)},
        **{f"bob->alice{i}": {"gradient": HIDDEN2 // 5} for i in range(5)},
        **{f"alice{i}->alice{i + 1}": {"weights": WEIGHTS} for i in range(4)},
    },
    "cifar10_vgg16_2party": {
        "alice0->bob": {"activation": 20 * 64 * 32 * 32 * 4},
        "bob->alice0": {"gradient": 20 * 64 * 32 * 32 * 4},
    },
    "schemes": TEN_ALICES,
    "forgetting": TEN_ALICES,
    "accuracy_vs_client_flops": {
        **{f"alice{i}->bob": {"activation": 20 * 6 * 14 * 14 * 4} for i in range(5)},
        **{f"bob->alice{i}": {"gradient": 20 * 6 * 14 * 14 * 4} for i in range(5)},
        **{f"alice{i}->alice{i + 1}": {"weights": (6 * 25 + 6) * 4} for i in range(4)},
    },
    "accuracy_vs_client_flops_cifar10": {
        **{f"alice{i}->bob": {"activation": 6 * 64 * 32 * 32 * 4} for i in range(5)},
        **{f"bob->alice{i}": {"gradient": 6 * 64 * 32 * 32 * 4} for i in range(5)},
        **{f"alice{i}->alice{i + 1}": {"weights": (64 * 3 * 9 + 64) * 4} for i in range(4)},
    },
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in Path(CONF, group).glob("*.yaml") if path.stem != "base")


@pytest.mark.usefixtures("few_cifar")
@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_runs_and_leaves_its_results(name, configure, idx_root, monkeypatch, tmp_path):
    monkeypatch.setenv("SPLITLEARN_DATA", str(idx_root))
    cfg = configure(f"+experiment={name}", *FEW, *TINY.get(name, ("data.batch_size=40",)))
    metric = train(cfg)

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    handed_on = {kinds["weights"] for kinds in EXPERIMENTS[name].values() if "weights" in kinds}
    given = [kinds["weights"] for kinds in results.pop("final_bytes", {}).values()]
    assert given == [*handed_on] * (cfg.num_alices - 1)  # the last Alice gives hers to all others
    assert set(results) == {"epochs", "test", "bytes", "evaluation_bytes", "flops", "macs", "seconds"}
    assert results["bytes"] == EXPERIMENTS[name]
    promised = {"epoch", "train/loss", "bytes", "client_flops", "client_flops_max", "seconds", "step"}
    validated = {"val/loss", "val/accuracy"} if cfg.data.val_fraction else set()
    assert [set(epoch) for epoch in results["epochs"]] == [promised | validated]
    assert set(results["test"]) == {"test/loss", "test/accuracy"}
    assert metric == pytest.approx(results["epochs"][0][cfg.metric], rel=1e-6)  # Lightning keeps it as a float32
    assert all(math.isfinite(value) for value in (metric, *results["test"].values(), results["seconds"]))


def test_the_tutorials_three_parts_are_one_training(configure, idx_root, monkeypatch, tmp_path):
    monkeypatch.setenv("SPLITLEARN_DATA", str(idx_root))
    learned = []
    for part in ("mnist_2party", "mnist_3party", "mnist_folded"):
        train(configure(f"+experiment={part}", "trainer.max_epochs=2", "logger=none"))
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        learned.append(([epoch["train/loss"] for epoch in results["epochs"]], results["test"]))
    assert len(learned[0][0]) == 2
    assert learned[0] == learned[1] == learned[2]


class Stripes(Dataset):
    """A user's own data set: float rows [6], labels 0..2."""

    targets = [i % 3 for i in range(30)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((6,), float(self.targets[i])), self.targets[i]


def own_model(num_classes: int) -> nn.Sequential:
    """A user's own model."""
    return nn.Sequential(
        OrderedDict(bottom=nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), top=nn.Linear(4, num_classes))
    )


OPTIONS = [
    (group, option)
    for group in sorted(path.name for path in Path(CONF).iterdir() if path.is_dir() and path.name != "experiment")
    for option in options(group)
]
TABLES = Path(__file__).parent / "tables"
PATIENTS = ["data=table", f"data.root={TABLES}/patients.csv", "data.label=diagnosis"]
TOGETHER = ["data.source.features=[age,pressure]", "data.source.classes=[ill,well]"]
OWN = ["data=own_table", f"data.root={TABLES}/own.csv", "data.label=diagnosis", *TOGETHER]
NEEDS = {
    ("data", "own_table"): OWN,
    ("data", "table"): PATIENTS,
    ("partition", "by_file"): [*PATIENTS, "num_alices=2", f"partition.path={TABLES}/parties.csv"],
    ("partition", "label_shards"): ["num_alices=5"],
    ("partition", "columns"): ["layout=vertical", "num_alices=2", "data.columns=[[7,0,1,2],[3,4,5,6]]"],
    ("data", "dataset"): [f"data.source.train._target_={__name__}.Stripes"],
    ("model", "custom"): [f"model._target_={__name__}.own_model"],
    ("layout", "vertical"): ["num_alices=2"],
    ("layout", "extended_vanilla"): ["num_alices=2"],
    ("model", "vgg11"): ["data=cifar10", *TINY_VGG],
    ("model", "vgg16"): ["data=cifar10", *TINY_VGG],
    ("model", "torchvision"): ["data=cifar10", *TINY_BATCHES],
    ("model", "resnet18"): TINY_BATCHES,
    ("model", "resnet50"): [*TINY_BATCHES, "optimizer.lr=0.001"],
}


EXTRAS = ("mlflow", "wandb")


@pytest.mark.usefixtures("few_cifar")
@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_option_of_every_group_trains(group, option, configure, idx_root, picture_root, monkeypatch):
    if option in EXTRAS:  # `pip install -e '.[loggers]'`
        pytest.importorskip(option)
    monkeypatch.setenv("SPLITLEARN_DATA", str(picture_root if option == "image_folder" else idx_root))
    few = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.enable_checkpointing=false")
    logger = [] if group == "logger" else ["logger=none"]
    metric = train(configure(f"{group}={option}", *few, *logger, *NEEDS.get((group, option), [])))
    assert math.isfinite(metric)


@pytest.mark.parametrize(
    ("option", "shape", "num_classes"),
    [
        ("digits", (1, 8, 8), 10),
        ("mnist", (1, 28, 28), 10),
        ("fashion_mnist", (1, 28, 28), 10),
        ("cifar10", (3, 32, 32), 10),
        ("cifar100", (3, 32, 32), 100),
        ("image_folder", (3, 6, 8), 2),
        ("dataset", (6,), 3),
        ("table", (2,), 2),
    ],
)
@pytest.mark.usefixtures("few_cifar")
def test_a_data_option_gives_these_rows(option, shape, num_classes, configure, idx_root, picture_root, monkeypatch):
    monkeypatch.setenv("SPLITLEARN_DATA", str(picture_root if option == "image_folder" else idx_root))
    data = build(configure(f"data={option}", *NEEDS.get(("data", option), []))).data
    assert data.sample()["x"].shape[1:] == shape
    assert data.num_classes == num_classes


@pytest.mark.slow
def test_a_soak_ends_with_the_simulators_bits():
    script = Path(__file__).parents[1] / "experiments" / "faults" / "soak.py"
    few = ["--wire", "gloo", "--mini-batches", "500", "--every", "200"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script.name, *few], cwd=script.parent, env=environment, capture_output=True)
    said = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert re.search(r"^[1-9] kills; exit code 0$", said, re.MULTILINE)
    assert said.splitlines()[-1] == "equal to the simulator's: True"

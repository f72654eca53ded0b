"""The command line: what it makes of a configuration, and what it says of one that does not fit."""

import importlib.metadata
import json
import re
import resource
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from commands import run_command
from hydra.errors import HydraException
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.data import Dataset

from splitlearn import train as module
from splitlearn.build import build
from splitlearn.callbacks.run_folder import RunFolder
from splitlearn.errors import DivergedError, InputError
from splitlearn.federation.simulated import Simulated
from splitlearn.train import CONF, train

QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=none")
BLOCKS = "1: hidden1, 2: hidden2, 3: head"


def refuses(error: type[Exception], *parts: object):
    """A context that expects `error`, in one line, with `parts` in this order."""
    return pytest.raises(error, match="^.*" + ".*".join(re.escape(str(part)) for part in parts) + ".*$")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def command(*overrides: str, cwd: Path, check: bool = True) -> CompletedProcess:
    done = run_command(*overrides, "trainer.accelerator=cpu", cwd=cwd)
    if check:
        done.check_returncode()
    return done


def linear(num_classes: int) -> nn.Module:
    return nn.Linear(64, num_classes)


def unflattened(num_classes: int) -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Linear(100, 5), second=nn.Linear(5, num_classes)))


def ten_whatever_the_data(num_classes: int) -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), second=nn.Linear(5, 11)))


def without_classes() -> nn.Module:
    return unflattened(10)


MISFITS = {
    # where the network is cut
    "layout.cut=9": ["`layout.cut` (=9) must lie between 1 and 2", BLOCKS],
    "layout.cut=0": ["`layout.cut` (=0) must lie between 1 and 2", BLOCKS],
    "layout.cut=1.5": ["`layout.cut` (=1.5) must lie between 1 and 2"],
    "layout.cut=layer2": ["`layout.cut` (=layer2) must name a block before the last one", BLOCKS],
    "layout.cut=head": ["`layout.cut` (=head) must name a block before the last one", BLOCKS],
    "layout=u_shaped layout.cuts=[2,1]": ["`layout.cuts` (=[2, 1]) must increase", BLOCKS],
    "layout=u_shaped layout.cuts=[1]": ["`layout.cuts` (=[1]) must be exactly 2 cuts", "[1,2]"],
    "layout=multi_hop layout.cuts=1": ["`layout.cuts` (=1) must be a list", "[1,2]"],
    "layout=multi_hop layout.parties=[alice,bob]": ["`parties` (=['alice', 'bob']) must be 3 different names"],
    "layout.labels=carol": ["`layout.labels` (=carol) must be one of the roles of two_party: alice, bob"],
    "layout=u_shaped layout.labels=bob": ["`layout.labels` (=bob) must be alice in a U", "use two_party"],
    # how many Alices
    "num_alices=0": ["`num_alices` (=0) must be a whole number of at least 1"],
    "num_alices=two": ["`num_alices` (=two) must be a whole number of at least 1"],
    "micro_batches=65": ["`micro_batches` (=65) must be at most the rows of a mini-batch, `data.batch_size` (=64)"],
    "num_alices=1798": ["`num_alices` (=1798) must lie between 1 and the number of training samples (=1797)"],
    "layout=vertical": ["`num_alices` (=1) must be at least 2 to own columns", "use two_party"],
    "layout=vertical num_alices=9": ["`num_alices` (=9) must not exceed the 8 columns of the input"],
    # data
    "data.batch_size=0": ["`data.batch_size` (=0) must be a whole number of at least 1"],
    "data.batch_size=null": ["`data.batch_size` (=None) must be a whole number of at least 1"],
    "data.val_fraction=1": ["`data.val_fraction` (=1) must lie in [0, 1)"],
    "data.mean=[0.5]": ["`mean` (=[0.5]) and `std` (=None) must be given together"],
    "+data.batchsize=3": ["SplitData", "unexpected keyword argument 'batchsize'", "`--cfg job` shows the options"],
    "data=image_folder data.root=nowhere": ["`data.root`", "nowhere) is not a folder", "class folders"],
    "data=dataset": ["`data.source.train._target_` must be given: data.source.train._target_=..."],
    # model and loss
    "model=vgg11": ["block `conv6` does not fit its input of shape 512x1x1", "change the model or the data"],
    f"model=custom model._target_={__name__}.unflattened": ["block `first` does not fit its input of shape 1x8x8"],
    f"model=custom model._target_={__name__}.linear": ["`model` (=Linear) must be an nn.Sequential", "OrderedDict"],
    f"model=custom model._target_={__name__}.without_classes": ["unexpected keyword argument 'num_classes'", "model"],
    f"model=custom model._target_={__name__}.ten_whatever_the_data": ["shape [11] per sample", "10 classes"],
    "model=custom": ["`model._target_` must be given: model._target_=..."],
    "model._target_=nowhere.net": ["No module named 'nowhere'"],
    "model.hidden_sizes=[0]": ["`hidden_sizes` (=[0]) must all be at least 1"],
    "model.dropout=1": ["`dropout` (=1) must be in [0, 1)"],
    "loss._target_=torch.nn.CrossEntropyLoss": ["`loss` (=CrossEntropyLoss) takes logits", "use NLLLoss"],
    "model=lenet loss._target_=torch.nn.NLLLoss": ["`loss` (=NLLLoss) takes log-probabilities", "use CrossEntropyLoss"],
    # optimizers
    "+optimizer.foo=1": ["optimizer of alice", "unexpected keyword argument 'foo'", "change `optimizer`"],
    "optimizer.lr=-1": ["optimizer of alice", "Invalid learning rate: -1", "change `optimizer`"],
    "+optimizers.bob.lrr=1": ["optimizer of bob", "unexpected keyword argument 'lrr'", "change `optimizer`"],
    "+optimizers.ghost.lr=1": ["`optimizers.ghost` names no role of the layout: alice, bob"],
    "scheduler=step +scheduler.scheduler.foo=1": ["scheduler of alice", "'foo'", "change `scheduler`"],
    "scheduler.interval=minute": ["`scheduler.interval` (=minute) must be epoch or step"],
    "schedule.alice.optimizer_state=lose": ["`optimizer_state` (=lose) must be one of carry, reset, keep"],
    # trainer and run
    "trainer.devices=2": ["`trainer.devices` (=2) must be 1"],
    "trainer.precision=7": ["Precision 7 is invalid", "bf16-mixed"],
    "trainer.accelerator=quantum": ["accelerator='quantum'", "cpu"],
    "+trainer.foo=1": ["Trainer", "unexpected keyword argument 'foo'", "`--cfg job` shows the options"],
    "trainer.gradient_clip_algorithm=foo": ["`gradient_clip_algorithm` foo is invalid", "'norm'", "full_key: trainer"],
    "trainer.gradient_clip_val=-1": ["`trainer.gradient_clip_val` (=-1) must not be negative"],
    "steps_per_execution=0": ["`steps_per_execution` (=0) must be at least 1"],
    "seed=-1": ["`seed` (=-1) must be a whole number from 0 to 4294967295"],
    "seed=null": ["`seed` (=None) must be a whole number"],
    "test=first": ["`test` (=first) must be last or best"],
    "test=best": ["`test` (=best) needs a checkpoint callback", "callbacks.checkpoint.monitor=val/accuracy"],
    "callbacks.checkpoint.monitor=val/accuracy": ["`mode` of ModelCheckpoint (=min) takes the worst", "mode=max"],
    "scheduler=plateau scheduler.monitor=val/accuracy": ["`scheduler.scheduler.mode` (=min) takes the worst"],
    "scheduler=cosine scheduler.interval=step": ["`scheduler.scheduler.T_max` (=1) counts mini-batches"],
    "scheduler=cosine trainer.max_epochs=-1 trainer.max_steps=3": ["`scheduler.scheduler.T_max` (=-1) must be"],
    "loss.weight=5": ["`loss.weight` (=5) must be a list", "loss.weight=[1,5]"],
    "loss.weight=[1,-5,1,1,1,1,1,1,1,1]": ["`loss.weight` (=[1.0, -5.0,", "must not be negative"],
    "trainer.max_epochs=abc": ["`trainer.max_epochs` (=abc) must be a whole number"],
    "weights=README.md": ["`weights` (=README.md) "],
    "+lr=7": ["`lr` (=7) is read by nobody: did you mean optimizer.lr?"],
    "+batch_size=7": ["`batch_size` (=7) is read by nobody: did you mean data.batch_size?"],
    "weights=nowhere.ckpt": ["`weights` (=nowhere.ckpt) is not a file"],
    "trainer.accumulate_grad_batches=0": [
        "`trainer.accumulate_grad_batches` (=0) must be a whole number of at least 1"
    ],
    "ckpt=nowhere.ckpt": ["`ckpt` (=nowhere.ckpt) is not a file", "leave `ckpt` out"],
}


@pytest.mark.parametrize(("overrides", "message"), MISFITS.items(), ids=MISFITS)
def test_what_does_not_fit_is_told_with_value_rule_and_cure(overrides, message, configure):
    with refuses(InputError, *message):
        train(configure(*QUICK, *overrides.split()))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_missing_files_are_told_with_folder_files_and_cure(name, configure, tmp_path):
    folder, files = {
        "mnist": ("MNIST/raw", "train-images-idx3-ubyte, train-labels-idx1-ubyte"),
        "fashion_mnist": ("FashionMNIST/raw", "train-images-idx3-ubyte"),
        "cifar10": ("cifar-10-batches-py", "data_batch_1, data_batch_2"),
        "cifar100": ("cifar-100-python", "train"),
    }[name]
    with refuses(InputError, tmp_path / folder, files, "data.download=true", "SPLITLEARN_DATA", "data=digits"):
        train(configure(f"data={name}", "data.download=false", f"data.root={tmp_path}"))


def test_a_truncated_file_is_told_by_name(configure, idx_root, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (idx_root / "MNIST" / "raw").iterdir():
        (raw / file.name).write_bytes(file.read_bytes())
    images = raw / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with refuses(InputError, images, "39215 bytes", "promises 39216", "data.download=true"):
        train(configure("data=mnist", f"data.root={tmp_path}"))


def test_pictures_that_do_not_do_are_told_by_name(configure, picture_root, tmp_path):
    only = tmp_path / "cat"
    only.mkdir()
    (only / "0.png").write_bytes((picture_root / "cat" / "0.png").read_bytes())
    with refuses(InputError, tmp_path, "two class folders or more", "['cat']"):
        train(configure("data=image_folder", f"data.root={tmp_path}", "data.image_size=8"))
    (tmp_path / "dog").mkdir()
    for i in range(4):
        (tmp_path / "dog" / f"{i}.png").write_bytes((picture_root / "cat" / "0.png").read_bytes())
    (tmp_path / "dog" / "broken.png").write_bytes(b"no picture")
    with refuses(InputError, tmp_path / "dog" / "broken.png", "replace or remove it"):
        train(configure("data=image_folder", f"data.root={tmp_path}", "data.image_size=8"))


def test_a_loss_that_leaves_the_numbers_is_told_with_party_and_step(configure):
    with refuses(DivergedError, "turn of alice0 at epoch 0, mini-batch", "lower `optimizer.lr`"):
        train(configure(*QUICK, "optimizer.lr=1e30"))


def test_a_metric_that_was_not_measured_is_told_with_those_that_were(configure, caplog):
    assert train(configure(*QUICK, "metric=val/f1")) is None
    assert "`metric` (=val/f1) was not measured" in caplog.text
    assert "val/accuracy" in caplog.text


def test_a_monitor_that_is_not_measured_is_told_with_those_that_are(configure):
    with refuses(InputError, "`scheduler.monitor` (=val/f1) is not measured", "val/accuracy, val/loss"):
        train(configure(*QUICK, "scheduler=plateau", "scheduler.monitor=val/f1"))


@pytest.mark.parametrize(
    ("override", "told"),
    [("data=imagenet", "digits"), ("data.batchsize=3", "batchsize"), ("optimizer.foo=1", "foo")],
)
def test_unknown_options_and_keys_are_hydras_to_tell(override, told, configure):
    with pytest.raises(HydraException, match=told):
        configure(override)


# Checkpoints


@pytest.fixture
def checkpoint(configure, tmp_path) -> Path:
    """Of the first of two epochs."""
    train(configure("trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=none"))
    saved = tmp_path / "run" / "checkpoints" / "epoch0-step2.ckpt"
    return saved.rename(tmp_path / "first.ckpt")


def test_ckpt_goes_on_as_if_never_interrupted(checkpoint, configure, tmp_path):
    two = ("trainer.max_epochs=2", "trainer.limit_train_batches=2", "logger=none")
    train(configure(*two))
    uninterrupted = results(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    train(configure(*two, f"ckpt={checkpoint}"))
    resumed = results(tmp_path / "run")
    assert [epoch["epoch"] for epoch in resumed["epochs"]] == [0, 1]
    for epoch in (*resumed["epochs"], *uninterrupted["epochs"]):
        assert epoch.pop("seconds") > 0
    for part in ("epochs", "test", "bytes"):
        assert resumed[part] == uninterrupted[part]


@pytest.mark.parametrize(
    ("overrides", "message"),
    {
        "layout.cut=2": [
            "`ckpt` is of another run: `layout` is",
            "bottom(x)=[hidden1] ",
            "bottom(x)=[hidden1, hidden2]",
        ],
        "model.hidden_sizes=[32,32]": ["`ckpt` is of another run: `model` is", "hidden1 of 8320", "hidden1 of 2080"],
        "optimizer=adam": ["`ckpt` is of another run: `optimizer` is SGD in the checkpoint and Adam here", "`weights`"],
        "num_alices=2": ["`ckpt` is of another run: `num_alices` is 1 in the checkpoint and 2 here"],
    }.items(),
)
def test_a_checkpoint_of_another_run_is_refused(overrides, message, checkpoint, configure):
    with refuses(InputError, *message):
        train(configure("trainer.max_epochs=2", "logger=none", overrides, f"ckpt={checkpoint}"))


def test_of_another_run_only_what_differs_is_named(checkpoint, configure):
    changed = {
        "optimizer.lr": (0.1, 0.01),
        "schedule.turn": ("epoch", 3),
        "loss": [f"NLLLoss(reduction={kind}, ignore_index=-100, weight=None)" for kind in ("mean", "sum")],
        "scheduler": (None, "StepLR(step_size=10, gamma=0.1)"),
        "trainer.gradient_clip_val": (None, 1.0),
        "trainer.accumulate_grad_batches": (1, 3),
        "micro_batches": (1, 2),
        "trainer.precision": ("32-true", "bf16-mixed"),
        "trainer.limit_train_batches": (2, 4),
        "seed": (0, 1),
        "data.batch_size": (64, 32),
        "data.augment": (None, "crop_and_flip()"),
        "data.mean": (None, [0.5]),
        "data.std": (None, [0.25]),
    }
    made = ("loss", "scheduler", "data.augment")
    asked = [f"{key}={now}".replace(" ", "") for key, (_, now) in changed.items() if key not in made]
    augment = "{_target_: splitlearn.data.augment.crop_and_flip, _partial_: true}"
    asked += ["scheduler=step", "+loss.reduction=sum", f"data.augment={augment}", f"ckpt={checkpoint}", "logger=none"]
    with refuses(
        InputError, *(f"`{key}` is {was} in the checkpoint and {now} here" for key, (was, now) in changed.items())
    ):
        train(configure(*asked, "trainer.max_epochs=2"))
    with refuses(InputError, "another run: `model.hidden1` is", "Dropout", "here: resume with what the checkpoint has"):
        train(
            configure(
                "trainer.max_epochs=2", "trainer.limit_train_batches=2", "model.dropout=0.5", f"ckpt={checkpoint}"
            )
        )


def test_weights_alone_start_a_run_that_is_otherwise_free(checkpoint, configure, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    free = ("layout=u_shaped", "layout.cuts=[1,2]", "optimizer=adam", "data.batch_size=32", "num_alices=2")
    learner = build(configure(*free, "logger=none", f"weights={checkpoint}")).learner
    for name, value in learner.network.state_dict().items():
        block = name.split(".", 2)[2]
        assert torch.equal(value, next(v for key, v in saved.items() if key.endswith(f".{block}"))), name
    train(configure(*free, *QUICK, f"weights={checkpoint}"))
    with refuses(InputError, "`weights`", "does not fit", "hidden1", "there and", "here", "take the `model`"):
        train(configure("logger=none", "model.hidden_sizes=[32,640]", f"weights={checkpoint}"))
    with refuses(InputError, "`weights`", "starts a run", "`ckpt`", "take one"):
        train(configure("logger=none", f"weights={checkpoint}", f"ckpt={checkpoint}"))
    with refuses(InputError, "`weights`", "has the weights of all parties", "ckpt=FOLDER"):
        train(configure("logger=none", "engine=processes", f"weights={checkpoint}"))


def test_weights_start_nothing_for_other_columns_or_classes(configure, tmp_path):
    """Of the same shapes: they would take one column for another, or name a class by another's."""
    rows = [f"{i},{i % 7},{('ill', 'well')[i % 3 == 0]}" for i in range(40)]
    tables = {
        "same": "\n".join(["a,b,label", *rows]),
        "columns": "\n".join(["b,a,label", *rows]),
        "classes": "\n".join(["a,b,label", *rows]).replace("ill", "zill"),
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text)
    asked = (*QUICK, "data=table", "data.label=label", "model.hidden_sizes=[4]", "layout.cut=1")
    train(configure(*asked, f"data.root={tmp_path}/same.csv", f"output_dir={tmp_path}/first"))
    weights = f"weights={tmp_path}/first/checkpoints/last.ckpt"
    train(configure(*asked, f"data.root={tmp_path}/same.csv", weights))
    with pytest.warns(UserWarning, match="`weights` were trained on other rows or another split"):
        train(configure(*asked, f"data.root={tmp_path}/same.csv", weights, "seed=7"))
    with pytest.warns(UserWarning, match="on rows with another data.mean"):
        train(configure(*asked, f"data.root={tmp_path}/same.csv", weights, "data.standardise=true"))
    for name, theirs, ours in (("columns", "a, b", "b, a"), ("classes", "ill, well", "well, zill")):
        with refuses(InputError, "`weights`", f"were trained for other `data.{name}`, {theirs}, than {ours}"):
            train(configure(*asked, f"data.root={tmp_path}/{name}.csv", weights))


def test_weights_of_each_alice_start_nothing(configure, tmp_path):
    train(configure(*QUICK, "schedule=splitfed_v3", "num_alices=2"))
    with refuses(InputError, "`weights`", "has weights of each Alice"):
        build(configure("logger=none", f"weights={tmp_path}/run/checkpoints/last.ckpt"))


def test_the_best_checkpoint_is_tested_where_asked_for(configure, tmp_path, caplog):
    """The first epoch's is, where every further one is worse."""
    monitor = ("callbacks.checkpoint.monitor=val/loss", "optimizer.lr=0.05", "trainer.limit_train_batches=3")
    rises = ("scheduler=step", "scheduler.scheduler.step_size=1", "scheduler.scheduler.gamma=-20")
    train(configure("trainer.max_epochs=1", "logger=none", *monitor))
    first = results(tmp_path / "run")["test"]
    with caplog.at_level("INFO"):
        train(configure("trainer.max_epochs=2", "logger=none", *monitor, *rises, "test=best"))
    assert results(tmp_path / "run")["test"] == first
    assert "Tests the best checkpoint" in caplog.text
    with caplog.at_level("INFO"):
        train(configure("trainer.max_epochs=2", "logger=none", *monitor, *rises))
    assert results(tmp_path / "run")["test"] != first
    assert "Tests the last weights; test=best would test" in caplog.text


SEVERAL = ("trainer.limit_train_batches=6", "trainer.val_check_interval=2", "logger=none", "optimizer.lr=2.0")
BEST = ("callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.save_on_train_epoch_end=false", "test=best")


@pytest.mark.parametrize("kept", [1, 3])
def test_the_best_of_several_checkpoints_of_an_epoch_is_not_overwritten(kept, configure, tmp_path):
    train(configure("trainer.max_epochs=2", *SEVERAL, *BEST, f"+callbacks.checkpoint.save_top_k={kept}"))
    saved = [torch.load(path, weights_only=True) for path in (tmp_path / "run/checkpoints").glob("epoch*.ckpt")]
    assert len({checkpoint["global_step"] for checkpoint in saved}) == kept
    (state,) = (s for checkpoint in saved[-1:] for name, s in checkpoint["callbacks"].items() if "ModelChe" in name)
    of_best = torch.load(state["best_model_path"], weights_only=True)
    assert of_best["splitlearn"]["measured"]["val/loss"] == state["best_model_score"]


def test_a_run_that_tests_its_best_checkpoint_has_the_results_of_all_its_epochs(configure, tmp_path):
    """Its first epoch's is the best."""
    train(configure("trainer.max_epochs=3", *SEVERAL, *BEST[:-1]))
    last = results(tmp_path / "run")
    train(configure("trainer.max_epochs=3", *SEVERAL, *BEST))
    best = results(tmp_path / "run")
    assert best["test"] != last["test"]
    assert [epoch["epoch"] for epoch in best["epochs"]] == [0, 1, 2]
    for epoch in (*best["epochs"], *last["epochs"]):
        assert epoch.pop("seconds") > 0
    assert best["epochs"] == last["epochs"]


def test_the_best_checkpoint_is_that_of_all_parts_of_a_run(configure, tmp_path):
    train(configure("trainer.max_epochs=3", *SEVERAL, *BEST))
    whole = results(tmp_path / "run")["test"]
    train(configure("trainer.max_epochs=1", *SEVERAL, *BEST, f"output_dir={tmp_path}/first"))
    first = sorted((tmp_path / "first" / "checkpoints").glob("*"))
    more = (f"ckpt={tmp_path}/first/checkpoints/last.ckpt", f"output_dir={tmp_path}/second")
    train(configure("trainer.max_epochs=3", *SEVERAL, *BEST, *more))
    assert results(tmp_path / "second")["test"] == whole
    assert sorted((tmp_path / "first" / "checkpoints").glob("*")) == first


def test_results_of_an_earlier_run_do_not_stand_for_one_that_was_refused(configure, tmp_path):
    train(configure(*QUICK, "logger=none"))
    ckpt = f"ckpt={tmp_path}/run/checkpoints/last.ckpt"
    with refuses(InputError, "is of another run"):
        train(configure(*QUICK, "logger=none", "optimizer.lr=0.5", ckpt))
    assert len(results(tmp_path / "run")["epochs"]) == 1
    with pytest.raises(InputError):
        train(configure(*QUICK, "logger=none", "layout.cut=99"))
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_key_of_ones_own_does_where_another_reads_it(configure, tmp_path):
    train(configure(*QUICK, "+rate=0.07", "optimizer.lr=${rate}"))
    assert len(results(tmp_path / "run")["epochs"]) == 1


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    asked = ("+experiment=digits_2party", "trainer.max_epochs=1", f"output_dir={tmp_path}/file/run")
    done = command(*asked, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("splitlearn: ")
    assert f"{tmp_path}/file" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_checkpoint_is_refused_by_name(content, configure, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(content)
    with refuses(InputError, f"`ckpt` (={damaged}) cannot be read", "take another one"):
        train(configure("logger=none", f"ckpt={damaged}"))


class Mischief:
    """Runs when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


def test_a_checkpoint_runs_no_code(configure, tmp_path):
    sent, made = tmp_path / "sent.ckpt", tmp_path / "made"
    torch.save({"splitlearn": Mischief(made)}, sent)
    with refuses(InputError, f"`ckpt` (={sent}) cannot be read"):
        train(configure("logger=none", f"ckpt={sent}"))
    assert not made.exists()


def test_a_checkpoint_of_something_else_is_refused_by_name(configure, tmp_path):
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with refuses(InputError, f"`ckpt` (={foreign}) was not saved by splitlearn", "checkpoints folder"):
        train(configure("logger=none", f"ckpt={foreign}"))


# What the keys do


def rates_and_kinds(cfg) -> dict[str, tuple[str, float]]:
    run = build(cfg)
    Simulated().run(run.trainer, run.learner, run.data, None)
    return {
        role: (type(optimizer).__name__, pytest.approx(optimizer.param_groups[0]["lr"]))
        for role, optimizer in run.learner.stepper.optimizers.items()
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    {
        "optimizer.lr=0.3": {"alice": ("SGD", 0.3), "bob": ("SGD", 0.3)},
        "+optimizers.bob.lr=0.01": {"alice": ("SGD", 0.1), "bob": ("SGD", 0.01)},
        "+optimizer@optimizers.bob=adam": {"alice": ("SGD", 0.1), "bob": ("Adam", 0.001)},
        "scheduler=step scheduler.scheduler.step_size=1": {"alice": ("SGD", 0.01), "bob": ("SGD", 0.01)},
        "scheduler=step scheduler.scheduler.step_size=1 scheduler.interval=step": {
            "alice": ("SGD", 0.001),
            "bob": ("SGD", 0.001),
        },
        # The loss cannot fall by 10 in an epoch, so the second epoch is one on the plateau.
        "scheduler=plateau trainer.max_epochs=2 scheduler.scheduler.patience=0 "
        "+scheduler.scheduler.threshold=10 +scheduler.scheduler.threshold_mode=abs": {
            "alice": ("SGD", 0.01),
            "bob": ("SGD", 0.01),
        },
    }.items(),
)
def test_optimizers_and_rates_are_those_that_were_asked_for(override, expected, configure):
    assert rates_and_kinds(configure(*QUICK, *override.split())) == expected


def test_an_override_of_a_role_keeps_the_other_options(configure):
    learner = build(configure("optimizer.momentum=0.9", "+optimizers.bob.lr=0.01")).learner
    bob = learner.makers["bob"](learner.network.parameters_of("bob"))
    assert (bob.defaults["lr"], bob.defaults["momentum"]) == (0.01, 0.9)


def test_gradients_are_clipped_by_the_trainers_keys(configure):
    def moved(*overrides: str) -> float:
        run = build(configure(*QUICK, "trainer.limit_train_batches=1", "optimizer.lr=1", *overrides))
        before = nn.utils.parameters_to_vector(run.learner.network.parameters_of("bob")).detach()
        Simulated().run(run.trainer, run.learner, run.data, None)
        after = nn.utils.parameters_to_vector(run.learner.network.parameters_of("bob")).detach()
        return float((after - before).norm())

    assert moved() > 0.02
    assert moved("trainer.gradient_clip_val=0.001") == pytest.approx(0.001, rel=1e-3)


def test_half_precision_halves_what_crosses(configure, tmp_path, capsys):
    crossed = {}
    for precision in ("32-true", "bf16-mixed"):
        train(configure(*QUICK, f"trainer.precision={precision}"))
        crossed[precision] = results(tmp_path / "run")["bytes"]["alice0->bob"]["activation"]
    assert crossed == {"32-true": 2 * 64 * 128 * 4, "bf16-mixed": 2 * 64 * 128 * 2}
    drawings = capsys.readouterr().out
    assert "activation 64 x 128 float32, 32,768 bytes" in drawings
    assert "activation 64 x 128 bfloat16, 16,384 bytes" in drawings


@pytest.mark.parametrize(
    ("override", "epochs"),
    {
        "trainer.enable_checkpointing=false": 1,
        "trainer.enable_progress_bar=false": 1,
        "trainer.fast_dev_run=true": 1,
        "trainer.max_epochs=3": 3,
        "trainer.overfit_batches=1": 1,
        "data.val_fraction=0": 1,
    }.items(),
)
def test_lightnings_own_switches_work(override, epochs, configure, tmp_path):
    train(configure(*QUICK, "trainer.enable_progress_bar=true", override))
    found = results(tmp_path / "run")
    assert len(found["epochs"]) == epochs
    assert set(found["test"]) == {"test/loss", "test/accuracy"}
    unsaved = override in ("trainer.enable_checkpointing=false", "trainer.fast_dev_run=true")
    assert any(tmp_path.glob("run/checkpoints/epoch*.ckpt")) is not unsaved


def test_who_will_not_train_is_warned_of_by_name(configure):
    with pytest.warns(
        UserWarning, match=r"^alice1, alice2 will not train, since the trainer's limits come before their"
    ):
        train(configure(*QUICK, "num_alices=3"))


def test_every_job_of_a_process_says_who_will_not_train(configure):
    # Not by pytest.warns, under which every warning is shown: by default Python shows a line of code's warning once.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            train(configure(*QUICK, "num_alices=3"))
    assert sum("will not train" in str(warning.message) for warning in told) == 2


class BadSector(Dataset):
    """Forty rows, of which one cannot be read; it is none of those that are looked at before training."""

    classes = ("even", "odd")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        if row == 34:
            raise OSError(5, "Input/output error", "rows.bin")
        return torch.full((4,), float(row)), row % 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_row_that_cannot_be_read_ends_a_run_in_one_line(num_workers, configure, tmp_path):
    own = ("data=dataset", f"data.source.train._target_={__name__}.BadSector", "data.in_memory=false")
    said = "row 34 of the data cannot be read (OSError: [Errno 5] Input/output error: 'rows.bin'): mend it"
    with refuses(InputError, said):
        train(configure("trainer.max_epochs=1", "logger=none", *own, f"data.num_workers={num_workers}"))
    assert said in results(tmp_path / "run")["stopped"]  # it had begun


def test_a_relative_root_is_that_of_the_folder_one_stands_in(configure, idx_root, monkeypatch):
    monkeypatch.chdir(idx_root.parent)
    assert len(build(configure("data=mnist", f"data.root={idx_root.name}", "data.download=false")).data.rows) == 200
    monkeypatch.setenv("SPLITLEARN_DATA", idx_root.name)
    assert len(build(configure("data=mnist", "data.download=false")).data.rows) == 200


def test_train_returns_the_metric_that_was_asked_for(configure, tmp_path):
    returned = train(configure(*QUICK, "metric=test/accuracy"))
    assert returned == results(tmp_path / "run")["test"]["test/accuracy"]


# The command itself


def test_the_configuration_and_the_console_script_are_found():
    assert Path(CONF, "train.yaml").is_file()
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="splitlearn-train")
    assert script.load() is module.main


def test_cfg_job_prints_the_configuration(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["splitlearn-train", "+experiment=digits_2party", "--cfg", "job"])
    module.main()
    assert "hidden_sizes:\n  - 64\n  - 64\n  - 64\n" in capsys.readouterr().out


def test_the_command_tells_a_misfit_in_one_line_and_fails(tmp_path):
    done = command("layout.cut=9", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr == f"splitlearn: `layout.cut` (=9) must lie between 1 and 2, the blocks being {BLOCKS}\n"
    assert done.stdout == ""


def test_the_command_tells_a_folder_that_cannot_be_made_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = command("hydra.run.dir=file/run", cwd=tmp_path, check=False)
    rule = "file/run cannot be written (Not a directory): make room, or take a folder of your own, hydra.run.dir=..."
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"splitlearn: {rule}\n")


def test_a_folder_that_takes_no_bytes_is_told_before_a_run_and_before_a_sweep(tmp_path):
    cfg = OmegaConf.create({"hydra": {kind: {"dir": f"{tmp_path}/{kind}"} for kind in ("run", "sweep")}})
    starts = {"run": RunFolder().on_run_start, "sweep": RunFolder().on_multirun_start}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for kind, start in starts.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk, an empty file can be made
        try:
            with pytest.raises(SystemExit, match=rf"^splitlearn: .*/{kind} cannot be .* hydra.{kind}.dir=\.\.\.$"):
                start(cfg)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        start(cfg)
        assert list((tmp_path / kind).iterdir()) == []


def hyperparameters(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """What TensorBoard's HPARAMS tab shows of a run: its hyperparameters that are numbers, and its final metrics."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()

    def read(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(events.summary_metadata[f"_hparams_/{tag}"].plugin_data.content)

    typed = read("session_start_info").session_start_info.hparams
    tags = [info.name.tag for info in read("experiment").experiment.metric_infos]
    curves = {tag: events.Scalars(tag) for tag in tags}
    for curve in curves.values():  # a final point in front of the curve would be a zigzag
        steps = [event.step for event in curve]
        assert steps == sorted(steps)
    hparams = {name: value.number_value for name, value in typed.items()}
    return hparams, {tag: curve[-1].value for tag, curve in curves.items()}


def test_a_sweep_goes_on_behind_a_run_that_diverged(tmp_path):
    quick = ("+experiment=digits_2party", "trainer.max_epochs=1", "trainer.limit_train_batches=3")
    done = command("-m", *quick, "optimizer.lr=1e30,0.1", "hydra.sweep.dir=sweep", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "DivergedError" in done.stderr
    assert results(tmp_path / "sweep" / "1")["test"]["test/loss"] < 3


def test_a_sweep_over_the_cut_makes_three_runs_that_compare(tmp_path):
    quick = ("+experiment=digits_2party", "trainer.max_epochs=1", "trainer.limit_train_batches=3")
    command("-m", *quick, "layout.cut=1,2,3", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    tests = []
    for cut, run in enumerate(sorted((tmp_path / "sweep").glob("[0-9]*")), start=1):
        shown, metrics = hyperparameters(run)
        found = results(run)
        assert shown["layout/cut"] == cut
        final = {name: value for name, value in found["epochs"][-1].items() if "/" in name} | found["test"]
        assert metrics == pytest.approx(final, rel=1e-6)
        assert found["bytes"]["alice0->bob"] == {"activation": 3 * 32 * 64 * 4}
        tests.append(found["test"])
    assert len(tests) == 3
    assert tests[0] == tests[1] == tests[2]

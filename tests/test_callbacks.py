"""results.json, the progress bar and TensorBoard hold what they promise, and change nothing."""

import errno
import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from helpers import BLOCKS, SGD, net, run_blocks
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from runs import TWO_PARTY, Recorder, batches_of, difference, end_state, make_data, make_learner, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import pil_to_tensor

from splitlearn.callbacks.partition_figure import who_has_what
from splitlearn.callbacks.progress import ProgressBar
from splitlearn.callbacks.results import Results, write_whole
from splitlearn.callbacks.tensorboard import TensorBoardCurves, _strip, has_many_alices
from splitlearn.data import Source, SplitData
from splitlearn.errors import InputError
from splitlearn.layout import vertical
from splitlearn.training.checkpoints import SafeCheckpointIO

# FLOPs of one row of `net`: of the convolution and the first linear layer, and of the others. Nobody wants the gradient
# of the image.
FORWARD_ALICE, BACKWARD_ALICE, FORWARD_BOB = 2 * (432 + 480), 2 * (432 + 2 * 480), 2 * (70 + 21)


def fit(folder, callbacks=(), logger=False, data=None, layout=TWO_PARTY, trainer=None, **learner):
    data = make_data(val_rows=6) if data is None else data
    trained = make_learner(data, layout, **learner)
    lightning = make_trainer(folder, callbacks, logger, **(trainer or {}))
    lightning.fit(trained, datamodule=data)
    return trained, lightning


def epoch_losses(data, epochs):
    """The mean loss over the rows of each epoch, and the gradient norms of both parties at the end of it, by hand."""
    model, means, norms = net(), [], []
    optimizer = SGD(model.parameters())
    for epoch in range(epochs):
        total = num_rows = 0
        for x, y, number in batches_of(data, epoch):
            loss = nn.functional.cross_entropy(run_blocks(model.named_children(), x, number), y)
            model.zero_grad()
            loss.backward()
            optimizer.step()
            total, num_rows = total + loss.item() * len(y), num_rows + len(y)
            norms.append([math.sqrt(sum(float((p.grad**2).sum()) for p in part.parameters())) for part in cut(model)])
        means.append(total / num_rows)
    return means, norms


def cut(model):
    return model[:2], model[2:]


def test_results_have_the_shape_that_is_promised(tmp_path):
    learner, trainer = fit(tmp_path, [Results(tmp_path / "sub" / "results.json")])
    metrics = dict(trainer.callback_metrics)
    trainer.test(learner, datamodule=trainer.datamodule, verbose=False)
    kept = json.loads((tmp_path / "sub" / "results.json").read_text())
    means, _ = epoch_losses(trainer.datamodule, 2)
    assert list(kept) == ["epochs", "test", "bytes", "evaluation_bytes", "flops", "macs", "seconds"]
    metrics_of_epoch = ["epoch", "train/loss", "val/loss", "val/accuracy"]
    promised = [*metrics_of_epoch, "bytes", "client_flops", "client_flops_max", "seconds", "step"]
    assert [list(epoch) for epoch in kept["epochs"]] == [promised] * 2
    assert [(epoch["epoch"], epoch["train/loss"]) for epoch in kept["epochs"]] == [(0, means[0]), (1, means[1])]
    assert kept["epochs"][1]["val/loss"] == float(metrics["val/loss"])
    tested = {name: float(trainer.callback_metrics[name]) for name in ("test/loss", "test/accuracy")}
    assert kept["test"] == tested
    assert kept["bytes"] == {"alice0->bob": {"activation": 78 * 40}, "bob->alice0": {"gradient": 78 * 40}}
    assert kept["evaluation_bytes"] == {"alice0->bob": {"activation": (12 + 5) * 40}}
    assert kept["flops"] == {
        "alice0": {"forward": 78 * FORWARD_ALICE, "backward": 78 * BACKWARD_ALICE},
        "bob": {"forward": 78 * FORWARD_BOB, "backward": 78 * 2 * FORWARD_BOB},
    }
    macs = {"alice0": 78 * (FORWARD_ALICE + BACKWARD_ALICE) // 2, "bob": 78 * 3 * FORWARD_BOB // 2}
    assert kept["macs"] == macs
    assert [epoch["client_flops"] for epoch in kept["epochs"]] == [macs["alice0"], 2 * macs["alice0"]]
    assert [epoch["client_flops_max"] for epoch in kept["epochs"]] == [macs["alice0"], 2 * macs["alice0"]]
    assert [(epoch["bytes"], epoch["step"]) for epoch in kept["epochs"]] == [(2 * 39 * 40, 10), (2 * 78 * 40, 20)]
    assert 0 < kept["epochs"][0]["seconds"] < kept["epochs"][1]["seconds"] <= kept["seconds"] < 60
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["results.json"]


def test_each_epoch_tells_the_flops_of_all_alices_and_of_the_one_who_did_most(tmp_path):
    kept = Results(tmp_path / "results.json")
    fit(tmp_path, [kept], data=make_data(num_rows=11, num_alices=3, sizes=(3, 6, 2)))
    per_row = FORWARD_ALICE + BACKWARD_ALICE
    costs = [(epoch["client_flops"], epoch["client_flops_max"]) for epoch in kept.epochs]
    assert costs == [(11 * per_row, 6 * per_row), (22 * per_row, 12 * per_row)]


def test_an_epoch_has_the_validation_that_was_run_in_it(tmp_path):
    kept = Results(tmp_path / "results.json")
    fit(tmp_path, [kept], trainer={"max_epochs": 4, "check_val_every_n_epoch": 2})
    assert ["val/loss" in epoch for epoch in kept.epochs] == [False, True, False, True]


def test_results_go_on_in_a_second_fit(tmp_path):
    kept = Results(tmp_path / "results.json")
    learner, trainer = fit(tmp_path, [kept], trainer={"max_epochs": 1})
    first = kept.seconds
    trainer.fit_loop.max_epochs = 2
    trainer.fit(learner, datamodule=trainer.datamodule)
    assert [epoch["epoch"] for epoch in kept.epochs] == [0, 1]
    assert json.loads((tmp_path / "results.json").read_text())["seconds"] > kept.epochs[1]["seconds"] > first
    assert [epoch["step"] for epoch in kept.epochs] == [10, 20]


def test_the_seconds_of_a_resumed_run_go_on(tmp_path):
    kept = Results(tmp_path / "results.json")
    kept.load_state_dict({"epochs": [], "validated": {}, "seconds": 1000.0})
    fit(tmp_path, [kept])
    assert 1000 < kept.epochs[0]["seconds"] < kept.epochs[1]["seconds"] < 1060


def test_results_tell_why_training_stopped(tmp_path):
    class Fails(Callback):
        def on_validation_end(self, *_):
            raise ZeroDivisionError("by hand")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [Results(tmp_path / "results.json"), Fails()])
    assert json.loads((tmp_path / "results.json").read_text())["stopped"] == "ZeroDivisionError: by hand"


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run with two epochs of ten mini-batches that logs every five, and what TensorBoard reads back of it."""
    folder = tmp_path_factory.mktemp("watched")
    logger = TensorBoardLogger(folder, name="tb", version="", default_hp_metric=False)
    learner, trainer = fit(
        folder, [TensorBoardCurves(num_images=3, every_n_epochs=1)], logger, trainer={"log_every_n_steps": 5}
    )
    logger.finalize("success")
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return learner, trainer, events


def test_tensorboard_has_the_tags_that_are_promised(watched):
    _, _, events = watched
    tags = events.Tags()
    assert set(tags["scalars"]) == {
        "epoch",
        "train/loss",
        "train/loss_step",
        "val/loss",
        "val/accuracy",
        "lr/alice",
        "lr/bob",
        "grad_norm/alice",
        "grad_norm/bob",
        "bytes/alice0->bob/activation",
        "bytes/bob->alice0/gradient",
        "flops/alice0",
        "flops/bob",
        "cost/val_accuracy_by_client_flops",
        "cost/val_accuracy_by_bytes",
    }
    assert tags["histograms"] == ["smashed/alice->bob"]
    assert tags["images"] == ["who has what", "inputs above what crosses"]


def test_tensorboard_has_the_values_of_a_hand_loop(watched):
    _, trainer, events = watched
    means, norms = epoch_losses(trainer.datamodule, 2)
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(means)
    for role, expected in zip(("alice", "bob"), zip(*norms, strict=True), strict=True):
        found = events.Scalars(f"grad_norm/{role}")
        assert [event.step for event in found] == [5, 10, 15, 20]
        assert [event.value for event in found] == pytest.approx(list(expected[4::5]), rel=1e-5)
    assert [event.value for event in events.Scalars("lr/bob")] == [pytest.approx(0.1)] * 4
    rows = [20, 39, 59, 78]
    assert [event.value for event in events.Scalars("bytes/bob->alice0/gradient")] == [40 * n for n in rows]
    alice = [(FORWARD_ALICE + BACKWARD_ALICE) * n for n in rows]
    assert [event.value for event in events.Scalars("flops/alice0")] == alice
    assert [event.value for event in events.Scalars("flops/bob")] == [3 * FORWARD_BOB * n for n in rows]


def test_tensorboard_has_accuracy_over_cost(watched):
    """The step of these two is what the run had cost by then."""
    _, _, events = watched
    accuracies = [event.value for event in events.Scalars("val/accuracy")]
    by_flops, by_bytes = (events.Scalars(f"cost/val_accuracy_by_{cost}") for cost in ("client_flops", "bytes"))
    assert [event.value for event in by_flops] == [event.value for event in by_bytes] == accuracies
    assert [event.step for event in by_flops] == [(FORWARD_ALICE + BACKWARD_ALICE) * n for n in (39, 78)]
    assert [event.step for event in by_bytes] == [2 * 40 * n for n in (39, 78)]


def test_only_validations_of_training_are_put_over_cost(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    settings = {"max_epochs": 1, "num_sanity_val_steps": 2}
    learner, trainer = fit(tmp_path, [TensorBoardCurves()], logger, trainer=settings)
    trainer.validate(learner, datamodule=trainer.datamodule, verbose=False)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert len(events.Scalars("cost/val_accuracy_by_bytes")) == 1


def test_tensorboard_has_what_crosses(watched):
    learner, trainer, events = watched
    tape, _ = learner.network.look(trainer.datamodule.sample(3))
    histogram = events.Histograms("smashed/alice->bob")[-1].histogram_value
    assert histogram.num == tape[0].received.numel() == 3 * 10
    assert histogram.sum == pytest.approx(float(tape[0].received.double().sum()))
    image = events.Images("inputs above what crosses")[-1]
    assert (image.height, image.width) == (2 * 68, 2 + 3 * 66)


def test_the_loss_of_a_step_is_that_of_its_mini_batch(tmp_path):
    def losses(length):
        recorder = Recorder()
        fit(tmp_path, [TensorBoardCurves()], recorder, trainer={"log_every_n_steps": 5}, steps_per_execution=length)
        return [(step, m["train/loss_step"]) for step, m in recorder.logged if "train/loss_step" in m]

    assert losses(50) == losses(1)
    assert [step for step, _ in losses(50)] == [5, 10, 15, 20]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_watching_changes_nothing(tmp_path, precision):
    settings = {"precision": precision, "log_every_n_steps": 5}
    logger = TensorBoardLogger(tmp_path, name="tb")
    watched = end_state(*fit(tmp_path, [TensorBoardCurves()], logger, trainer=settings))
    assert difference(watched, end_state(*fit(tmp_path, trainer=settings))) == []


def test_every_cut_and_every_field_of_the_input_is_drawn(tmp_path):
    layout = vertical(BLOCKS[1:], 1, num_alices=2)
    x, y = torch.rand(20, 1, 4, 6), torch.arange(20) % 3
    data = SplitData(Source(TensorDataset(x, y), None, 3), layout, 2, batch_size=4, seed=0)
    model = nn.Sequential()
    model.add_module("block2", nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
    model.add_module("block3", nn.Linear(10, 7))
    model.add_module("head", nn.Linear(7, 3))
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    fit(tmp_path, [TensorBoardCurves(2)], logger, data, layout, model=model, trainer={"max_epochs": 1})
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["histograms"] == ["smashed/alice0->bob", "smashed/alice1->bob"]
    image = events.Images("inputs above what crosses")[0]
    assert (image.height, image.width) == (4 * 68, 2 + 2 * 66)


def test_the_picture_of_who_has_what_is_that_of_the_training_rows(watched):
    _, trainer, events = watched
    data = trainer.datamodule
    (image,) = events.Images("who has what")
    drawn = pil_to_tensor(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 0
    assert torch.equal(drawn, who_has_what(data.labels, [data.shards["alice0"]], 3))


@pytest.mark.parametrize(
    ("num_alices", "names"),
    [
        (10, {f"alice{i}" for i in range(10)}),
        (11, {"alice*"}),
    ],
)
def test_the_bytes_and_flops_of_more_than_ten_alices_are_summed(tmp_path, num_alices, names):
    recorder, data = Recorder(), make_data(num_rows=22, num_alices=num_alices)
    fit(tmp_path, [TensorBoardCurves()], recorder, data, trainer={"max_epochs": 1, "log_every_n_steps": num_alices})
    ((_, scalars),) = [logged for logged in recorder.logged if "train/loss_step" in logged[1]]
    sent = {tag: value for tag, value in scalars.items() if tag.endswith("->bob/activation")}
    assert set(sent) == {f"bytes/{name}->bob/activation" for name in names}
    assert sum(sent.values()) == 22 * 40
    flops = {tag: value for tag, value in scalars.items() if tag.startswith("flops/alice")}
    assert set(flops) == {f"flops/{name}" for name in names}
    assert sum(flops.values()) == 22 * (FORWARD_ALICE + BACKWARD_ALICE)


@pytest.mark.parametrize(("num_alices", "many"), [(10, False), (11, True)])
def test_owners_of_columns_are_counted_as_alices_too(num_alices, many):
    layout = vertical(BLOCKS[1:], 1, num_alices)
    learner = SimpleNamespace(schedule=SimpleNamespace(takers=layout.takers(num_alices)))
    learner.network = SimpleNamespace(layout=layout)
    assert has_many_alices(learner) is many


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 8, 8), (2, 7, 4, 4), (2, 1, 28, 28), (2, 6, 10)])
def test_whatever_crosses_is_drawn_as_a_strip_of_pictures(shape):
    strip = _strip(torch.rand(shape))
    assert strip.shape == (3, 68, 2 + 2 * 66)
    assert 0 <= float(strip.min()) <= float(strip.max()) <= 1


def test_watching_needs_no_data_module_and_no_tensorboard(tmp_path):
    recorder = Recorder()
    fit(tmp_path, [TensorBoardCurves()], recorder, trainer={"log_every_n_steps": 10})
    assert "grad_norm/alice" in dict(recorder.logged[0][1])
    fit(tmp_path, [TensorBoardCurves()], trainer={"log_every_n_steps": 0})


class Counts(Callback):
    """Notes where the bar stands whenever a stretch ends."""

    content_with_stretches = True

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, *_) -> None:
        bar = trainer.progress_bar_callback.train_progress_bar
        self.seen.append((bar.n, bar.total))


@pytest.mark.parametrize(
    ("length", "seen"),
    [(7, [(7, 10), (10, 10)] * 2), (50, [(10, 10)] * 2), (1, [(n, 10) for n in range(1, 11)] * 2)],
)
def test_the_bar_counts_mini_batches(tmp_path, capfd, length, seen):
    counts = Counts()
    settings = {"enable_progress_bar": True}
    learner, _ = fit(tmp_path, [ProgressBar(), counts], steps_per_execution=length, trainer=settings)
    assert counts.seen == seen
    assert f"loss={learner.mean_loss:.3f}" in "".join(capfd.readouterr())


def test_the_bar_of_a_resumed_run_goes_on(tmp_path, capfd):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, [saver])
    counts, data = Counts(), make_data(val_rows=6)
    trainer = make_trainer(tmp_path, [ProgressBar(), counts], enable_progress_bar=True)
    trainer.fit(make_learner(data), datamodule=data, ckpt_path=tmp_path / "step=4.ckpt")
    assert counts.seen == [(10, 10)] * 2


def test_a_short_run_has_curves_too(tmp_path):
    recorder = Recorder()
    fit(tmp_path, [TensorBoardCurves()], recorder, trainer={"log_every_n_steps": 100})
    points = [(step, scalars) for step, scalars in recorder.logged if "lr/bob" in scalars]
    assert [step for step, _ in points] == [10, 20]
    assert {"grad_norm/alice", "bytes/alice0->bob/activation", "flops/alice0"} <= set(points[0][1])


def test_what_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for write in (
        lambda: write_whole(tmp_path / "file" / "results.json", "{}"),
        lambda: SafeCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt"),
    ):
        with pytest.raises(InputError, match=r"file/.* cannot be written \(.*\): make room, or take a folder"):
            write()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_whole(tmp_path / "results.json", "{}")


@pytest.mark.parametrize(("val_rows", "bars"), [(3, 0), (7, 2)])
def test_a_validation_of_one_batch_has_no_bar(val_rows, bars, tmp_path, capfd):
    data = make_data(val_rows=val_rows)
    trainer = make_trainer(tmp_path, [ProgressBar()], enable_progress_bar=True)
    trainer.fit(make_learner(data), datamodule=data)
    told = capfd.readouterr()
    assert (told.out + told.err).count("Validation DataLoader 0: 100%") == bars

"""Stretches change nothing: a split run is the ordinary LightningModule's run, whatever `steps_per_execution` is.

The reference is `runs.Plain`, a LightningModule with automatic optimization and the network in one piece, trained by
Lightning itself on the same mini-batches. What only a split run leaves is compared between lengths of stretches.
"""

import pytest
import pytorch_lightning as pl
import torch
from helpers import BLOCKS, SEED, SGD, cases, net
from pytorch_lightning.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from runs import (
    TWO_PARTY,
    Plain,
    Recorder,
    difference,
    end_state,
    fit_plain,
    make_data,
    make_learner,
    make_trainer,
    results,
    saved,
    train_plain,
    train_split,
    weights,
)

from splitlearn.callbacks.interrupt import Interrupt
from splitlearn.callbacks.progress import ProgressBar
from splitlearn.callbacks.tensorboard import TensorBoardCurves
from splitlearn.layout import whole
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork
from splitlearn.schedules.schedule import Schedule
from splitlearn.training import pace
from splitlearn.wire import Wire, elsewhere

LENGTHS = (1, 7, 50)
WHOLE = whole(BLOCKS)


class StopAt(Callback):
    """Asks the trainer to stop in the middle of a stretch, behind mini-batch `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, *_) -> None:
        trainer.should_stop |= trainer.global_step == self.step - 1


def save_every_three() -> ModelCheckpoint:
    return ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)


def stop_early() -> EarlyStopping:
    return EarlyStopping("val/loss", stopping_threshold=1e9)  # at the first look


# Trainer's arguments, callbacks, and where training ends: (global_step, current_epoch)
SCENARIOS = {
    "two epochs": ({}, [], (20, 2)),
    "max_steps in the first epoch": ({"max_steps": 4}, [], (4, 1)),
    "max_steps at the end of a stretch": ({"max_steps": 7}, [], (7, 1)),
    "max_steps beyond an epoch": ({"max_steps": 13}, [], (13, 2)),
    "a checkpoint every three": ({}, [save_every_three], (20, 2)),
    "a checkpoint and validation": ({"val_check_interval": 5}, [save_every_three], (20, 2)),
    "val_check_interval=4": ({"val_check_interval": 4}, [], (20, 2)),
    "val_check_interval=0.3": ({"val_check_interval": 0.3}, [], (20, 2)),
    "validation across epochs": ({"val_check_interval": 7, "check_val_every_n_epoch": None}, [], (20, 2)),
    "validation every other epoch": ({"check_val_every_n_epoch": 2, "max_epochs": 3}, [], (30, 3)),
    "limit_train_batches=7": ({"limit_train_batches": 7}, [save_every_three], (14, 2)),
    "limit_train_batches=0.5": ({"limit_train_batches": 0.5}, [], (10, 2)),
    "limit_val_batches=1": ({"limit_val_batches": 1}, [], (20, 2)),
    "overfit_batches=3": ({"overfit_batches": 3, "max_epochs": 3}, [], (9, 3)),
    "fast_dev_run": ({"fast_dev_run": True}, [], (1, 1)),
    "fast_dev_run=4": ({"fast_dev_run": 4}, [save_every_three], (4, 1)),
    "sanity check": ({"num_sanity_val_steps": 2}, [], (20, 2)),
    "early stopping": ({"max_epochs": 4}, [stop_early], (10, 1)),
    "early stopping after min_epochs": ({"max_epochs": 4, "min_epochs": 2}, [stop_early], (20, 2)),
    "early stopping after min_steps": ({"max_epochs": 4, "min_steps": 13}, [stop_early], (13, 2)),
    "stopped in mid-stretch": ({}, [lambda: StopAt(4)], (4, 1)),
    "stopped in mid-stretch after min_epochs": ({"min_epochs": 2}, [lambda: StopAt(4)], (20, 2)),
    "stopped in mid-stretch after min_steps": ({"min_steps": 13}, [lambda: StopAt(4)], (13, 2)),
}


def validations(logged):
    """(step, epoch, val/loss) of each validation."""
    return [(step, m["epoch"], m["val/loss"]) for step, m in logged if "val/loss" in m]


SLOW = (
    *("two epochs", "max_steps beyond an epoch", "a checkpoint every three", "val_check_interval=4"),
    *("validation every other epoch", "limit_train_batches=0.5", "early stopping after min_epochs"),
    "stopped in mid-stretch after min_epochs",
)


@pytest.mark.parametrize(("trainer", "callbacks", "end"), cases(SCENARIOS, SLOW))
def test_stretches_change_nothing(tmp_path, trainer, callbacks, end):
    plain, lightning, logged = train_plain(tmp_path / "plain", callbacks, **trainer)
    assert (lightning.global_step, lightning.current_epoch) == end
    runs = {}
    for length in LENGTHS:
        folder = tmp_path / str(length)
        learner, split, split_logged = train_split(folder, length, callbacks, **trainer)
        assert (split.global_step, split.current_epoch) == end
        assert difference(weights(learner), weights(plain)) == []
        assert validations(split_logged) == validations(logged)
        assert list(saved(folder)) == list(saved(tmp_path / "plain"))
        runs[length] = (end_state(learner, split), split_logged, results(folder), saved(folder))
    assert difference(runs[7], runs[1]) == []
    assert difference(runs[50], runs[1]) == []


def test_the_scenarios_do_validate_and_save(tmp_path):
    _, _, logged = train_plain(tmp_path / "a", val_check_interval=4)
    assert [step for step, _, _ in validations(logged)] == [3, 7, 13, 17]
    _, _, logged = train_plain(tmp_path / "b", val_check_interval=7, check_val_every_n_epoch=None)
    assert [step for step, _, _ in validations(logged)] == [6, 13]
    train_plain(tmp_path / "c", [save_every_three], limit_train_batches=7)
    assert len(saved(tmp_path / "c")) == 4  # of 14 steps


class Watched(SplitLearner):
    """Keeps the lengths of its stretches, and how many of their mini-batches were trained."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.lengths, self.trained = [], []

    def training_step(self, stretch, batch_idx) -> None:
        before = self.pace.done - 1
        super().training_step(stretch, batch_idx)
        self.lengths.append(stretch.length)
        self.trained.append(self.pace.done - before)


@pytest.mark.parametrize(
    ("length", "callbacks", "trainer", "expected"),
    [
        (1, [], {}, [1] * 20),
        (7, [], {"logger": None}, [7, 3, 7, 3]),
        (50, [], {"logger": None}, [10, 10]),
        (50, [], {}, [4, 4, 2, 2, 4, 4]),  # a logger looks at 4, 8, 12, ...
        (50, [], {"logger": None, "max_steps": 13}, [10, 3]),
        (50, [], {"logger": None, "limit_train_batches": 6}, [6, 6]),
        (50, [], {"logger": None, "val_check_interval": 4}, [4, 4, 2, 4, 4, 2]),
        (50, [], {"logger": None, "val_check_interval": 7, "check_val_every_n_epoch": None}, [7, 3, 4, 6]),
        (50, [save_every_three], {"logger": None}, [3, 3, 3, 1, 2, 3, 3, 2]),
        (50, [ProgressBar, TensorBoardCurves, lambda: Interrupt("x")], {"logger": None}, [10, 10]),
        (50, [ModelCheckpoint, pl.callbacks.Timer, stop_early], {"logger": None, "min_epochs": 1}, [10]),
        (50, [pl.callbacks.TQDMProgressBar], {"logger": None}, [1] * 20),  # it counts how often it is called
    ],
)
def test_a_stretch_ends_where_somebody_looks(tmp_path, capfd, length, callbacks, trainer, expected):
    data, made = make_data(val_rows=6), [make() for make in callbacks]
    learner = make_learner(data, kind=Watched, steps_per_execution=length)
    bar = any(isinstance(callback, pl.callbacks.ProgressBar) for callback in made)
    settings = {"logger": Recorder(), "log_every_n_steps": 4, "enable_progress_bar": bar, **trainer}
    make_trainer(tmp_path, made, **settings).fit(learner, datamodule=data)
    assert learner.lengths == learner.trained == expected


def test_a_stretch_ends_after_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "LONGEST_SECONDS", 0.0)
    slow, slow_trainer, _ = train_split(tmp_path / "slow", 50, kind=Watched)
    assert slow.trained == [1] * 20
    monkeypatch.undo()
    fast, fast_trainer, _ = train_split(tmp_path / "fast", 50, kind=Watched)
    assert fast.trained == [4, 4, 2, 2, 4, 4]
    assert difference(end_state(slow, slow_trainer), end_state(fast, fast_trainer)) == []


def test_max_time_stops_at_the_end_of_a_stretch(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "LONGEST_SECONDS", 0.0)
    _, trainer, _ = train_split(tmp_path, 50, max_time={"microseconds": 1})
    assert trainer.global_step == 1


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_monitor_logs_as_ever(tmp_path, interval):
    def rates(logged):
        return [(step, rate) for step, m in logged for name, rate in m.items() if name.startswith("lr")]

    def monitor():
        return LearningRateMonitor(interval)

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    reference, plain = Recorder(), Plain(scheduler=scheduler, interval="step")
    trainer = make_trainer(tmp_path / "plain", [monitor()], reference, log_every_n_steps=4)
    fit_plain(plain, make_data(), trainer)
    data, recorder = make_data(layout=WHOLE), Recorder()
    learner = make_learner(data, WHOLE, scheduler=scheduler, interval="step")
    make_trainer(tmp_path / "split", [monitor()], recorder, log_every_n_steps=4).fit(learner, datamodule=data)
    assert len(rates(reference.logged)) == {"step": 5, "epoch": 2}[interval]
    assert rates(recorder.logged) == rates(reference.logged)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("first", [{"max_epochs": 1}, {"max_steps": 4}, {"max_steps": 13}], ids=str)
def test_a_second_fit_goes_on(tmp_path, length, first):
    def fit_twice(trainer, fit):
        fit()
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 3, -1
        fit()
        return trainer.global_step, trainer.current_epoch

    plain, data, reference = Plain(), make_data(val_rows=6), Recorder()
    trainer = make_trainer(tmp_path / "plain", [save_every_three()], reference, **first)
    end = fit_twice(trainer, lambda: fit_plain(plain, data, trainer))
    recorder = Recorder()
    learner = make_learner(data, steps_per_execution=length)
    split = make_trainer(tmp_path / "split", [save_every_three()], recorder, **first)
    assert fit_twice(split, lambda: split.fit(learner, datamodule=data)) == end
    assert difference(weights(learner), weights(plain)) == []
    assert list(saved(tmp_path / "split")) == list(saved(tmp_path / "plain"))
    assert validations(recorder.logged) == validations(reference.logged)


def test_what_was_made_ready_comes_next():
    read = []
    items = pace.Ahead(read.append(i) or i for i in range(3))
    items.prepare()
    items.prepare()
    assert read == [0]
    assert [next(items), read] == [0, [0]]
    assert list(items) == [1, 2]
    items.prepare()
    assert list(items) == []


def test_nothing_of_an_epoch_is_kept_behind_it(tmp_path):
    """A reader that is kept would keep the workers of its DataLoader alive."""
    _, trainer, _ = train_split(tmp_path, 50)
    assert trainer.lightning_module.pace.ahead is None


class WithoutBob(Wire):
    """The wire of Alice's process, to which every gradient comes as zeros. Notes what happens in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def plays(self, party):
        return party != "bob"

    hosts = plays

    def _move(self, tensor, src, dst, kind):
        self.events.append(kind)
        return torch.zeros(tensor.shape) if src == "bob" else elsewhere(tuple(tensor.shape), tensor.dtype)


@pytest.mark.parametrize(
    ("limit", "steps"),
    [({"max_epochs": 1}, 10), ({"max_steps": 4}, 4), ({"limit_train_batches": 3, "max_epochs": 1}, 3)],
)
def test_who_waits_reads_the_next_rows_meanwhile_and_none_that_are_not_trained_on(tmp_path, limit, steps):
    data, wire = make_data(), WithoutBob()
    data.augment = lambda x, generator: wire.events.append("rows") or x
    network = SplitNetwork(net(), TWO_PARTY, data, wire, SEED)
    learner = SplitLearner(network, Schedule(["alice0"]), SGD, torch.nn.CrossEntropyLoss(), 3)
    make_trainer(tmp_path, **limit).fit(learner, datamodule=data)
    step = ["activation", "rows", "gradient"]
    assert wire.events == ["rows", *step * (steps - 1), "activation", "gradient"]

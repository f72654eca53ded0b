"""Ctrl-C, SIGTERM and SIGHUP leave a checkpoint and results.json, and a resumed run is the uninterrupted one."""

import os
import re
import signal
import threading
from functools import partial
from itertools import count

import pytest
import torch
from helpers import ADAM
from pytorch_lightning.callbacks import Callback
from runs import difference, end_state, make_data, make_learner, make_trainer, results
from torch.optim.lr_scheduler import ReduceLROnPlateau

from splitlearn.callbacks.interrupt import Interrupt
from splitlearn.callbacks.results import Results
from splitlearn.training.stopping import StoppedError, raising

PLATEAU = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.1)


def run(folder, callbacks=(), ckpt=None):
    """Five Alices, ten mini-batches an epoch, a validation after every five."""
    data = make_data(val_rows=6, num_alices=5)
    learner = make_learner(data, make=ADAM, scheduler=PLATEAU)
    trainer = make_trainer(folder, [Results(folder / "results.json"), *callbacks], val_check_interval=5)
    trainer.fit(learner, datamodule=data, ckpt_path=ckpt)
    return {**end_state(learner, trainer), "results": results(folder)}


class Presses(Callback):
    """Presses Ctrl-C in the `nth` call of a hook, `times` times."""

    def __init__(self, hook: str, nth: int, times: int = 1, number: int = signal.SIGINT) -> None:
        self.calls, self.nth, self.times, self.number = count(1), nth, times, number
        setattr(self, hook, self.press)

    def press(self, *args) -> None:
        if next(self.calls) == self.nth:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


INTERRUPTED = {
    "in a stretch": ("on_before_backward", 2),
    "at the end of a stretch": ("on_before_backward", 4),
    "in the last stretch of an epoch": ("on_after_backward", 10),
    "in the second epoch": ("on_after_backward", 13),
    "in a validation": ("on_validation_batch_end", 1),
    "at the end of a validation": ("on_validation_end", 2),
    "in the last validation of the epoch": ("on_validation_batch_start", 4),
    "in the last validation": ("on_validation_start", 4),
    "between epochs": ("on_train_epoch_end", 1),
    "at the end": ("on_train_epoch_end", 2),
}


@pytest.mark.parametrize(("hook", "nth"), INTERRUPTED.values(), ids=INTERRUPTED)
def test_ctrl_c_leaves_what_is_needed_to_go_on(tmp_path, hook, nth):
    whole = run(tmp_path / "whole")
    handler, ckpt = signal.getsignal(signal.SIGINT), tmp_path / "interrupted.ckpt"
    with pytest.raises(SystemExit):
        run(tmp_path / "first", [Interrupt(ckpt), Presses(hook, nth)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert re.match("StoppedError: the run was stopped by Ctrl-C behind", results(tmp_path / "first")["stopped"])
    assert difference(run(tmp_path / "second", ckpt=ckpt), whole) == []


@pytest.mark.parametrize(("number", "name"), [(2, "Ctrl-C"), (15, "SIGTERM"), (1, "SIGHUP")])
def test_a_signal_ends_training(tmp_path, number, name):
    ckpt, handler = tmp_path / "interrupted.ckpt", signal.getsignal(number)
    with pytest.raises(StoppedError, match=f"^the run was stopped by {name} behind mini-batch 5. .* ckpt={ckpt}$") as e:
        run(tmp_path, [Interrupt(ckpt), Presses("on_before_backward", 2, number=number)])
    assert e.value.code == 128 + number  # what a shell has
    assert signal.getsignal(number) == handler
    assert torch.load(ckpt, weights_only=True)["global_step"] == 5  # a stretch ends before validation
    assert results(tmp_path)["epochs"] == []


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    handler, ckpt, stepped = signal.getsignal(signal.SIGINT), tmp_path / "interrupted.ckpt", count()
    watch = Presses("on_before_zero_grad", 3, times=2)
    watch.on_after_backward = lambda *_: next(stepped)
    with pytest.raises(StoppedError, match=r"^the run was stopped by Ctrl-C$"), raising():
        run(tmp_path, [Interrupt(ckpt), watch])
    assert next(stepped) == 1  # mini-batches that were trained: there are two optimizers to erase for
    assert not ckpt.exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert results(tmp_path)["stopped"].startswith("StoppedError")


def test_what_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        ends = run(tmp_path, [Interrupt(tmp_path / "x"), Presses("on_before_backward", 2, number=signal.SIGHUP)])
        assert ends["step, epoch"] == (20, 2)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handler_of_ctrl_c_is_put_back(tmp_path):
    def mine(number, frame):
        raise AssertionError

    class Fails(Callback):
        def on_train_epoch_end(self, *_):
            assert signal.getsignal(signal.SIGINT) is not mine
            raise ZeroDivisionError

    before = signal.signal(signal.SIGINT, mine)
    try:
        run(tmp_path, [Interrupt(tmp_path / "x")])
        assert signal.getsignal(signal.SIGINT) is mine
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, [Interrupt(tmp_path / "x"), Fails()])
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_outside_the_main_thread_leaves_signals_alone(tmp_path):
    ends = []
    thread = threading.Thread(target=lambda: ends.append(run(tmp_path, [Interrupt(tmp_path / "x")])))
    thread.start()
    thread.join()
    assert ends[0]["step, epoch"] == (20, 2)

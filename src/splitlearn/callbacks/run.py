"""What goes with a run: the progress bar, results.json, and Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, TQDMProgressBar

from splitlearn.callbacks.layout_drawing import draw
from splitlearn.callbacks.tensorboard import has_many_alices
from splitlearn.costs.flops import clients
from splitlearn.errors import told_if_full
from splitlearn.learner import SplitLearner
from splitlearn.training.stopping import StoppedError, heeded, was_stopped_by


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, counting mini-batches and showing the epoch's mean loss so far."""

    content_with_stretches = True

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        # Lightning sets it where an epoch starts, and a resumed run may start in the middle of one.
        self.train_progress_bar.total = int(trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.fit_loop.batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if isinstance(pl_module, SplitLearner):
            self.print(f"Epoch {trainer.current_epoch} - Training loss: {pl_module.mean_loss}")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        if not isinstance(pl_module, SplitLearner) or math.isnan(pl_module.mean_loss):  # another party has it
            return metrics
        return {**metrics, "loss": f"{pl_module.mean_loss:.3f}"}


class Drawing(Callback):
    """Prints the layout before training: who owns what, and what crosses each cut in the precision of the run."""

    def on_fit_start(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        data = trainer.datamodule  # type: ignore[attr-defined]
        rows = trainer.precision_plugin.convert_input(data.sample())
        with trainer.precision_plugin.forward_context():
            # What other processes hold is on meta: of it only the shape is drawn.
            fields = {**learner.network.sample, **{name: field.to(learner.device) for name, field in rows.items()}}
            print(draw(learner.network, fields, data.batch_size, learner.schedule), flush=True)


class Results(Callback):
    """Keeps `results.json`: the epochs so far, the test, bytes and FLOPs of training, seconds. Survives a resume.

    Each epoch has its losses and metrics, and what they had cost by its end: all bytes of training; the FLOPs of all
    Alices together, and of the one that has computed most; seconds, steps.
    Written after every epoch, after training and the test, and when the run breaks off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.epochs: list[dict[str, Any]] = []
        self.validated: dict[str, float] = {}
        self.test: dict[str, float] = {}
        self.others: list[Callback] = []
        self.earlier = 0.0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.started

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.others = trainer.callbacks  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_fit_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        self.earlier, self.started = self.seconds, time.perf_counter()
        self.write(learner)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = _measured(trainer, "val/")

    def on_train_epoch_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        flops = clients(learner.meter.by_party())
        cost = {
            "bytes": sum(learner.ledger.num_bytes.values()),
            "client_flops": sum(flops),
            "client_flops_max": max(flops, default=0),
            "seconds": round(self.seconds, 3),
            "step": trainer.global_step,
            **_told(self.others, "epoch_costs"),
        }
        epoch = {"epoch": trainer.current_epoch, "train/loss": learner.mean_loss, **self.validated, **cost}
        self.epochs = [*self.epochs[: trainer.current_epoch], epoch]
        self.write(learner)

    def on_test_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        self.test = _measured(trainer, "test/")
        self.write(learner)

    def on_exception(self, trainer: pl.Trainer, learner: SplitLearner, exception: BaseException) -> None:  # type: ignore[override]
        self.write(learner, stopped=f"{type(exception).__name__}: {exception}")

    def write(self, learner: SplitLearner, **more: Any) -> None:
        flops = learner.meter.by_party()
        results = {
            "epochs": self.epochs,
            "test": self.test,
            "bytes": learner.ledger.table(),
            "evaluation_bytes": learner.evaluation_ledger.table(),
            "flops": {party: cost._asdict() for party, cost in flops.items()},
            "macs": {party: cost.macs for party, cost in flops.items()},
            "seconds": round(self.seconds, 3),
            **_told(self.others, "run_costs"),
            **more,
        }
        indent = None if has_many_alices(learner) else 2  # with it, a thousand Alices' tables take Python a second
        write_whole(self.path, json.dumps(_finite(results), indent=indent, allow_nan=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "validated": self.validated, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs, self.validated = state_dict["epochs"], state_dict["validated"]
        self.earlier = state_dict["seconds"]


class Interrupt(Callback):
    """Ctrl-C, SIGTERM or SIGHUP ends the stretch or the validation at hand, saves a checkpoint and stops.

    A second one stops at once.

    Without this, one party's optimizer would have stepped and another's not.
    """

    content_with_stretches = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.asked: int | None = None  # the number of the signal
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.asked = None
        if threading.current_thread() is threading.main_thread():  # no other may listen to signals
            self.before = {number: signal.signal(number, self._ask) for number in heeded()}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(trainer)
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._restore()

    def _stop(self, trainer: pl.Trainer) -> None:
        if self.asked is not None:
            trainer.save_checkpoint(self.path)
            where = f"behind mini-batch {trainer.global_step}"
            cure = f"To go on from there, resume with ckpt={self.path}"
            raise StoppedError(self.asked, f"the run {was_stopped_by(self.asked)} {where}. {cure}")

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def write_whole(path: Path, text: str) -> None:
    """Under another name first: nobody reads half of a file, and who dies in the middle leaves the old one."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with told_if_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text)
        unfinished.replace(path)


def _measured(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def _told(others: Sequence[Callback], what: str) -> dict[str, Any]:
    """What other callbacks, such as `splitlearn.callbacks.link_seconds`, have for results.json."""
    told = (getattr(callback, what)() for callback in others if hasattr(callback, what))
    return {name: value for each in told for name, value in each.items()}


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null stands for what is not a number."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a run leaves in results.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from splitlearn.callbacks.tensorboard import has_many_alices
from splitlearn.costs.flops import clients
from splitlearn.errors import told_if_full
from splitlearn.learner import SplitLearner
from splitlearn.saved.folder import write_whole


class Results(Callback):
    """Keeps `results.json`: the epochs so far, the test, bytes and FLOPs of training, seconds. Survives a resume.

    `final_bytes` are those of the weights that were handed out at the end, if any were.

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
        self.begun = False
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.started

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.others = trainer.callbacks  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begun, self.started = True, time.perf_counter()

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
        if self.begun or not self.path.exists():  # else they are of the run that could not be gone on from
            self.write(learner, stopped=f"{type(exception).__name__}: {exception}")

    def write(self, learner: SplitLearner, **more: Any) -> None:
        flops = learner.meter.by_party()
        results = {
            "epochs": self.epochs,
            "test": self.test,
            "bytes": learner.ledger.table(),
            "evaluation_bytes": learner.evaluation_ledger.table(),
            **({"final_bytes": learner.final_ledger.table()} if learner.final_ledger.num_bytes else {}),
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


def forget(folder: str | Path, ckpt: str | None) -> None:
    """Remove the results of an earlier run into the same folder, unless that run is gone on with."""
    kept = Path(folder).resolve() / "results.json"
    if ckpt is None or not Path(ckpt).resolve().is_relative_to(kept.parent):
        with told_if_full(kept):
            kept.unlink(missing_ok=True)


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

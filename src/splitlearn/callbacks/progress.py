"""The terminal: the layout before training, and the progress bar."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm

from splitlearn.callbacks.layout_drawing import show
from splitlearn.learner import SplitLearner


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, counting mini-batches and showing the epoch's mean loss so far."""

    content_with_stretches = True

    # A bar of one batch is full at once, and only flickers.

    def init_validation_tqdm(self) -> Tqdm:
        return super().init_validation_tqdm() if sum(self.trainer.num_val_batches) > 1 else Tqdm(disable=True)

    def init_test_tqdm(self) -> Tqdm:
        return super().init_test_tqdm() if sum(self.trainer.num_test_batches) > 1 else Tqdm(disable=True)

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
    """Prints the layout before training: who owns what, what crosses each cut in the run's precision, the classes."""

    def on_fit_start(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        data = trainer.datamodule  # type: ignore[attr-defined]
        rows = trainer.precision_plugin.convert_input(data.sample())
        with trainer.precision_plugin.forward_context():
            # What other processes hold is on meta: of it only the shape is drawn.
            fields = {**learner.network.sample, **{name: field.to(learner.device) for name, field in rows.items()}}
            show(learner, data, fields)

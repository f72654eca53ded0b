"""The simulator: this process plays every party."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from splitlearn.data import SplitData
from splitlearn.errors import InputError
from splitlearn.learner import SplitLearner


class SafeCheckpointIO(TorchCheckpointIO):
    """Loads tensors and plain values only: a checkpoint that somebody sent can run no code here."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Under another name first: a process that dies in the middle leaves no half of a file."""
        unfinished = Path(f"{path}.tmp")
        super().save_checkpoint(checkpoint, unfinished, storage_options)
        os.replace(unfinished, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        try:
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises is up to its bytes
            raise InputError(f"`ckpt` (={path}) cannot be read ({type(error).__name__}): take another one") from error
        if "splitlearn" not in checkpoint:
            raise InputError(f"`ckpt` (={path}) was not saved by splitlearn: take a file of a run's checkpoints folder")
        return checkpoint


class Simulated:
    """Trains and tests in this process; its wire carries from one party to the other in memory."""

    def run(self, trainer: pl.Trainer, learner: SplitLearner, data: SplitData, ckpt: str | None) -> dict[str, float]:
        """Fit, from `ckpt` on if it is given, and test; return the last value of every metric."""
        trainer.fit(learner, datamodule=data, ckpt_path=ckpt)
        metrics = dict(trainer.callback_metrics)
        trainer.test(learner, datamodule=data, verbose=False)
        return {name: float(value) for name, value in {**metrics, **trainer.callback_metrics}.items()}

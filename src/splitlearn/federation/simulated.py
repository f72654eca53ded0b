"""The simulator: this process plays every party."""

from __future__ import annotations

import pytorch_lightning as pl

from splitlearn.data import SplitData
from splitlearn.learner import SplitLearner
from splitlearn.training.checkpoints import tested


class Simulated:
    """Trains and tests in this process; its wire carries from one party to the other in memory."""

    def run(
        self, trainer: pl.Trainer, learner: SplitLearner, data: SplitData, ckpt: str | None, test: str = "last"
    ) -> dict[str, float]:
        """Fit, from `ckpt` on if it is given, and test the `last` weights or the `best`.

        Returns the last value of every metric.
        """
        trainer.fit(learner, datamodule=data, ckpt_path=ckpt)
        metrics = dict(trainer.callback_metrics)
        trainer.test(learner, datamodule=data, ckpt_path=tested(trainer, test), verbose=False)
        return {name: float(value) for name, value in {**metrics, **trainer.callback_metrics}.items()}

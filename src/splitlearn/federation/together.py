"""What the processes of a run tell each other at the end of an epoch, and what each party spends its time on."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn

from splitlearn.federation.remote_wire import RemoteWire
from splitlearn.layout import Party
from splitlearn.learner import SplitLearner


class Together(Callback):
    """Tells all the epoch's loss and everybody's bytes and seconds. First of the callbacks, so that others know them.

    Logs `seconds/computing/PARTY`, `seconds/waiting/PARTY` and `seconds/wire/PARTY`, of training so far.

    Arguments:
        wire: this party's.
        gone: the Alices who are left out.
    """

    content_with_stretches = True

    def __init__(self, wire: RemoteWire, gone: Collection[Party] = ()) -> None:
        self.wire, self.gone = wire, list(gone)
        self.parties: dict[Party, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}  # by the end of the last epoch
        self.earlier: dict[str, float] = {}  # before a resume

    def on_fit_start(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        learner.rounds.leave_out(self.gone)

    def on_train_start(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        self.began, self.wire.seconds = time.perf_counter(), dict.fromkeys(self.wire.seconds, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._spent(), "overhead": dict(self.wire.overhead)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier = state_dict["seconds"]
        self.wire.overhead.update(state_dict["overhead"])

    def on_validation_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        if trainer.state.fn == TrainerFn.FITTING:
            self._tell(learner)  # so that all draw the accuracy over the same bytes

    def on_train_epoch_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        self.seconds = self._spent()
        self._tell(learner)
        holder = learner.layout.stages[-1].role
        learner.epoch_loss.sums = self.wire.gather_by_alice(learner.epoch_loss.sums, holder)
        scalars = {
            f"seconds/{what}/{party}": seconds
            for party, account in self.parties.items()
            for what, seconds in account["seconds"].items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    def on_test_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        self._tell(learner)

    def epoch_costs(self) -> dict[str, Any]:
        """What results.json has of it for each epoch."""
        return {"party_seconds": {party: account["seconds"] for party, account in self.parties.items()}}

    def run_costs(self) -> dict[str, Any]:
        """What results.json has of it at the top."""
        return {"parties": self.parties, **({"left_out": self.gone} if self.gone else {})}

    def _spent(self) -> dict[str, float]:
        seconds = {"computing": time.perf_counter() - self.began - sum(self.wire.seconds.values()), **self.wire.seconds}
        return {what: round(self.earlier.get(what, 0.0) + value, 3) for what, value in seconds.items()}

    def _tell(self, learner: SplitLearner) -> None:
        wire = self.wire
        learner.rounds.receive_pending()  # nothing else may be under way when notes are told
        ledgers = (learner.ledger, learner.evaluation_ledger, learner.final_ledger)
        own = {"seconds": self.seconds, "overhead_bytes": dict(wire.overhead)}
        gathered = wire.gather({"own": own, "tables": [ledger.table() for ledger in ledgers]})
        for party, each in zip(wire.parties, gathered, strict=True):
            self.parties[party] = each["own"]
            for ledger, table in zip(ledgers, each["tables"], strict=True):
                ledger.hear(table, party, wire.party)

"""How long the messages of a run would take over a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import nn

from splitlearn.costs.link import Link
from splitlearn.costs.timeline import Diary, Exchange, Timeline, in_rounds
from splitlearn.data.loader import Turns
from splitlearn.layout import Party, Role
from splitlearn.learner import SplitLearner
from splitlearn.network import Batch
from splitlearn.schedules.sharing import Handoff, Shared
from splitlearn.training.pace import Stretch


class LinkSeconds(Callback):
    """Predicts the seconds that the messages of training would take over a link; to compute takes none.

    Plays every message that the ledger counts over the link, see `costs.timeline`, and at the end of each epoch logs
    `link/seconds`, of training so far. A resumed run goes on with what was predicted, even over another link.

    Arguments:
        link: None predicts nothing, and costs nothing.
    """

    content_with_stretches = True

    def __init__(self, link: Link | None = None) -> None:
        self.link = link
        self.diary = Diary()
        self.seconds = self.ended = 0.0  # so far, and of the rounds that have ended

    def setup(self, trainer: pl.Trainer, learner: SplitLearner, stage: str) -> None:  # type: ignore[override]
        if self.link is not None:
            self.learner, self.timeline = learner, _timeline(self.link, learner)
            learner.ledger.diary = self.diary.write
            self.hook = learner.network.register_forward_pre_hook(self._begin)

    def teardown(self, trainer: pl.Trainer, learner: SplitLearner, stage: str) -> None:  # type: ignore[override]
        if self.link is not None:
            learner.ledger.diary = None
            self.hook.remove()

    def on_train_batch_start(self, trainer: pl.Trainer, learner: Any, batch: Stretch[Turns], batch_idx: int) -> None:
        self.stretch = batch

    def on_train_epoch_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        if self.link is not None:
            *ended, self.diary.exchanges = in_rounds(self.diary.exchanges)
            self.ended += sum(map(self.timeline.seconds, ended))
            self.seconds = self.ended + self.timeline.seconds(self.diary.exchanges)
            learner.log("link/seconds", self.seconds)

    def epoch_costs(self) -> dict[str, float]:
        """What an epoch in results.json has of it."""
        return {} if self.link is None else {"link_seconds": self.seconds}

    def run_costs(self) -> dict[str, Any]:
        """What results.json has of it at the top."""
        if self.link is None:
            return {}
        steps = self.learner.trainer.global_step
        per_step = {"seconds": self.seconds, "seconds_per_step": self.seconds / steps if steps else 0.0}
        return {"link": {**per_step, **self.link.settings}}

    def state_dict(self) -> dict[str, Any]:
        if self.link is None:
            return {}
        exchanges = [list(exchange) for exchange in self.diary.exchanges]
        return {"seconds": self.seconds, "ended": self.ended, "exchanges": exchanges}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.ended = state_dict["seconds"], state_dict["ended"]
        self.diary.exchanges = [Exchange(*fields) for fields in state_dict["exchanges"]]

    def _begin(self, network: nn.Module, inputs: tuple[Batch, Mapping[Role, Party]]) -> None:
        """The network is about to run a mini-batch."""
        batch, cast = inputs
        if network.training:
            turns = self.stretch.at_hand
            last = batch is next(reversed(turns.batches.values()))
            ends_round = turns.ends_round or self.learner.pace.left == 0
            self.diary.begin(cast.get("alice", "alices"), last and ends_round)


def _timeline(link: Link, learner: SplitLearner) -> Timeline:
    schedule = learner.schedule
    serial = isinstance(schedule.alice, Handoff | Shared)
    others = [role for role in learner.layout.roles if role != "alice"]
    return Timeline(link, serial, others if isinstance(schedule.bob, Shared) else ())

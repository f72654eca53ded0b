"""How well each Alice is served, and what the network forgets from one Alice to the next."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from splitlearn.layout import Party
from splitlearn.learner import SplitLearner
from splitlearn.segment import evaluating
from splitlearn.training.accuracy import FEW, AccuracyByOwner, judged

LASTING_AN_EPOCH = ("val/accuracy_after/", "val/performance_gap")  # Lightning itself keeps metrics for ever


class PerAlice(Callback):
    """Judges by Alice: on her own rows, and on all validation rows as she leaves the network to the next.

    With the validation, and the test where its rows have owners, logs `val/accuracy/alice3` on the rows that are hers,
    and `val/accuracy_worst`, the lowest of all Alices. Whenever an Alice has had her last mini-batch of the epoch, the
    network goes through all validation rows: `val/accuracy_after/alice3`, and `val/performance_gap`, the mean over the
    labels of the largest accuracy lost between an Alice and a later one, in [0, 1] (after Tirana et al. 2025, arXiv
    2511.09736). What crosses for it counts as evaluation.

    Arguments:
        most: of more Alices so many are judged, at least 2, evenly spread over the order, first and last among them.
    """

    content_with_stretches = True

    def __init__(self, most: int = FEW) -> None:
        if most < 2:
            raise ValueError(
                f"`callbacks.per_alice.most` (={most}) must be at least 2; ~callbacks.per_alice judges nobody"
            )
        self.most = most
        self.epoch = -1
        self.chosen: list[Party] = []
        self.by_label: dict[Party, Tensor] = {}
        self.by_owner: AccuracyByOwner | None = None
        self.last: tuple[int, Tensor] | None = None  # Alices who finish in one step leave one network

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name in [name for name in trainer.callback_metrics if name.startswith(LASTING_AN_EPOCH)]:
            del trainer.callback_metrics[name]

    def on_alice_finished(self, trainer: pl.Trainer, learner: SplitLearner, alice: Party) -> None:
        every, epoch = trainer.check_val_every_n_epoch, trainer.current_epoch
        if len(learner.schedule.takers) == 1 or (every and (epoch + 1) % every):
            return
        if epoch != self.epoch:
            self.epoch, self.by_label = epoch, {}
            self.chosen = _spread(learner.schedule.participants(learner.pace.epoch), self.most)
        if alice not in self.chosen:
            return
        if self.last is None or self.last[0] != trainer.global_step or learner.rounds.personal:
            self.last = trainer.global_step, _count(trainer, learner, alice)
        self.by_label[alice] = self.last[1]

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, learner: SplitLearner, outputs: list[dict[str, Tensor]], *_: Any
    ) -> None:
        self.by_owner = self.by_owner or AccuracyByOwner(learner.schedule.takers, learner.means.ignore_index)
        for part in outputs or []:  # none where another party holds the loss
            if part["owners"] is not None:
                self.by_owner.update(**part)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_epoch_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        self._log_by_owner(learner, "val")
        if trainer.current_epoch != self.epoch or set(self.by_label) != set(self.chosen) or trainer.sanity_checking:
            return
        counts = {alice: counts.tolist() for alice, counts in self.by_label.items()}
        told = learner.network.wire.gather_held(counts, learner.layout.stages[-1].role)
        by_label = {alice: torch.tensor([each[alice] for each in told]).sum(0) for alice in self.by_label}
        for alice, (correct, total) in by_label.items():
            learner.log(f"val/accuracy_after/{alice}", correct.sum() / total.sum())
        learner.log("val/performance_gap", performance_gap(torch.stack(list(by_label.values()))))

    def on_test_epoch_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        self._log_by_owner(learner, "test")

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "chosen": self.chosen, "by_label": self.by_label}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.chosen, self.by_label = (state_dict[name] for name in ("epoch", "chosen", "by_label"))

    def _log_by_owner(self, learner: SplitLearner, stage: str) -> None:
        if self.by_owner is not None:
            holder = learner.layout.stages[-1].role
            self.by_owner.load(learner.network.wire.gather_held(self.by_owner.counts(), holder))
            learner.log_dict({f"{stage}/accuracy{name}": value for name, value in self.by_owner.compute().items()})
        self.by_owner = None


def performance_gap(counts: Tensor) -> Tensor:
    """`counts` [Alices, 2, labels] are correct rows and all rows, one Alice after the other; return a scalar."""
    accuracy = counts[:, 0] / counts[:, 1].clamp(min=1)
    best_before = accuracy.cummax(dim=0).values
    lost = (best_before - accuracy).amax(dim=0)
    return lost[counts[0, 1] > 0].mean()


@torch.no_grad()
def _count(trainer: pl.Trainer, learner: SplitLearner, alice: Party) -> Tensor:
    """Return, by label, the validation rows that are classified correctly and all that count: [2, labels]."""
    network, num_labels = learner.network, learner.num_classes
    counts = torch.zeros(2, num_labels, dtype=torch.int64)
    loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    network.wire.ledger = learner.evaluation_ledger
    try:
        with evaluating(network), learner.rounds.as_of(alice):
            for batch in islice(loader, _limit(trainer, len(loader))):
                output, labels, _ = network(batch, learner.layout.cast(alice))
                if output.is_meta:  # another party counts
                    continue
                rows = judged(output, labels, learner.means.ignore_index)
                counts += torch.stack([torch.bincount(labels[some], minlength=num_labels) for some in rows]).cpu()
    finally:
        network.wire.ledger = learner.ledger
    torch.clear_autocast_cache()  # what it keeps was made without a graph
    return counts


def _limit(trainer: pl.Trainer, num_batches: int) -> int:
    limit = trainer.limit_val_batches
    return min(limit, num_batches) if isinstance(limit, int) else int(limit * num_batches)


def _spread(parties: list[Party], most: int) -> list[Party]:
    if len(parties) <= most:
        return parties
    return [parties[round(i * (len(parties) - 1) / (most - 1))] for i in range(most)]

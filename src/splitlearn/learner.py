"""The one LightningModule: every scheme trains through this step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from splitlearn.checks import check_loss, check_precision, check_settings
from splitlearn.data.loader import Turns
from splitlearn.errors import DivergedError, InputError
from splitlearn.flops import Meter
from splitlearn.layout import Party, Role
from splitlearn.ledger import Ledger
from splitlearn.network import Batch, SplitNetwork
from splitlearn.optimizers import MakeOptimizer, Stepper, by_role
from splitlearn.pace import Pace, Stretch, go_on
from splitlearn.rounds import Rounds
from splitlearn.schedule import Schedule

CURE = "lower `optimizer.lr` or set `trainer.gradient_clip_val`"


class SplitLearner(pl.LightningModule):
    """Trains a split network, turn by turn, with one optimizer per role.

    Arguments:
        network: the split network; its layout says who holds what.
        schedule: whose turn it is, and what happens to weights between turns.
        optimizer: parameters to optimizer, e.g. `partial(torch.optim.SGD, lr=0.1)`; `optimizers` overrides it by role.
        loss: (output, labels) to the mean over the rows; NLLLoss takes log-probabilities, CrossEntropyLoss logits.
        num_classes: of the labels.
        scheduler: optimizer to learning-rate scheduler; `interval` (epoch or step) and `monitor` as in Lightning.
        gradient_clip_val, gradient_clip_algorithm: as Lightning's Trainer has them, for each role by itself: no party
            sees another's gradients.
        steps_per_execution: the most mini-batches that run before Lightning looks again, see `splitlearn.pace`.

    Raises ValueError for an optimizer that does not take its options, and for a loss that does not fit the output.
    """

    automatic_optimization = False

    def __init__(
        self,
        network: SplitNetwork,
        schedule: Schedule,
        optimizer: MakeOptimizer,
        loss: nn.Module,
        num_classes: int,
        optimizers: Mapping[Role, MakeOptimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        interval: str = "epoch",
        monitor: str = "val/loss",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        steps_per_execution: int = 100,
    ) -> None:
        super().__init__()
        check_settings(interval, gradient_clip_val, steps_per_execution)
        check_loss(loss, network.sample_output, num_classes)
        self.network, self.layout, self.schedule, self.loss = network, network.layout, schedule, loss
        self.rounds = Rounds(schedule, network)
        self.makers = by_role(network, optimizer, optimizers or {}, scheduler)
        made = {role: make(network.parameters_of(role)) for role, make in self.makers.items()}
        self.options = ", ".join(f"{role}: {_options(optimizer)}" for role, optimizer in made.items())
        self.scheduler, self.interval, self.monitor = scheduler, interval, monitor
        self.clip = {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": gradient_clip_algorithm}
        self.steps_per_execution = steps_per_execution
        self.ledger, self.evaluation_ledger = network.wire.ledger, Ledger()
        self.meter = Meter(network, self.ledger)
        # Only the holder of the loss computes metrics; one that syncs by itself would wait for the other parties.
        self.accuracy = MulticlassAccuracy(num_classes, average="micro", sync_on_compute=False)
        self.loss_sum, self.num_rows, self.last_loss = 0.0, 0, math.nan
        self.measured: dict[str, Tensor] = {}  # what a checkpoint knew of `trainer.callback_metrics`

    def training_step(self, stretch: Stretch[Turns], batch_idx: int) -> None:
        losses = []
        for turns in self.pace.run(stretch):
            for alice, batch in turns.batches.items():
                with self.turn(alice, batch):
                    output, labels, tape = self.network(batch, self.layout.cast(alice))
                    loss = self.loss(output, labels)
                    self.network.backward(self.stepper.before_backward(loss), tape)
                losses.append((alice, batch, loss.detach()))
            self._end_step(turns)
        self._add_up(losses)

    @contextmanager
    def turn(self, alice: Party, batch: Batch) -> Iterator[None]:
        """Before, the weights come to her, if it was another's turn; after, optimizers step that need not wait."""
        self.rounds.take(alice)
        self.stepper.zero_grad()
        yield
        self.rounds.num_rows += len(batch.ids)
        self.ledger.add_pass(alice, len(batch.ids))
        self.stepper.after_backward()
        self.stepper.step(self.rounds.at_once)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor | None]:
        return self._evaluate(batch, "test")

    @property
    def mean_loss(self) -> float:
        """The mean training loss over the rows of this epoch so far."""
        return self.loss_sum / self.num_rows if self.num_rows else math.nan

    @property
    def kind(self) -> dict[str, str]:
        """What a checkpoint must share with the run that goes on from it."""
        blocks = [block for segment in self.network.segments.values() for block in segment.named_children()]
        return {
            "layout": self.layout.describe(),
            "model": ", ".join(f"{name} of {sum(p.numel() for p in block.parameters())}" for name, block in blocks),
            "optimizer": self.options,
            "num_alices": str(len(self.schedule.takers)),
            "schedule": self.schedule.describe(),
            "data": getattr(self.trainer.datamodule, "kind", "unknown"),  # type: ignore[attr-defined]
        }

    def configure_optimizers(self) -> list[dict[str, Any]]:  # type: ignore[override]
        configs: list[dict[str, Any]] = []
        for role, make in self.makers.items():
            optimizer = make(self.network.parameters_of(role))
            configs.append({"optimizer": optimizer})
            if self.scheduler is not None:
                scheduler = {"scheduler": self.scheduler(optimizer), "name": f"lr/{role}"}
                configs[-1]["lr_scheduler"] = {**scheduler, "interval": self.interval}
        return configs

    def setup(self, stage: str) -> None:
        self.pace = Pace(self.trainer, self.steps_per_execution)
        if self.schedule.num_participants < len(self.schedule.takers):
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined] # lengths of epochs vary

    def on_train_start(self) -> None:
        self.trainer.callback_metrics.update(self.measured)
        self.stepper = Stepper(self, self.makers, self.clip, self.monitor)
        self.rounds.find(self.stepper.optimizers)
        self.judges = [c for c in self.trainer.callbacks if hasattr(c, "on_alice_finished")]  # type: ignore[attr-defined]
        check_precision(self.stepper.scaler, self.rounds.deferred, self.rounds.at_once)

    def on_train_epoch_start(self) -> None:
        self.loss_sum, self.num_rows = 0.0, 0

    def on_train_epoch_end(self) -> None:
        self.log("train/loss", self.mean_loss)
        if self.pace.left == 0:  # and no limit broke the epoch off
            self.stepper.step_schedulers("epoch")

    def on_train_end(self) -> None:
        if self.rounds.halfway:
            rank_zero_warn("training stopped in the middle of a round: what is evaluated are the weights of its start")

    def on_validation_start(self) -> None:
        self.network.wire.ledger = self.evaluation_ledger
        self.rounds.find()
        self.rounds.show()

    def on_validation_epoch_end(self) -> None:
        self.rounds.hide()  # here, since a checkpoint may be saved in the callbacks' on_validation_end
        self.network.wire.ledger = self.ledger

    on_test_start, on_test_epoch_end = on_validation_start, on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters()):
            raise DivergedError(f"weights are not finite after {self.trainer.global_step} mini-batches: {CURE}")
        checkpoint["splitlearn"] = {
            "kind": self.kind,
            "rounds": self.rounds.state_dict(),
            "bytes": [self.ledger.table(), self.evaluation_ledger.table()],
            "passes": dict(self.ledger.passes),
            "loss": [self.loss_sum, self.num_rows],
            "measured": dict(self.trainer.callback_metrics),
            "left": self.pace.left,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("splitlearn", {"kind": {"layout": "a model that splitlearn did not train"}})
        for what, ours in self.kind.items():
            theirs = state["kind"].get(what)
            if theirs != ours:
                raise InputError(
                    f"`ckpt` is of another {what}: {theirs}, this run has {ours}: "
                    f"resume with the {what} of the checkpoint, or train anew without `ckpt`"
                )
        self.rounds.load_state_dict(state["rounds"])
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._go_on(state, checkpoint["loops"]["fit_loop"])

    def _go_on(self, state: dict[str, Any], fit_loop: dict[str, Any]) -> None:
        self.ledger.load(state["bytes"][0])
        self.evaluation_ledger.load(state["bytes"][1])
        self.loss_sum, self.num_rows = state["loss"]
        self.ledger.passes, self.measured = state["passes"], state["measured"]
        go_on(fit_loop, state["left"])

    def _end_step(self, turns: Turns) -> None:
        if self.schedule.turn != "step":  # while the weights are still hers
            self._tell_finished(turns)
        if turns.ends_round or self.pace.left == 0:
            self.rounds.end()
            self.stepper.step(self.rounds.deferred)
        if self.schedule.turn == "step":
            self._tell_finished(turns)
        self.stepper.step_schedulers("step")

    def _tell_finished(self, turns: Turns) -> None:
        for judge, alice in product(self.judges, turns.finishes):
            judge.on_alice_finished(self.trainer, self, alice)

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Tensor | None]:
        output, labels, owners = self.rounds.predict(batch)
        loss = self.loss(output, labels)
        if not torch.isfinite(loss):
            raise DivergedError(f"{stage}/loss is {loss.item()} after {self.trainer.global_step} mini-batches: {CURE}")
        self.accuracy(output, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), prog_bar=True)
        self.log(f"{stage}/accuracy", self.accuracy, prog_bar=True, on_epoch=True, on_step=False)
        return {"output": output, "labels": labels, "owners": owners}

    def _add_up(self, losses: list[tuple[Party, Batch, Tensor]]) -> None:
        """Look at the losses of a stretch, all at once: on a GPU each look waits for it."""
        values = torch.stack([loss for *_, loss in losses]).tolist()
        for (alice, batch, _), value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise DivergedError(
                    f"the loss is {value} in the turn of {alice} at epoch {batch.number[0]}, mini-batch "
                    f"{batch.number[1]}: {CURE}"
                )
            self.loss_sum += value * len(batch.ids)
            self.num_rows += len(batch.ids)
        self.last_loss = values[-1]


def _options(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__name__}({', '.join(f'{name}={value}' for name, value in optimizer.defaults.items())})"

"""The one LightningModule: every scheme trains through this step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product, zip_longest
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import DoublePrecision
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from splitlearn.costs.flops import Meter
from splitlearn.data.loader import Turns
from splitlearn.layout import Party, Role
from splitlearn.ledger import Ledger
from splitlearn.network import Batch, Pass, SplitNetwork, micro
from splitlearn.schedules.rounds import Rounds
from splitlearn.schedules.schedule import Schedule
from splitlearn.training.checkpoints import restore_callbacks
from splitlearn.training.checks import (
    check_accumulation,
    check_kind,
    check_loss,
    check_loss_trains_nothing,
    check_precision,
    check_settings,
    described,
    warn_of_raw_rows,
)
from splitlearn.training.evaluation import Evaluation, Part, Prediction
from splitlearn.training.finite import cause, check_finite, explained
from splitlearn.training.losses import MeanLoss
from splitlearn.training.metrics import EpochLoss
from splitlearn.training.optimizers import MakeOptimizer, Stepper, by_role, check_callbacks, check_held, options_of
from splitlearn.training.pace import Pace, Stretch
from splitlearn.training.run_state import restore, state_of

SETTINGS = ("precision", "limit_train_batches", "overfit_batches")  # of the trainer, that change what is computed


class SplitLearner(pl.LightningModule):
    """Trains a split network, turn by turn, with one optimizer per role.

    Arguments:
        network: the split network; its layout says who holds what.
        schedule: whose turn it is, and what happens to weights between turns.
        optimizer: parameters to optimizer, e.g. `partial(torch.optim.SGD, lr=0.1)`; `optimizers` overrides it by role.
        loss: (output, labels) to the mean over the rows; NLLLoss takes log-probabilities, CrossEntropyLoss logits.
        num_classes: of the labels; None: as many as the network has outputs.
        scheduler: optimizer to learning-rate scheduler; `interval` (epoch or step) and `monitor` as in Lightning.
        gradient_clip_val, gradient_clip_algorithm: as Lightning's Trainer has them, for each role by itself: no party
            sees another's gradients.
        steps_per_execution: the most mini-batches that run before Lightning looks again, see `training.pace`.
        accumulate_grad_batches: mini-batches whose gradients add up before the optimizers step, as in Lightning, and at
            the end of a turn and of an epoch what is left of them; `global_step` counts mini-batches all the same.
        micro_batches: parts of a mini-batch that go through the network one behind the other, so that parties compute
            at the same time (GPipe: Huang et al. 2019, arXiv 1811.06965); the gradients are those of the mini-batch.

    Raises ValueError for an optimizer that does not take its options, and for a loss that does not fit the output.
    """

    automatic_optimization = False

    def __init__(
        self,
        network: SplitNetwork,
        schedule: Schedule,
        optimizer: MakeOptimizer,
        loss: nn.Module,
        num_classes: int | None = None,
        optimizers: Mapping[Role, MakeOptimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        interval: str = "epoch",
        monitor: str = "val/loss",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        steps_per_execution: int = 100,
        micro_batches: int = 1,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__()
        check_settings(interval, gradient_clip_val, steps_per_execution, micro_batches)
        check_accumulation(accumulate_grad_batches, schedule.turn)
        num_classes = network.sample_output.shape[-1] if num_classes is None else num_classes
        holds = network.wire.hosts(network.layout.stages[-1].role)
        draws = check_loss(loss, network.sample_output, num_classes, holds)
        check_loss_trains_nothing(loss, network)
        warn_of_raw_rows(network)
        self.network, self.layout, self.schedule, self.loss = network, network.layout, schedule, loss
        self.means = MeanLoss(loss, schedule, self.layout, micro_batches, network.seed if draws else None)
        self.rounds = Rounds(schedule, network)
        self.makers = by_role(network, optimizer, optimizers or {}, scheduler)
        made = {role: make(network.parameters_of(role)) for role, make in self.makers.items()}
        self.options = options_of(made)
        self.described = {"loss": described(loss), "scheduler": described(scheduler)}
        self.scheduler, self.interval, self.monitor = scheduler, interval, monitor
        self.clip = {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": gradient_clip_algorithm}
        self.steps_per_execution = steps_per_execution
        self.ledger, self.evaluation = network.wire.ledger, Evaluation(network, self.rounds, self.means)
        self.final_ledger = Ledger()  # of the weights that are handed out at the end
        self.meter = Meter(network, self.ledger)
        self.num_classes, self.micro_batches = num_classes, micro_batches
        self.accumulate = accumulate_grad_batches
        self.accumulated: dict[str, Any] = {}  # what a checkpoint knew of gradients that no optimizer had taken
        self.epoch_loss = EpochLoss(self._cause)
        self.measured: dict[str, Tensor] = {}  # what a checkpoint knew of `trainer.callback_metrics`

    def training_step(self, stretch: Stretch[Turns], batch_idx: int) -> None:
        for turns in self.pace.run(stretch):
            for alice, batch in self.rounds.present(turns.batches):
                with self.turn(alice, batch):  # the weights come to her before, optimizers step after
                    self._pass(alice, batch)
            self._end_step(turns)  # at the end of a round: means of weights or gradients
        self.epoch_loss.look()

    @contextmanager
    def turn(self, alice: Party, batch: Batch) -> Iterator[None]:
        """Before, the weights come to her, if it was another's turn; after, optimizers step that need not wait."""
        self.rounds.begin_turn(alice)
        self.stepper.zero_grad()
        with explained(self.network, batch, alice, self.micro_batches):
            yield
        self.rounds.num_rows += len(batch.ids)
        self.ledger.add_pass(alice, len(batch.ids))
        self.stepper.after_backward()
        self.stepper.waiting += 1
        if self.stepper.waiting == self.accumulate:
            self._step_at_once()

    def validation_step(self, batch: Batch, batch_idx: int) -> list[Part]:  # type: ignore[override]
        return self.evaluation.step(batch, "val", self.trainer.global_step)

    def test_step(self, batch: Batch, batch_idx: int) -> list[Part]:  # type: ignore[override]
        return self.evaluation.step(batch, "test", self.trainer.global_step)

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        return self.evaluation.predict(batch)

    @property
    def evaluation_ledger(self) -> Ledger:
        return self.evaluation.ledger

    @property
    def mean_loss(self) -> float:
        return self.epoch_loss.mean

    def kind(self, data: object) -> dict[str, str]:
        """What each process must share with the others, and a checkpoint with the run that tests it."""
        return {
            "layout": self.layout.describe(),
            "model": self.network.describe(),
            "num_alices": str(len(self.schedule.takers)),
            "schedule": self.schedule.describe(),
            "data": getattr(data, "kind", "unknown"),
        }

    def settings(self, data: object) -> dict[str, str]:
        """All that decides what is computed, which a checkpoint must share with the run that goes on from it."""
        kind, trainer = self.kind(data), self.trainer
        followed = {"scheduler.interval": self.interval, "scheduler.monitor": self.monitor} if self.scheduler else {}
        settings = {
            **{name: kind[name] for name in ("layout", "model", "num_alices")},
            **{f"model.{name}": text for name, text in self.network.texts.items()},
            "freeze": ", ".join(self.network.frozen) or "nothing",
            **self.options,
            **{f"schedule.{name}": value for name, value in self.schedule.settings.items()},
            "schedule.seed": self.schedule.seed,
            "model.seed": self.network.seed,
            **self.described,
            **followed,
            **{f"trainer.{name}": value for name, value in self.clip.items()},
            "trainer.accumulate_grad_batches": self.accumulate,
            "micro_batches": self.micro_batches,
            **{f"trainer.{name}": getattr(trainer, name) for name in SETTINGS},
            **getattr(data, "settings", {}),
        }
        return {name: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for name, value in settings.items()}  # of functions

    def configure_optimizers(self) -> list[dict[str, Any]]:  # type: ignore[override]
        configs: list[dict[str, Any]] = []
        for role, make in self.makers.items():
            optimizer = make(self.network.parameters_of(role))
            configs.append({"optimizer": optimizer})
            if self.scheduler is not None:
                scheduler = {"scheduler": self.scheduler(optimizer), "name": f"lr/{role}"}
                configs[-1]["lr_scheduler"] = {**scheduler, "interval": self.interval}
        return configs

    def configure_callbacks(self) -> list[Callback]:
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined] # before they set anything up
        return []

    def setup(self, stage: str) -> None:
        self.pace = Pace(self.trainer, self.steps_per_execution)
        if self.schedule.num_participants < len(self.schedule.takers):
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined] # lengths of epochs vary

    def on_train_start(self) -> None:
        self.trainer.callback_metrics.update(self.measured)
        self.stepper = Stepper(self, self.makers, self.clip, self.monitor, self.accumulate)
        self.rounds.begin(self.stepper.optimizers)
        self.stepper.waiting = self.accumulated.get("waiting", 0)
        self.rounds.load_gradients(self.accumulated.get("gradients", {}))
        self.judges = [c for c in self.trainer.callbacks if hasattr(c, "on_alice_finished")]  # type: ignore[attr-defined]
        check_precision(self.stepper.scaler, self.rounds.deferred, self.rounds.at_once)

    def on_train_epoch_start(self) -> None:
        self.epoch_loss = EpochLoss(self._cause)
        self.rounds.find()  # a callback may just have unfrozen some, for which a schedule has work from now on
        check_held(self.rounds.weights)

    def on_train_epoch_end(self) -> None:
        check_held(self.rounds.weights, by_gradient=True)
        self.log("train/loss", self.mean_loss)
        if self.pace.left == 0:  # and no limit broke the epoch off
            self.stepper.step_schedulers("epoch")

    def on_train_end(self) -> None:
        if self.rounds.halfway:
            rank_zero_warn("training stopped in the middle of a round: what is evaluated are the weights of its start")
        if self.stepper.waiting:
            rank_zero_warn(
                f"training stopped between two steps of the optimizers: the gradients of the last "
                f"{self.stepper.waiting} mini-batches are not in the weights"
            )

    def on_validation_model_zero_grad(self) -> None:
        """Lightning would erase gradients that no optimizer has taken yet, and that curves of norms are drawn of."""

    def on_validation_start(self) -> None:
        self.evaluation.begin()

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    on_test_start = on_predict_start = on_validation_start

    def on_predict_end(self) -> None:
        self.evaluation.go_on()

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_finite(self, self.trainer.global_step)
        self.rounds.receive_pending()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["splitlearn"] = {"kind": {**self.kind(data), **self.settings(data)}, **state_of(self)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning does so only when it has restored, which drops half of the bits
        state = checkpoint.get("splitlearn", {"kind": {"layout": "a model that splitlearn did not train"}})
        trains = self.trainer.state.fn == TrainerFn.FITTING
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        check_kind(self.settings(data) if trains else self.kind(data), state["kind"])
        restore_callbacks(self.trainer, checkpoint, trains)
        restore(self, state, checkpoint["loops"]["fit_loop"] if trains else None)

    def _step_at_once(self) -> None:
        """Let those optimizers step that need not wait for the end of the round."""
        cast = self.layout.cast(self.rounds.holder)
        self.stepper.step([role for role in self.rounds.at_once if self.network.wire.plays(cast[role])])

    def _end_step(self, turns: Turns) -> None:
        ends = turns.ends_round or self.pace.left == 0
        if self.stepper.waiting and (ends or turns.finishes):  # the weights are about to be somebody else's
            self._step_at_once()
        if self.schedule.turn != "step":  # while the weights are still hers
            self._tell_finished(turns)
        if ends:
            self.rounds.end()
            if any(self.rounds.present(turns.batches)):  # else the gradients are of an earlier step
                self.stepper.step(self.rounds.deferred)
        if self.schedule.turn == "step":
            self._tell_finished(turns)
        if not self.stepper.waiting:
            self.stepper.step_schedulers("step")

    def _tell_finished(self, turns: Turns) -> None:
        for judge, alice in product(self.judges, [a for a in turns.finishes if a not in self.rounds.gone]):
            judge.on_alice_finished(self.trainer, self, alice)

    def _pass(self, alice: Party, batch: Batch) -> None:
        """Forward, the loss where it is held, and backward: the micro-batches go each way one behind the other."""
        cast = self.layout.cast(alice)
        parts = micro(batch, self.micro_batches)
        passes = [self.network(part, cast) for part in parts]
        losses = [] if passes[0][0].is_meta else self._losses(alice, batch, parts, passes)
        if not losses:  # another process holds it
            self.pace.prepare()  # which would cost time behind the wait
        for (*_, tape), loss in zip_longest(passes, losses):
            self.network.backward(loss, tape)

    def _losses(self, alice: Party, batch: Batch, parts: list[Batch], passes: list[Pass]) -> list[Tensor]:
        """What to go backward from, of the micro-batches of a mini-batch."""
        weights = [self.means.weight_of(labels) for _, labels, _ in passes]
        losses = [
            self.means.part(self.means.of(output, labels, part.number), weight, weights)
            for part, (output, labels, _), weight in zip(parts, passes, weights, strict=True)
        ]
        self.epoch_loss.add(alice, batch, self.means.join([loss.detach() for loss in losses], weights))
        share = self.means.share(alice, self.rounds.step)
        return [self.stepper.before_backward(loss * share) for loss in losses]

    def _cause(self, alice: Party, batch: Batch) -> str:
        """Of what is not finite in her mini-batch."""
        return cause(self.network, batch, alice, self.micro_batches)

    def _log_evaluation(self, stage: str) -> None:
        """Here, since a checkpoint may be saved in the callbacks' on_validation_end."""
        measured = self.evaluation.end()
        self.log_dict({f"{stage}/{name}": value for name, value in measured.items()}, prog_bar=True)

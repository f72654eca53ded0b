"""What TensorBoard shows of a split run that others have not."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from splitlearn.callbacks.partition_figure import who_has_what
from splitlearn.costs.flops import clients
from splitlearn.data import SplitData
from splitlearn.learner import SplitLearner
from splitlearn.ledger import is_alice
from splitlearn.training.accuracy import FEW


class TensorBoardCurves(Callback):
    """Writes to TensorBoard what a split run has that others have not.

    At the start a picture of who has which rows. Every `log_every_n_steps` mini-batches and at the end of an epoch the
    loss (in a process that holds it), by role the learning rate and the gradient's norm (after clipping), the bytes so
    far by direction and kind (in a process of one party those that it sends or receives itself), and the FLOPs so far
    by party; after the first epoch and every `every_n_epochs` a histogram of what crosses each cut, and a sheet of
    inputs beside it. After every validation its accuracy over what it has cost: there the step of TensorBoard's axis is
    one FLOP of the Alices or one byte, of all parties together, so that runs are compared by cost.

    Arguments:
        num_images: the rows of the data on the sheet.
        every_n_epochs: between two sheets.
    """

    content_with_stretches = True

    def __init__(self, num_images: int = 8, every_n_epochs: int = 5) -> None:
        self.num_images, self.every_n_epochs = num_images, every_n_epochs
        self.written = 0  # the step of the latest curves

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.fields = data.sample(self.num_images) if isinstance(data, SplitData) else None
        for writer in _writers(trainer) if isinstance(data, SplitData) else []:
            picture = who_has_what(data.labels, list(data.shards.values()), data.num_classes)
            writer.add_image("who has what", picture, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, learner: SplitLearner, *_: Any) -> None:  # type: ignore[override]
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._write(trainer, learner)

    def _write(self, trainer: pl.Trainer, learner: SplitLearner) -> None:
        step = trainer.global_step
        if not trainer.loggers or step == self.written:
            return
        self.written = step
        loss = learner.epoch_loss.last
        scalars = {} if math.isnan(loss) else {"train/loss_step": loss}  # NaN: another party holds it
        for role, optimizer in learner.stepper.optimizers.items():
            scalars[f"lr/{role}"] = optimizer.param_groups[0]["lr"]
            scalars[f"grad_norm/{role}"] = float(_norm(learner.network.parameters_of(role)))
        wire = learner.network.wire
        many = has_many_alices(learner) and (learner.network.complete or not wire.hosts("alice"))
        scalars.update({f"flops/{party}": float(cost.total) for party, cost in learner.meter.by_party(many).items()})
        for pair, kinds in learner.ledger.table(merge=many).items():
            if any(map(wire.plays, pair.split("->"))):  # of others it is not told at each step
                scalars.update({f"bytes/{pair}/{kind}": float(num_bytes) for kind, num_bytes in kinds.items()})
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)

    def on_validation_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if accuracy is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        flops, num_bytes = sum(clients(learner.meter.by_party())), sum(learner.ledger.num_bytes.values())
        for writer in _writers(trainer):
            writer.add_scalar("cost/val_accuracy_by_client_flops", accuracy, flops)
            writer.add_scalar("cost/val_accuracy_by_bytes", accuracy, num_bytes)

    def on_train_epoch_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        if trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._write(trainer, learner)
        writers = _writers(trainer)
        if not writers or self.fields is None or trainer.current_epoch % self.every_n_epochs:
            return
        if not learner.network.complete or learner.network.sample.keys() - self.fields.keys():
            return  # this party alone cannot run it all
        rows = trainer.precision_plugin.convert_input(self.fields)
        fields = {name: field.to(learner.device) for name, field in rows.items()}
        with trainer.precision_plugin.forward_context():
            tape, _ = learner.network.look(fields)
        crossed = {f"{hop.sender}->{hop.receiver}": hop.received.float().cpu() for hop in tape}
        seen = {**{name: field.float().cpu() for name, field in fields.items() if name != "y"}, **crossed}
        for writer in writers:
            for name, value in crossed.items():
                writer.add_histogram(f"smashed/{name}", value, trainer.global_step)
            sheet = torch.cat([_strip(value) for value in seen.values()], dim=1)
            writer.add_image("inputs above what crosses", sheet, trainer.global_step)


def has_many_alices(learner: SplitLearner) -> bool:
    """Whether bytes are told as a sum over the Alices, whether they take turns or own columns."""
    parties = {*learner.schedule.takers, *learner.network.layout.roles}
    return sum(map(is_alice, parties)) > FEW


def _writers(trainer: pl.Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, pl.loggers.TensorBoardLogger)]


def _strip(value: Tensor) -> Tensor:
    """Draw each row of [N, ...] as one picture of 64x64 pixels, side by side: [3, 68, 2 + 66 N]."""
    if value.ndim != 4:
        flat = value.flatten(1)
        side = math.ceil(math.sqrt(flat.shape[1]))
        value = F.pad(flat, (0, side * side - flat.shape[1])).view(len(flat), 1, side, side)
    pictures = value if value.shape[1] == 3 else value.mean(1, keepdim=True)
    return make_grid(F.interpolate(pictures, (64, 64)), nrow=len(pictures), normalize=True, scale_each=True)


def _norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

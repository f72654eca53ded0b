"""Runs of a Trainer to compare: with a SplitLearner, and with an ordinary LightningModule on the same mini-batches."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
import torch
from helpers import BLOCKS, SEED, SGD, Unsplit, make_rows, net, run_blocks
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from splitlearn.callbacks.results import Results
from splitlearn.data import Source, SplitData
from splitlearn.data.loader import EvalLoader, TurnLoader
from splitlearn.data.partition import iid
from splitlearn.layout import two_party
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Handoff
from splitlearn.training.checkpoints import SafeCheckpointIO

TWO_PARTY = two_party(BLOCKS, 2)
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Recorder(Logger):
    """A logger that keeps what it is given: `(step, metrics)`."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict]] = []

    name, version = "recorder", "0"

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.logged.append((step, dict(metrics)))


def make_data(num_rows=39, batch_size=4, layout=TWO_PARTY, num_alices=1, val_rows=0, sizes=None) -> SplitData:
    """An epoch of ten mini-batches, of which the last has three rows; `sizes` are those of the shards, else alike."""
    x, y = make_rows(num_rows + val_rows)
    source = Source(TensorDataset(x, y), TensorDataset(x[:5], y[:5]), 3)
    held_out = {"val_fraction": val_rows / len(x), "seed": SEED}
    val_ids = SplitData(source, **held_out).val_ids

    def deal(labels, num_shards, seed) -> list[Tensor]:
        """Training rows apart from validation rows, so that no Alice is left with a mini-batch of one row."""
        rows = iid(labels, 1, seed)[0]
        train, held = (rows[torch.isin(rows, val_ids) == held] for held in (False, True))
        parts = train.split(sizes) if sizes else train.tensor_split(num_shards)
        return [torch.cat(part) for part in zip(parts, held.tensor_split(num_shards), strict=True)]

    batches = {"batch_size": batch_size, "eval_batch_size": 3}
    return SplitData(source, layout, num_alices, partition=deal, **batches, **held_out)


def make_learner(
    data, layout=TWO_PARTY, make=SGD, model=None, state="carry", schedule=None, kind=SplitLearner, loss=None, **kwargs
) -> SplitLearner:
    network = SplitNetwork(model or net(), layout, data, seed=SEED)
    arranged = Schedule(tuple(data.shards), **{"alice": Handoff(state), **(schedule or {})})
    return kind(network, arranged, make, loss or nn.CrossEntropyLoss(), 3, **kwargs)


def make_trainer(folder: Path, callbacks=(), logger=False, plugins=(), **kwargs) -> pl.Trainer:
    """A trainer that writes into `folder` only; a checkpoint callback is one of `callbacks` or there is none."""
    saves = any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks)
    plugins = [*plugins, SafeCheckpointIO()]
    settings = {**QUIET, "max_epochs": None if "max_steps" in kwargs else 2, "enable_checkpointing": saves, **kwargs}
    return pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), logger=logger or False, plugins=plugins, **settings
    )


class Plain(pl.LightningModule):
    """What a Lightning user writes: automatic optimization, one optimizer, the network in one piece."""

    def __init__(self, make=SGD, scheduler=None, interval="epoch", monitor="val/loss") -> None:
        super().__init__()
        self.model = Unsplit(net())
        self.make, self.scheduler, self.interval, self.monitor = make, scheduler, interval, monitor

    def training_step(self, batch, batch_idx) -> Tensor:
        x, y, number = batch
        return nn.functional.cross_entropy(self.model(x, number), y)

    def validation_step(self, batch, batch_idx) -> None:
        x, y, number = batch
        loss = nn.functional.cross_entropy(self.model(x, number), y)
        self.log("val/loss", loss, batch_size=len(y))

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.scheduler is None:
            return optimizer
        config = {"scheduler": self.scheduler(optimizer), "interval": self.interval, "monitor": self.monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}


def batches_of(
    data: SplitData, epoch: int, order: int | None = None
) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
    """(x, y, number) of each mini-batch of an epoch, or of its numbers in the order of another epoch."""
    turns = TurnLoader(data.rows, data.shards, Schedule(tuple(data.shards)), None, data.batch_size, SEED)
    for place, step in enumerate(turns.steps(epoch if order is None else order)):
        (ids,) = step.batches.values()
        yield data.rows.fields["x"][ids], data.rows.fields["y"][ids], (epoch, place)


class PlainTurns:
    """The mini-batches of a TurnLoader, one at a time."""

    def __init__(self, module: pl.LightningModule, data: SplitData) -> None:
        self.module, self.data = module, data

    def __len__(self) -> int:
        return len(list(batches_of(self.data, 0)))

    def __iter__(self) -> Iterator:
        trainer = self.module.trainer
        yield from batches_of(self.data, trainer.current_epoch, order=0 if trainer.overfit_batches else None)


class PlainEval:
    def __init__(self, loader: EvalLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            yield batch.fields["x"], batch.fields["y"], batch.number


def fit_plain(module: Plain, data: SplitData, trainer: pl.Trainer) -> None:
    val = PlainEval(EvalLoader(data.rows, data.val_ids, data.eval_batch_size, torch.device("cpu")))
    trainer.fit(module, PlainTurns(module, data), val if len(data.val_ids) else None)


def by_hand(makers=(SGD, SGD), clip=None, autocast=nullcontext, scaler=None, model=None, data=None):
    """Two epochs of the network in one piece, with an optimizer for the first two blocks and one for the rest.

    Return the weights, and the scale of gradients behind each mini-batch.
    """
    data, model = data or make_data(), model or net()
    owned = [*model[:2].parameters()], [*model[2:].parameters()]
    parts = [(make(params), params) for make, params in zip(makers, owned, strict=True) if make is not None]
    scales = []
    for epoch in range(2):
        for x, y, number in batches_of(data, epoch):
            model.zero_grad()
            with autocast():
                loss = nn.functional.cross_entropy(run_blocks(model.named_children(), x, number), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            for optimizer, params in parts:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                if clip is not None:
                    clip(params)
                optimizer.step() if scaler is None else scaler.step(optimizer)
            if scaler is not None:
                scaler.update()
                scales.append(scaler.get_scale())
    return list(model.state_dict().values()), scales


def train_plain(folder, callbacks=(), **trainer):
    """Train the ordinary module, with callbacks that are made here. Return it, its trainer, and what was logged."""
    module, recorder = Plain(), Recorder()
    lightning = make_trainer(folder, [make() for make in callbacks], recorder, log_every_n_steps=4, **trainer)
    fit_plain(module, make_data(val_rows=6), lightning)
    return module, lightning, recorder.logged


def train_split(folder, length, callbacks=(), layout=TWO_PARTY, kind=SplitLearner, **trainer):
    """The same with a SplitLearner, in stretches of `length`, and with results.json."""
    data = make_data(val_rows=6, layout=layout)
    learner, recorder = make_learner(data, layout, kind=kind, steps_per_execution=length), Recorder()
    callbacks = [Results(folder / "results.json"), *(make() for make in callbacks)]
    lightning = make_trainer(folder, callbacks, recorder, log_every_n_steps=4, **trainer)
    lightning.fit(learner, datamodule=data)
    return learner, lightning, recorder.logged


def fit(folder, data=None, model=None, layout=TWO_PARTY, trainer=None, **learner):
    data = make_data() if data is None else data
    trained = make_learner(data, layout, model=model, **learner)
    lightning = make_trainer(folder, **(trainer or {}))
    lightning.fit(trained, datamodule=data)
    return trained, lightning


def weights(module: pl.LightningModule) -> list[Tensor]:
    """Weights and buffers in the order of the blocks, wherever they are cut."""
    return [value for name, value in module.state_dict().items() if not name.startswith("accuracy")]


def results(folder: Path) -> dict:
    kept = json.loads((folder / "results.json").read_text())
    for timed in (kept, *kept["epochs"]):
        del timed["seconds"]
    return kept


def end_state(learner: SplitLearner, trainer: pl.Trainer) -> dict:
    """Everything that a run leaves in memory."""
    return {
        "weights": learner.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "bytes": learner.ledger.table(),
        "evaluation bytes": learner.evaluation_ledger.table(),
        "flops": learner.meter.by_party(),
        "mean loss": learner.mean_loss,
        "rounds": learner.rounds.state_dict(),
        "step, epoch": (trainer.global_step, trainer.current_epoch),
    }


def saved(folder: Path) -> dict:
    """Every checkpoint in `folder` by name, without the seconds and the folder itself."""
    paths = sorted(folder.rglob("*.ckpt"))
    return {str(path.relative_to(folder)): _anonymous(torch.load(path, weights_only=True), folder) for path in paths}


def _anonymous(value, folder: Path):
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in ("seconds", "time_elapsed")}
        return {_anonymous(key, folder): _anonymous(item, folder) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return type(value)(_anonymous(item, folder) for item in value)
    return value.replace(str(folder), "") if isinstance(value, str) else value


def difference(a, b, place="") -> list[str]:
    """The places where two nested values differ; tensors and numbers must be equal to the bit."""
    if type(a) is not type(b):
        return [f"{place}: {type(a).__name__} {a}, {type(b).__name__} {b}"]
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [f"{place}: {a} {b}"]
    if isinstance(a, dict):
        keys = list(dict.fromkeys([*a, *b]))
        missing = [f"{place}/{key}: only once" for key in keys if key not in a or key not in b]
        return missing + [
            d for key in keys if key in a and key in b for d in difference(a[key], b[key], f"{place}/{key}")
        ]
    if isinstance(a, list | tuple):
        lengths = [] if len(a) == len(b) else [f"{place}: {len(a)} and {len(b)} of them"]
        return lengths + [
            d for i, (x, y) in enumerate(zip(a, b, strict=False)) for d in difference(x, y, f"{place}/{i}")
        ]
    return [] if a == b else [f"{place}: {a} {b}"]

"""Train a split network: `python -m splitlearn.train +experiment=digits_2party layout.cut=2`."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import Callback, Checkpoint, ProgressBar
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from torch import nn

from splitlearn.data import SplitData
from splitlearn.drawing import draw
from splitlearn.engines.simulated import SafeCheckpointIO, Simulated
from splitlearn.errors import DivergedError, InputError
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork, check_blocks

HERE = Path(__file__).resolve().parent
# The wheel carries conf/ inside the package; in a checkout it stands at the top.
CONF = str(HERE / "conf" if (HERE / "conf").is_dir() else HERE.parents[1] / "conf")
READ_BY_SOURCE = ("source", "root", "download", "image_size")
TYPED = ("seed", "num_alices", "data", "model", "layout", "schedule", "optimizer", "optimizers", "scheduler", "trainer")

make = partial(instantiate, _convert_="all")


class Run(NamedTuple):
    """What a configuration stands for."""

    engine: Simulated
    data: SplitData
    learner: SplitLearner
    trainer: pl.Trainer


def train(cfg: DictConfig) -> float | None:
    """Train and test as `cfg` says; return its `metric`, for a sweeper. InputError, before training, for what is amiss."""
    with _as_input_error():
        run = build(cfg)
    takers = run.learner.schedule.takers
    print(draw(run.learner.network, run.data.sample(), run.data.batch_size, takers), flush=True)
    metrics = run.engine.run(run.trainer, run.learner, run.data, cfg.ckpt)
    _log_hyperparameters(cfg, run.trainer, metrics)
    _print_table(run, metrics)
    if cfg.metric is not None and cfg.metric not in metrics:
        logging.getLogger(__name__).warning(
            "`metric` (=%s) was not measured, so a sweeper gets nothing; measured: %s", cfg.metric, ", ".join(metrics)
        )
    return metrics.get(cfg.metric)


def build(cfg: DictConfig) -> Run:
    """Make the objects of a run from its configuration; each checks what it is given."""
    OmegaConf.resolve(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.ckpt is not None and not Path(cfg.ckpt).is_file():
        raise InputError(f"`ckpt` (={cfg.ckpt}) is not a file: name a checkpoint, or leave `ckpt` out to train anew")
    model_or_function, source = make(cfg.model), make(cfg.data.source)
    model = _make_model(model_or_function, source.num_classes)
    layout = make(cfg.layout)(list(check_blocks(model)))
    takers = layout.takers(cfg.num_alices)
    settings = make({name: value for name, value in cfg.data.items() if name not in READ_BY_SOURCE})
    partition = make(cfg.partition)
    data = SplitData(source, takers, len(layout.fields), partition=partition, seed=cfg.seed, **settings)
    engine = make(cfg.engine)
    network = SplitNetwork(model, layout, engine.make_wire(), data.sample(), cfg.seed)
    learner = _make_learner(cfg, network, make(cfg.schedule)(takers), source.num_classes)
    return Run(engine, data, learner, _make_trainer(cfg))


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> float | None:
    _quieten()
    try:
        return train(cfg)
    except (InputError, DivergedError) as error:
        sys.exit(f"splitlearn: {error}")


@contextmanager
def _as_input_error() -> Iterator[None]:
    """While objects are made, an error is about what was asked for; Hydra's wrapping of it is taken off."""
    try:
        yield
    except InstantiationException as error:
        raise InputError(str(error.__cause__ or error)) from error
    except (ValueError, TypeError, FileNotFoundError, OmegaConfBaseException, MisconfigurationException) as error:
        raise InputError(str(error)) from error


def _make_model(made: Any, num_classes: int) -> nn.Module:
    """Call a model function, with the number of classes if it takes one."""
    if isinstance(made, nn.Module):
        return made
    parameters = inspect.signature(made).parameters.values()
    takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    return made(num_classes=num_classes) if takes else made()


def _make_learner(cfg: DictConfig, network: SplitNetwork, schedule: Any, num_classes: int) -> SplitLearner:
    # A role's own entry changes the common optimizer, or replaces it when it says what it is.
    overrides = {
        role: make(own if "_target_" in own else OmegaConf.merge(cfg.optimizer, own))
        for role, own in cfg.optimizers.items()
    }
    return SplitLearner(
        network,
        schedule,
        make(cfg.optimizer),
        make(cfg.loss),
        num_classes,
        optimizers=overrides,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        gradient_clip_algorithm=cfg.trainer.gradient_clip_algorithm,
        steps_per_execution=cfg.steps_per_execution,
        **make(cfg.scheduler),
    )


def _make_trainer(cfg: DictConfig) -> pl.Trainer:
    """Lightning refuses to clip in manual optimization, so the learner clips."""
    keys = OmegaConf.masked_copy(cfg.trainer, [key for key in cfg.trainer if not key.startswith("gradient_clip")])
    loggers = list(make(cfg.logger).values())
    trainer = make(keys, logger=loggers or False, callbacks=_make_callbacks(cfg), plugins=[SafeCheckpointIO()])
    if trainer.world_size != 1:
        raise InputError(f"`trainer.devices` (={cfg.trainer.devices}) must be 1: the parties of a run share one device")
    return trainer


def _make_callbacks(cfg: DictConfig) -> list[Callback]:
    """Lightning refuses to be given a bar or a checkpoint callback and told to have none."""
    wanted = {ProgressBar: cfg.trainer.enable_progress_bar, Checkpoint: cfg.trainer.enable_checkpointing}
    callbacks = make(cfg.callbacks).values()
    return [c for c in callbacks if all(keep for kind, keep in wanted.items() if isinstance(c, kind))]


def _log_hyperparameters(cfg: DictConfig, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    params = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(TYPED)), resolve=True)
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.TensorBoardLogger):
            logger.log_hyperparams(params, metrics)  # type: ignore[arg-type]
            logger.save()


def _print_table(run: Run, metrics: dict[str, float]) -> None:
    table = Table("", "result", title=run.learner.layout.kind)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    for pair, kinds in run.learner.ledger.table().items():
        table.add_row(pair, ", ".join(f"{kind} {num_bytes:,} bytes" for kind, num_bytes in kinds.items()))
    table.add_row("output", str(run.trainer.default_root_dir))
    Console().print(table)


def _quieten() -> None:
    """Silence what Lightning and torch say about choices that are made here on purpose."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    for message in (
        "Using ModelCheckpoint with manual optimization",
        "The number of training batches",
        "Checkpoint directory .* exists and is not empty",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    main()

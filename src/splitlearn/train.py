"""Train a split network: `python -m splitlearn.train +experiment=digits_2party layout.cut=2`."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import Callback, Checkpoint, ProgressBar
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from splitlearn.data import SplitData
from splitlearn.engines.simulated import SafeCheckpointIO, Simulated
from splitlearn.errors import DivergedError, InputError
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork, check_blocks
from splitlearn.watch import has_many_alices

HERE = Path(__file__).resolve().parent
# The wheel carries conf/ inside the package; in a checkout it stands at the top.
CONF = str(HERE / "conf" if (HERE / "conf").is_dir() else HERE.parents[1] / "conf")
LARGEST_SEED = 2**32 - 1  # numpy takes no larger one
READ_BY_SOURCE = ("source", "root", "download", "image_size", "label")
# What a table of runs is for; all of a run's configuration stands in its folder.
COMPARED = (
    "seed",
    "num_alices",
    "layout",
    "model",
    "schedule",
    "optimizer",
    "optimizers",
    "data.batch_size",
    "trainer.max_epochs",
)
MAKING = (
    InstantiationException,
    MisconfigurationException,
    OmegaConfBaseException,
    FileNotFoundError,
    TypeError,
    ValueError,
)

make = partial(instantiate, _convert_="all")


class Run(NamedTuple):
    """What a configuration stands for."""

    engine: Simulated
    data: SplitData
    learner: SplitLearner
    trainer: pl.Trainer


def train(cfg: DictConfig) -> float | None:
    """Train and test as `cfg` says; return its `metric`, for a sweeper.

    Raises InputError, before training starts, for what does not fit.
    """
    with as_input_error():
        run = build(cfg)
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
    _bring(cfg)
    _check(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    source = make(cfg.data.source)
    model = make(cfg.model, num_classes=source.num_classes)
    layout = make(cfg.layout, list(check_blocks(model)))
    takers = layout.takers(cfg.num_alices)
    data = make(
        _without(cfg.data, READ_BY_SOURCE),
        source,
        takers,
        len(layout.fields),
        partition=make(cfg.partition),
        seed=cfg.seed,
    )
    engine = make(cfg.engine)
    network = SplitNetwork(model, layout, engine.make_wire(), data.sample(), cfg.seed)
    schedule = make(_without(cfg.schedule, ("sets",)), takers, seed=cfg.seed)
    learner = _make_learner(cfg, network, schedule, source.num_classes)
    return Run(engine, data, learner, _make_trainer(cfg))


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> float | None:
    quieten()
    try:
        return train(cfg)
    except (InputError, DivergedError, MisconfigurationException) as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # Hydra goes on with the sweep, and fails at its end
            raise
        sys.exit(f"splitlearn: {one_line(error)}")
    finally:
        gc.collect()  # trainer, learner and data refer to each other: a sweep would keep every job's data set


def _check(cfg: DictConfig) -> None:
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed <= LARGEST_SEED:
        raise InputError(f"`seed` (={cfg.seed}) must be a whole number from 0 to {LARGEST_SEED}")
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(f"{', '.join(f'`{key}`' for key in missing)} must be given: {missing[0]}=...")
    if cfg.ckpt is not None and not Path(cfg.ckpt).is_file():
        raise InputError(f"`ckpt` (={cfg.ckpt}) is not a file: name a checkpoint, or leave `ckpt` out to train anew")


def _bring(cfg: DictConfig) -> None:
    """A scheme may bring a layout of its own, and says so where another one was asked for."""
    for key, value in cfg.schedule.get("sets", {}).items():
        if cfg[key] != value:
            logging.getLogger(__name__).info("schedule brings %s: %s", key, value)
        cfg[key] = value


def _without(cfg: DictConfig, keys: Sequence[str]) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in keys])


@contextmanager
def as_input_error() -> Iterator[None]:
    """While objects are made, an error is about what was asked for.

    A ValueError names its cure. A call that does not fit is told with the key where it stands.
    """
    try:
        yield
    except MAKING as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if isinstance(cause, (ValueError, FileNotFoundError, ImportError)):
            raise InputError(one_line(cause)) from error
        raise InputError(f"{one_line(error)}: `--cfg job` shows the options and their values") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _make_learner(cfg: DictConfig, network: SplitNetwork, schedule: Any, num_classes: int) -> SplitLearner:
    # A role's own entry changes the common optimizer, or replaces it when it says what it is.
    overrides = {
        role: make(own) if "_target_" in own else make(cfg.optimizer, **own) for role, own in cfg.optimizers.items()
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
    trainer = make(
        cfg.trainer,
        gradient_clip_val=None,
        logger=list(make(cfg.logger).values()),
        callbacks=_make_callbacks(cfg),
        plugins=[SafeCheckpointIO()],
    )
    if trainer.world_size != 1:
        raise InputError(f"`trainer.devices` (={cfg.trainer.devices}) must be 1: the parties of a run share one device")
    return trainer


def _make_callbacks(cfg: DictConfig) -> list[Callback]:
    """Lightning refuses to be given a bar or a checkpoint callback and told to have none."""
    wanted = {ProgressBar: cfg.trainer.enable_progress_bar, Checkpoint: cfg.trainer.enable_checkpointing}
    callbacks = make(cfg.callbacks).values()
    return [c for c in callbacks if all(keep for kind, keep in wanted.items() if isinstance(c, kind))]


def _log_hyperparameters(cfg: DictConfig, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    params = {key.replace(".", "/"): OmegaConf.select(cfg, key) for key in COMPARED}
    params = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in params.items()}
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.TensorBoardLogger):
            logger.log_hyperparams(params, metrics, step=trainer.global_step)
            logger.save()


def _print_table(run: Run, metrics: dict[str, float]) -> None:
    table = Table("", "result", title=run.learner.layout.kind)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    for pair, kinds in run.learner.ledger.table(merge=has_many_alices(run.learner)).items():
        table.add_row(pair, ", ".join(f"{kind} {num_bytes:,} bytes" for kind, num_bytes in kinds.items()))
    table.add_row("output", str(run.trainer.default_root_dir))
    Console().print(table)


def quieten() -> None:
    """Silence what Lightning and torch say about choices that are made here on purpose."""
    chatter = ("Tip:", "GPU available: False", "TPU available: False", "`weights_only` was not set")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: not any(words in str(record.msg) for words in chatter)
    )
    for message in (
        "Using ModelCheckpoint with manual optimization",
        "The number of training batches",
        "Total length of `list` across ranks is zero",
        "Checkpoint directory .* exists and is not empty",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    main()

"""From a configuration to the objects of a run."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import Callback, Checkpoint, ProgressBar
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from splitlearn.blocks import check_blocks
from splitlearn.callbacks.model_folder import ModelFolder
from splitlearn.data import SplitData
from splitlearn.errors import InputError, outside
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork
from splitlearn.saved import initial
from splitlearn.training.checkpoints import SafeCheckpointIO, check_modes, monitoring, start_from
from splitlearn.wire import Wire

LARGEST_SEED = 2**32 - 1  # numpy takes no larger one
LONGEST_LINE = 10_000  # characters of an error
READ_BY_SOURCE = ("source", "root", "download", "image_size", "label", "features", "drop", "encoding", "delimiter")
# What each host may have in its own way; all the rest must be the same everywhere.
LOCAL = (
    *("output_dir", "ckpt", "init", "metric", "logger", "wire.certificates"),
    *("engine.party", "engine.address", "engine.timeout", "engine.join_timeout"),
    *(
        f"callbacks.{name}"
        for name in ("progress_bar", "layout_drawing", "results", "tensorboard", "interrupt", "checkpoint")
    ),
    "callbacks.model_folder.folder",
    *("data.encoding", "data.delimiter", "data.source.encoding", "data.source.delimiter"),  # of one's own file
    *("data.root", "data.download", "data.num_workers", "data.in_memory", "data.source.root", "data.source.download"),
    "data.source.path",
    *("trainer.accelerator", "trainer.devices", "trainer.enable_progress_bar", "trainer.default_root_dir"),
    *("trainer.profiler", "trainer.benchmark", "trainer.log_every_n_steps", "trainer.enable_model_summary"),
)
MAKING = (
    InstantiationException,
    MisconfigurationException,
    OmegaConfBaseException,
    OSError,
    TypeError,
    ValueError,
)


make = partial(instantiate, _convert_="all")


class Run(NamedTuple):
    """What a configuration stands for."""

    data: SplitData
    learner: SplitLearner
    trainer: pl.Trainer


def build(cfg: DictConfig, wire: Wire | None = None) -> Run:
    """Make the objects of a run from its configuration; each checks what it is given.

    `wire` is that of the party whose part of the run this is; None makes all of it.
    """
    OmegaConf.resolve(cfg)
    _bring(cfg)
    _check(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    source = make(cfg.data.source)
    model = make(cfg.model, num_classes=source.num_classes)
    check_blocks(model)
    layout = make(cfg.layout, model)
    settings = _without(cfg.data, READ_BY_SOURCE)
    data = make(settings, source, layout, cfg.num_alices, partition=make(cfg.partition), seed=cfg.seed)
    network = SplitNetwork(model, layout, data, wire, cfg.seed)
    if cfg.freeze:
        network.freeze(cfg.freeze)
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # as is asked for
    if wire is not None:
        data.keep(layout.owners, wire.plays)
    schedule = make(_without(cfg.schedule, ("sets",)), data.takers, seed=cfg.seed)
    learner = _make_learner(cfg, network, schedule, source.num_classes)
    _check_micro_batches(learner, data.batch_size)
    trainer = _make_trainer(cfg)
    if cfg.weights is not None or cfg.init is not None:
        # Lightning converts it later, when half of the bits of doubles would be gone.
        trainer.precision_plugin.convert_module(learner)
    if cfg.weights is not None:
        start_from(cfg.weights, network, data.settings)
    if cfg.init is not None:
        network.origins = str(initial.start_from(network, _listed(cfg.init), cfg.init_fresh, data))
        rank_zero_info(network.origins)
    return Run(data, learner, trainer)


def _check_micro_batches(learner: SplitLearner, batch_size: int) -> None:
    if learner.micro_batches > batch_size:
        raise InputError(
            f"`micro_batches` (={learner.micro_batches}) must be at most the rows of a mini-batch, `data.batch_size` "
            f"(={batch_size})"
        )
    if learner.micro_batches > 1 and any(isinstance(part, _BatchNorm) for part in learner.network.modules()):
        rank_zero_warn("batch norm takes its statistics from each micro-batch, so the gradients differ a little")


def _check(cfg: DictConfig) -> None:
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed <= LARGEST_SEED:
        raise InputError(f"`seed` (={cfg.seed}) must be a whole number from 0 to {LARGEST_SEED}")
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise InputError(f"{', '.join(f'`{key}`' for key in missing)} must be given: {missing[0]}=...")
    for key in ("ckpt", "weights"):
        if cfg[key] is not None and not Path(cfg[key]).is_file():
            raise InputError(
                f"`{key}` (={cfg[key]}) is not a file: name a checkpoint, or leave `{key}` out to train anew"
            )
    starting = [key for key in ("init", "weights") if cfg[key] is not None]
    if cfg.ckpt is not None and starting:
        key = starting[0]
        raise InputError(f"`{key}` (={cfg[key]}) starts a run and `ckpt` (={cfg.ckpt}) goes on with one: take one")
    if len(starting) == 2:
        raise InputError(f"`init` (={cfg.init}) and `weights` (={cfg.weights}) both start a run: take one")
    _check_names(cfg)
    for key in ("max_epochs", "max_steps"):
        value = cfg.trainer[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"`trainer.{key}` (={value}) must be a whole number; -1 sets no limit")
    _check_period(cfg)
    if cfg.test not in ("last", "best"):
        raise InputError(f"`test` (={cfg.test}) must be last or best")


def _check_names(cfg: DictConfig) -> None:
    for key in ("init_fresh", "freeze"):
        if not isinstance(cfg[key], ListConfig) or not all(isinstance(name, str) for name in cfg[key]):
            raise InputError(f"`{key}` (={cfg[key]}) must be a list of names: {key}=[head]")
    places = _listed(cfg.init)
    if cfg.init is not None and not (places and all(isinstance(place, str) for place in places)):
        raise InputError(f"`init` (={cfg.init}) must be a folder, a file, or a list of them: init=[run/alice0,bob.pth]")
    if cfg.init_fresh and cfg.init is None:
        raise InputError(f"`init_fresh` (={cfg.init_fresh}) leaves blocks out of `init`: give init=FOLDER, too")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, ListConfig) else [value]


def _check_period(cfg: DictConfig) -> None:
    """The rate of a cosine falls for `T_max` intervals, and rises again behind them."""
    period, epochs = OmegaConf.select(cfg, "scheduler.scheduler.T_max"), cfg.trainer.max_epochs
    if period is None:
        return
    if period < 1:
        raise InputError(
            f"`scheduler.scheduler.T_max` (={period}) must be at least 1: it is trainer.max_epochs, unless you say in "
            "how many intervals the rate falls to its lowest"
        )
    if cfg.scheduler.interval == "step" and period == epochs:
        raise InputError(
            f"`scheduler.scheduler.T_max` (={period}) counts mini-batches with `scheduler.interval` (=step), and is "
            "trainer.max_epochs: say in how many mini-batches the rate falls to its lowest, or take interval=epoch"
        )


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
        if isinstance(cause, (ValueError, OSError, ImportError)):
            raise InputError(one_line(cause)) from error
        raise InputError(f"{one_line(error)}: `--cfg job` shows the options and their values") from error


def one_line(error: BaseException) -> str:
    """Return what an error says; text of another party or of a file may be in it, and is escaped."""
    return outside(" ".join(str(error).split()), LONGEST_LINE)


def shared_by_all(cfg: DictConfig) -> dict[str, Any]:
    """Return the keys that must have the same value at every party, flat: `{"optimizer.lr": 0.1}`."""
    flat = _flatten(OmegaConf.to_container(cfg, resolve=True))
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{own}.") for own in LOCAL)}


def _digest(shared: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(shared, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: v for part in value for key, v in _flatten(value[part], f"{name}.{part}" if name else part).items()}


def _make_learner(cfg: DictConfig, network: SplitNetwork, schedule: Any, num_classes: int) -> SplitLearner:
    # A role's own entry changes the common optimizer, or replaces it when it says what it is.
    overrides = {
        role: make(own) if "_target_" in own else make(cfg.optimizer, **own) for role, own in cfg.optimizers.items()
    }
    return SplitLearner(
        network,
        schedule,
        make(cfg.optimizer),
        _make_loss(cfg.loss),
        num_classes,
        optimizers=overrides,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        gradient_clip_algorithm=cfg.trainer.gradient_clip_algorithm,
        steps_per_execution=cfg.steps_per_execution,
        micro_batches=cfg.micro_batches,
        accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        **make(cfg.scheduler),
    )


def _make_loss(cfg: DictConfig) -> nn.Module:
    """Lists are tensors: `loss.weight=[1,5]` are the weights of the classes."""
    if isinstance(cfg.get("weight"), int | float):
        raise InputError(
            f"`loss.weight` (={cfg.weight}) must be a list with the weight of each class: loss.weight=[1,5]"
        )
    lists = {str(name): torch.tensor(list(v)).float() for name, v in cfg.items() if isinstance(v, ListConfig)}
    unset = [str(name) for name, value in cfg.items() if value is None]
    return make(_without(cfg, [*lists, *unset]), _partial_=True)(**lists)


def _make_trainer(cfg: DictConfig) -> pl.Trainer:
    """Lightning refuses to clip and to accumulate in manual optimization, so the learner does."""
    trainer = make(
        cfg.trainer,
        gradient_clip_val=None,
        accumulate_grad_batches=1,
        logger=list(make(cfg.logger).values()),
        callbacks=_make_callbacks(cfg),
        plugins=[SafeCheckpointIO(), LightningEnvironment()],  # whatever starts the process, Lightning need not know
    )
    if trainer.world_size != 1:
        raise InputError(f"`trainer.devices` (={cfg.trainer.devices}) must be 1: the parties of a run share one device")
    check_modes(trainer)
    if cfg.test == "best" and monitoring(trainer) is None:
        raise InputError(
            "`test` (=best) needs a checkpoint callback that knows the best: callbacks.checkpoint.monitor=val/accuracy "
            "callbacks.checkpoint.mode=max, or take test=last"
        )
    return trainer


def _make_callbacks(cfg: DictConfig) -> list[Callback]:
    """Lightning refuses to be given a bar or a checkpoint callback and told to have none."""
    wanted = {ProgressBar: cfg.trainer.enable_progress_bar, Checkpoint: cfg.trainer.enable_checkpointing}
    callbacks = make(cfg.callbacks).values()
    for callback in callbacks:
        if isinstance(callback, ModelFolder):
            callback.model = OmegaConf.to_container(cfg.model)  # type: ignore[assignment]
            callback.config = _digest(shared_by_all(cfg))
    return [c for c in callbacks if all(keep for kind, keep in wanted.items() if isinstance(c, kind))]

"""What a checkpoint is read and written with, which weights a run starts from, and which of them it tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from splitlearn.errors import InputError, outside, told_if_full
from splitlearn.network import SplitNetwork
from splitlearn.saved.folder import misfits, put
from splitlearn.schedules.final import Moment
from splitlearn.schedules.rounds import Rounds
from splitlearn.training.checks import check_mode

MEANING = ("data.columns", "data.classes")  # of inputs and outputs


class SafeCheckpointIO(TorchCheckpointIO):
    """Loads tensors and plain values only: a checkpoint that somebody sent can run no code here."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Under another name first: who dies in the middle, or loses power, leaves no half of a file."""
        unfinished = Path(f"{path}.tmp")
        with told_if_full(path):
            super().save_checkpoint(checkpoint, unfinished, storage_options)
            _sync(unfinished)
            os.replace(unfinished, path)
            _sync(unfinished.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return _load(path, "ckpt", map_location)


def _load(path: Any, key: str, map_location: Any = None) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises is up to its bytes
        raise InputError(f"`{key}` (={path}) cannot be read ({type(error).__name__}): take another one") from error
    if "splitlearn" not in checkpoint:
        raise InputError(f"`{key}` (={path}) was not saved by splitlearn: take a file of a run's checkpoints folder")
    return checkpoint


def _sync(path: Path) -> None:
    """Wait until a file, or what a folder says of its files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_from(path: str, network: SplitNetwork, here: Mapping[str, Any]) -> None:
    """Give `network` the weights of a checkpoint and nothing else of it, wherever its network was cut.

    `here` are the settings of the data that it is for.

    Raises InputError, with the names, for weights that do not fit, where they are those of one Alice alone, and where
    inputs and outputs meant something else: other columns and classes, or in another order. Warns where the rows were
    others, or standardised otherwise.
    """
    checkpoint = _load(path, "weights")
    _check_data(path, checkpoint["splitlearn"]["kind"], here)
    sharings = checkpoint["splitlearn"]["rounds"]["sharings"].values()
    if any(sharing.get("own") or sharing.get("start") for sharing in sharings):
        raise InputError(
            f"`weights` (={path}) has weights of each Alice, since bottoms are personal or a round was going on: take "
            "a checkpoint of the end of a round of a schedule in which they share them"
        )
    ours = _by_block(network.state_dict(keep_vars=True))
    theirs = _by_block({name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()})
    if told := misfits(ours, theirs):
        raise InputError(f"`weights` (={path}) does not fit: {told}: take the `model` it was trained with")
    put(ours, theirs)


def _check_data(path: str, there: Mapping[str, str], here: Mapping[str, Any]) -> None:
    """Raises InputError, or warns, where weights of data with the settings `there` are asked to do for those `here`."""
    for what in MEANING:
        if what in here and there.get(what, here[what]) != here[what]:
            raise InputError(
                f"`weights` (={path}) were trained for other `{what}`, {outside(there[what])}, than "
                f"{outside(here[what])}: bring them into the order and names of there"
            )
    if there.get("data.rows") != str(here["data.rows"]):
        rank_zero_warn(
            "`weights` were trained on other rows or another split: what is held out here may be known there"
        )
    if any(there.get(what) != str(here[what]) for what in ("data.mean", "data.std")):
        rank_zero_warn("`weights` were trained on rows with another data.mean and data.std than are taken here")


def _by_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By `BLOCK.NAME`, without the stage in front, where no two stages run the same block."""
    state = {name: value for name, value in state.items() if name.startswith("segments.")}
    short = {name.split(".", 2)[2]: value for name, value in state.items()}
    return short if len(short) == len(state) else dict(state)


def restore_callbacks(trainer: pl.Trainer, checkpoint: dict[str, Any], trains: bool) -> None:
    """Change what Lightning is about to give the callbacks back.

    A run that goes on in a folder of its own knows the best checkpoint of the part before and its score, which
    ModelCheckpoint would forget with the folder. One that has trained, and tests a checkpoint, keeps what it has
    measured.
    """
    if not trains and trainer.global_step:
        checkpoint.pop("callbacks", None)
    states = checkpoint.get("callbacks", {})
    for callback in trainer.checkpoint_callbacks:
        if callback.state_key in states:
            states[callback.state_key]["dirpath"] = getattr(callback, "dirpath", None)


def monitoring(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """The callback that knows which checkpoint is the best."""
    saving = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None)
    return next(saving, None)


def check_modes(trainer: pl.Trainer) -> None:
    """Raises InputError where the best would be the worst: the lowest accuracy, or the highest loss."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and callback.monitor is not None:
            check_mode(callback.monitor, callback.mode, f"the `mode` of {type(callback).__name__}")


def best_of(trainer: pl.Trainer) -> str | None:
    """Return the best checkpoint, None where no callback knows of one."""
    best = monitoring(trainer)
    return str(best.best_model_path) if best is not None and best.best_model_path else None


def moment_of(checkpoint: Mapping[str, Any], rounds: Rounds) -> Moment:
    """Return the weights that a checkpoint of this run has, and what it knows of sharing, beside those of the run."""
    state = checkpoint["splitlearn"]
    known = {**checkpoint["state_dict"], **{f"network.{name}": value for name, value in state["buffers"].items()}}
    weights = {
        role: {name: known[f"network.segments.{name}"] for name in live.tensors}
        for role, live in rounds.weights.items()
    }
    return Moment(weights, rounds.sharings_of(state["rounds"]))


def tested(trainer: pl.Trainer, which: str) -> str | None:
    """Return the checkpoint to test, None for the weights that training ended with. Of two it says which.

    Raises InputError where no checkpoint is the best.
    """
    best = monitoring(trainer)
    if best is None or (which == "last" and not best.best_model_path):
        return None
    if not best.best_model_path:
        raise InputError(
            f"`test` (=best) has nothing to test, since `{best.monitor}` was never measured: train for longer, or take "
            "test=last"
        )
    score = f"`{best.monitor}` of {best.best_model_score:.4f}"
    if which == "last":
        rank_zero_info(f"Tests the last weights; test=best would test {best.best_model_path} with its {score}")
        return None
    rank_zero_info(f"Tests the best checkpoint, {best.best_model_path} with its {score}")
    return str(best.best_model_path)

"""Checkpoints that all parties take at one step, so that a whole federation can go on from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from splitlearn.learner import SplitLearner

NAME = re.compile(r"([0-9a-f]{32})-step(\d+)\.ckpt")
ALL_HAVE = ".common"  # ends the name of a file that says: there is a step of this run of which all have a snapshot
KEPT = 2  # a party that dies while it saves has the one before


class Snapshots(Checkpoint):
    """Every `every_n_steps` mini-batches, and at the end, each party saves, and goes on when all have.

    Arguments:
        folder: of this party; run: what tells this run from another one in the same folder, in hexadecimal.
        tell: called with the step of a snapshot that all have.
    """

    content_with_stretches = True

    def __init__(
        self, folder: Path, every_n_steps: int, run: str, tell: Callable[[int], None] = lambda step: None
    ) -> None:
        self.folder, self.run, self.tell = folder, run, tell
        self._every_n_train_steps = every_n_steps  # where `Pace` ends a stretch
        self.last = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = trainer.global_step
        for old in steps_in([self.folder]).get(self.run, []):
            if old > self.last:  # of an attempt that not all have finished
                (self.folder / name_of(self.run, old)).unlink()

    def on_train_batch_end(self, trainer: pl.Trainer, learner: SplitLearner, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step % self._every_n_train_steps == 0:
            self.save(trainer, learner)

    def on_train_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        self.save(trainer, learner)  # so that one may go on with more epochs

    def save(self, trainer: pl.Trainer, learner: SplitLearner) -> None:
        """Save, once at a step, and wait until all have."""
        step = trainer.global_step
        if step == self.last:
            return
        self.last = step
        trainer.save_checkpoint(self.folder / name_of(self.run, step))
        learner.network.wire.gather(step)
        (self.folder / f"{self.run}{ALL_HAVE}").touch()
        self.tell(step)
        for old in steps_in([self.folder]).get(self.run, [])[:-KEPT]:
            (self.folder / name_of(self.run, old)).unlink()


def name_of(run: str, step: int) -> str:
    return f"{run}-step{step}.ckpt"


def path_of(folders: Sequence[Path], run: str, step: int) -> Path:
    """Return the snapshot, which one of the folders has whole."""
    return next(path for path in (folder / name_of(run, step) for folder in folders) if _is_whole(path))


def steps_in(folders: Sequence[Path], whole: bool = False) -> dict[str, list[int]]:
    """Return the steps of which the folders have snapshots, ascending, by run: the run that saved last stands last.

    If they must be `whole` they are read, and those that are damaged are warned of and left out.
    """
    steps: dict[str, set[int]] = {}
    paths = [path for folder in folders for path in folder.glob("*.ckpt")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        match = NAME.fullmatch(path.name)
        if match and whole and not _is_whole(path):
            rank_zero_warn(f"{path} is damaged: the snapshot before it counts")
        elif match:
            steps[match[1]] = {*steps.pop(match[1], ()), int(match[2])}
    return {run: sorted(found) for run, found in steps.items()}


def _is_whole(path: Path) -> bool:
    """Whether every part of a checkpoint, which is a zip file, has its checksum."""
    try:
        with ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # what a damaged file raises is up to its bytes
        return False


def common_in(folders: Sequence[Path]) -> list[str]:
    """Return the runs of which all parties had a snapshot of one step, as far as the folders know."""
    return [path.name.removesuffix(ALL_HAVE) for folder in folders for path in folder.glob(f"*{ALL_HAVE}")]


def newest_common(offers: list[dict[str, list[int]]]) -> tuple[str, int] | None:
    """Return (run, step) of the newest snapshot that all have, each of whom offers `steps_in` his folder.

    Of several runs in a folder the latest counts, however far an earlier one came; which is the latest says
    the first, should folders differ.
    """
    if not offers[0]:
        return None
    run = next(reversed(offers[0]))
    common = set.intersection(*(set(offer.get(run, [])) for offer in offers))
    return (run, max(common)) if common else None

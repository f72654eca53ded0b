"""The data of a run as a LightningDataModule: split, dealt to the Alices, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from splitlearn.data.loader import Augment, EvalLoader, TurnLoader
from splitlearn.data.rows import Fields, InMemory, Normalise, Rows, Streamed, load
from splitlearn.data.sources import Source
from splitlearn.layout import Party
from splitlearn.partition import iid
from splitlearn.seeds import derive

FITS_IN_MEMORY = 2 * 1024**3  # bytes of float32; larger data sets are streamed unless `in_memory` says otherwise


class SplitData(pl.LightningDataModule):
    """Training rows dealt to the takers of turns, validation and test rows for all.

    Arguments:
        source: where the rows come from.
        takers: who takes turns, `layout.takers(num_alices)`; each gets a shard of the training rows.
        num_columns: the number of parties that own columns of the input, `len(layout.fields)`.
        batch_size, eval_batch_size: rows in a mini-batch, in training and in evaluation.
        val_fraction: the share of the training rows that is held out for validation, in [0, 1).
        test_fraction: the share held out for testing when the source has no test set of its own, in (0, 1).
        mean, std: per channel, of values that run from 0 to 1; None for no normalisation.
        augment: batch to batch, in training.
        partition: (labels, number of takers, seed) to row indices for each.
        in_memory: hold all rows as tensors; None does so up to 2 GiB.
        num_workers: of the DataLoader that streams rows which are not held in memory.
        seed: of the splits, the shards and the order.

    Raises ValueError for values outside these ranges, an empty training or test set or shard, and labels out of range.
    """

    def __init__(
        self,
        source: Source,
        takers: Sequence[Party] = ("alice0",),
        num_columns: int = 1,
        batch_size: int = 64,
        eval_batch_size: int = 1024,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augment | None = None,
        partition: Callable[[Tensor, int, int], list[Tensor]] = iid,
        in_memory: bool | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(batch_size, eval_batch_size, val_fraction, test_fraction, augment, num_columns)
        self.batch_size, self.eval_batch_size, self.seed, self.augment = batch_size, eval_batch_size, seed, augment
        self.num_classes = source.num_classes
        prepare = Normalise(mean, std, num_columns)
        self.rows = _rows(source.train, prepare, in_memory, num_workers)
        self.test_rows = self.rows if source.test is None else _rows(source.test, prepare, in_memory, num_workers)
        fractions = (test_fraction if source.test is None else 0.0, val_fraction)
        test_ids, self.val_ids, train_ids = _split(len(self.rows), fractions, seed)
        self.test_ids = test_ids if source.test is None else torch.arange(len(self.test_rows))
        labels = _labels(self.rows, source.train, source.num_classes)[train_ids]
        shards = partition(labels, len(takers), seed)
        self.shards = {taker: train_ids[shard] for taker, shard in zip(takers, shards, strict=True)}
        for taker, shard in self.shards.items():
            if len(shard) == 0:
                raise ValueError(f"`partition` gives {taker} no training row: take fewer Alices or another partition")

    @property
    def kind(self) -> str:
        """What a checkpoint must share with the run that goes on from it: which rows are trained on, in which order."""
        digest = blake2b(digest_size=4)
        for ids in (self.val_ids, self.test_ids, *self.shards.values()):
            digest.update(ids.numpy().tobytes())
        return f"seed {self.seed}, batch size {self.batch_size}, {len(self.rows)} rows split as {digest.hexdigest()}"

    def sample(self, size: int = 2) -> Fields:
        """Return a few training rows, by which a network takes its shapes."""
        shard = next(iter(self.shards.values()))
        rows = shard[torch.arange(size) % len(shard)]
        return next(iter(self.rows.stream([rows], torch.device("cpu"))))

    def train_dataloader(self) -> TurnLoader:
        learner: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        self._place(self.rows)
        return TurnLoader(
            self.rows, self.shards, learner.schedule, learner.pace, self.batch_size, self.seed, self.augment
        )

    def val_dataloader(self) -> EvalLoader | list:
        return self._evaluate(self.rows, self.val_ids) if len(self.val_ids) else []

    def test_dataloader(self) -> EvalLoader:
        return self._evaluate(self.test_rows, self.test_ids)

    def _evaluate(self, rows: Rows, ids: Tensor) -> EvalLoader:
        self._place(rows)
        return EvalLoader(rows, ids, self.eval_batch_size, self.trainer.strategy.root_device)  # type: ignore[union-attr]

    def _place(self, rows: Rows) -> None:
        """Stretches pass Lightning unopened, so rows get the trainer's precision (`64-true`) and device all at once."""
        if isinstance(rows, InMemory):
            fields = self.trainer.precision_plugin.convert_input(rows.fields)  # type: ignore[union-attr]
            device = self.trainer.strategy.root_device  # type: ignore[union-attr]
            rows.fields = {name: field.to(device) for name, field in fields.items()}


def _rows(dataset: Dataset, prepare: Normalise, in_memory: bool | None, num_workers: int) -> Rows:
    if in_memory is None:
        x = dataset[0][0]
        in_memory = 4 * torch.as_tensor(x).numel() * len(dataset) <= FITS_IN_MEMORY  # type: ignore[arg-type]
    return InMemory(*load(dataset), prepare) if in_memory else Streamed(dataset, prepare, num_workers)


def _split(num_rows: int, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Return disjoint row indices: one part for each fraction, and the rest, in which training finds its rows."""
    sizes = [round(num_rows * fraction) for fraction in fractions]
    rest = num_rows - sum(sizes)
    if rest < 1 or any(fraction > 0 and size < 1 for fraction, size in zip(fractions, sizes, strict=True)):
        raise ValueError(
            f"{num_rows} rows cannot be split into a test share of {fractions[0]}, a validation share of "
            f"{fractions[1]} and at least one row for training: change `data.test_fraction` or `data.val_fraction`"
        )
    generator = torch.Generator().manual_seed(derive(seed, "split"))
    order = torch.randperm(num_rows, generator=generator) if any(sizes) else torch.arange(num_rows)
    return list(order.split([*sizes, rest]))


def _labels(rows: Rows, dataset: Dataset, num_classes: int) -> Tensor:
    """The label of every row [N], for partitions by label; raises ValueError for one that is out of range."""
    if isinstance(rows, InMemory):
        labels = rows.fields["y"]
    else:
        targets = getattr(dataset, "targets", None)
        labels = torch.as_tensor(targets) if targets is not None else torch.zeros(len(rows), dtype=torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, outside 0..{num_classes - 1}: "
            "number classes from 0, or give the right `num_classes`"
        )
    return labels


def _check(
    batch_size: int,
    eval_batch_size: int,
    val_fraction: float,
    test_fraction: float,
    augment: Augment | None,
    num_columns: int,
) -> None:
    for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`data.{name}` (={size}) must be a whole number of at least 1")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"`data.val_fraction` (={val_fraction}) must lie in [0, 1)")
    if not 0 < test_fraction < 1:
        raise ValueError(f"`data.test_fraction` (={test_fraction}) must lie in (0, 1)")
    if augment is not None and num_columns > 1:
        raise ValueError("`data.augment` needs the whole input: owners of columns would each crop theirs differently")

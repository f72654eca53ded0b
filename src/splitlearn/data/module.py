"""The data of a run as a LightningDataModule: split, dealt to the Alices, batched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from inspect import signature
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from splitlearn.data.alike import Seen, digests, look
from splitlearn.data.checked import Checked
from splitlearn.data.held import fits, hold_what_is_drawn, rows_of
from splitlearn.data.holdout import hold_out, owners_of, rows_trained_on, still_held
from splitlearn.data.loader import Augment, EvalLoader, TurnLoader
from splitlearn.data.new_rows import kind_of
from splitlearn.data.own_table import Part, require
from splitlearn.data.partition import all_rows, iid
from splitlearn.data.partition import columns as deal_columns
from splitlearn.data.rows import (
    Fields,
    InMemory,
    Normalise,
    Rows,
    in_dtype,
    moments,
    tensors_of,
)
from splitlearn.data.sources import Source
from splitlearn.errors import InputError
from splitlearn.layout import Layout, Party, Role, whole
from splitlearn.training.checks import described

FAR = 10.0  # a column's root mean square of which is warned


class SplitData(pl.LightningDataModule):
    """Training rows dealt to the takers of turns, validation and test rows for all.

    All rows of `source.train` are dealt, so that a partition knows them by their place there; then those that are held
    out for testing and validation, the same whatever the partition, are taken out of the shards (an Alice of whose rows
    all would be held out keeps one). `owners` [N] int64
    keeps whose each row of `source.train` is, as a place in `takers`; `labels` [N] int64, -1 where not known.

    Arguments:
        source: where the rows come from.
        layout: says who takes turns, each with a shard of the training rows, and whether parties own columns of the
            input; None: Alices with rows of their own.
        num_alices: how many there are, where they take turns.
        columns: the numbers or names of each one's columns; None for equal blocks.
        batch_size, eval_batch_size: rows in a mini-batch, in training and in evaluation.
        val_fraction: the share of the training rows that is held out for validation, in [0, 1).
        test_fraction: the share held out for testing when the source has no test set of its own, in (0, 1).
        mean, std: per channel, of values that run from 0 to 1; None for no normalisation.
        standardise: take mean and std, per channel or column of a table, from the training rows.
        augment: batch to batch, in training.
        partition: (labels, number of takers, seed) to row indices for each, every row once.
        in_memory: hold all rows as tensors; None does so up to 2 GiB, but for training rows of a data set that draws
            random numbers, an augmentation of its own, say: they are read anew in each epoch.
        num_workers: of the DataLoader that streams rows which are not held in memory.
        seed: of the splits, the shards, the order, and what is drawn.

    Raises ValueError for values outside these ranges, an empty training or test set or shard, and labels out of range.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout | None = None,
        num_alices: int = 1,
        columns: Sequence[Sequence[int | str]] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 1024,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        standardise: bool = False,
        augment: Augment | None = None,
        partition: Callable[[Tensor, int, int], list[Tensor]] = iid,
        in_memory: bool | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        layout = layout or whole(())
        takers, num_columns = layout.takers(num_alices), len(layout.fields)
        self.takers = takers
        _check(batch_size, eval_batch_size, val_fraction, test_fraction, augment, num_columns)
        self.batch_size, self.eval_batch_size, self.seed, self.augment = batch_size, eval_batch_size, seed, augment
        self.num_classes, self.classes, self.names_of_columns = source.num_classes, source.classes, source.columns
        parts = {"data": source.train} if source.test is None else {"data": source.train, "test rows": source.test}
        seen = {where: look(part, where) for where, part in parts.items()}
        self.alike, self.draws = _alike(source, seen), seen["data"].draws
        self.ids: str | None = source.train.ids if isinstance(source.train, Part) else None
        self.names: Sequence[str] = source.train.names if isinstance(source.train, Part) else ()
        self.own_file = source.train.told if isinstance(source.train, Part) else None
        self.lacks: Mapping[int, str] = source.train.lacks if isinstance(source.train, Part) else {}
        fractions = (test_fraction if source.test is None else 0.0, val_fraction)
        test_ids, self.val_ids, train_ids = hold_out(len(source.train), fractions, seed)  # type: ignore[arg-type]
        for where, part in parts.items():
            self._require_finite_values(part, where)  # before a mean makes a whole column of one value
        if standardise:
            mean, std = _moments(source.train, train_ids, mean)
        elif mean is None and source.columns is not None:
            _warn_of_scale(source, train_ids)
        self.columns = _columns(source, num_columns, columns)
        self.is_table = self.columns is not None and len(Checked(source.train).shape) == 1
        self.kind_of_rows = kind_of(source.train)
        self.normalised = {"data.mean": mean, "data.std": std}
        prepare = Normalise(mean, std, self.columns)
        hold = {where: fits(part, seen[where], in_memory) for where, part in parts.items()}
        hold["data"] = hold["data"] and hold_what_is_drawn(source.train, seen["data"], in_memory)
        held = (prepare, num_workers, source.num_classes, seed)
        rows = {where: rows_of(part, where, seen[where], hold[where], *held) for where, part in parts.items()}
        self.rows, self.test_rows = rows["data"], rows.get("test rows", rows["data"])
        self.labels = self.rows.labels
        self.test_ids = test_ids if source.test is None else torch.arange(len(self.test_rows))
        _check_partition(partition, num_columns)
        named = {"ids": self.names} if self.ids is not None and "ids" in signature(partition).parameters else {}
        deal: Callable[..., list[Tensor]] = partial(partition, **named)
        self._deal(dict(zip(takers, deal(self.labels, len(takers), seed), strict=True)), train_ids)

    @property
    def kind(self) -> str:
        """What processes must share, and a checkpoint with the run that tests it: whose rows are trained on."""
        return f"seed {self.seed}, batch size {self.batch_size}, {self._split()}"

    @property
    def settings(self) -> dict[str, Any]:
        """The same with all that is done to the rows, by the names of the configuration."""
        batches = {"data.batch_size": self.batch_size, "data.augment": described(self.augment)}
        named = {f"data.{what}": self.alike[what] for what in ("columns", "classes") if what in self.alike}
        drawn = {"data.in_memory": isinstance(self.rows, InMemory)} if self.draws else {}
        return {"seed": self.seed, **named, **batches, **self.normalised, **drawn, "data.rows": self._split()}

    def preparation(self, field: str) -> dict[str, Any]:
        """Return the `kind` of the rows of an input field as they were read, see `new_rows`, and what was done to them:
        the `mean` and `std` that were taken out.

        Each is a list of one number or of one per channel, or None. Where parties own columns, these are their `places`
        in the whole input, and mean and std, if the input is a table, are those of these columns alone; `columns` are
        their names, None where they have none.
        """
        mean, std = self.normalised["data.mean"], self.normalised["data.std"]
        names, places = self.names_of_columns, None
        if self.columns is not None:
            places = self.columns[int(field[1:])].tolist()
            names = names if names is None else [names[place] for place in places]
            if mean is not None and std is not None and len(mean) > 1 and self.is_table:
                mean, std = [mean[place] for place in places], [std[place] for place in places]
        return {"kind": self.kind_of_rows, "mean": mean, "std": std, "columns": names, "places": places}

    def _split(self) -> str:
        digest = blake2b(digest_size=4)
        for ids in (self.val_ids, self.test_ids, self.owners, *self.shards.values(), *(self.columns or [])):
            digest.update(ids.numpy().tobytes())
        digest.update(str(self.alike).encode())
        rows = f"{len(self.rows)} rows" if self.ids is None else f"{len(self.rows)} rows of ids {self.ids}"
        return f"{rows} split as {digest.hexdigest()}"

    def keep(self, owners: Mapping[str, Role], plays: Callable[[Role], bool]) -> None:
        """Let go of what belongs to other processes' parties: fields by their `owners`, and other Alices' rows.

        Validation and test rows stay with every Alice, since whoever has the turn evaluates. Raises InputError where
        the source lacks a column of what stays, and for a table of one's own where several Alices take turns.
        """
        if self.ids is not None and len(self.shards) > 1:
            rule = "has one Alice or a vertical layout, since who has the turn evaluates on rows of all"
            raise InputError(f"data=own_table {rule}, not {', '.join(self.shards)} in turns: take num_alices=1")
        mine = [ids for taker, ids in self.shards.items() if plays(taker)]
        names = [name for name, role in owners.items() if plays(role) or (role == "alice" and mine)]
        require({name: owners[name] for name in names}, self.columns, self.lacks)
        self.lacks = {}
        ids = torch.cat([*mine, self.val_ids]).unique() if mine else None
        if self.test_rows is not self.rows:
            self.test_rows.keep(names)
        elif ids is not None:
            ids = torch.cat([ids, self.test_ids]).unique()
        self.rows.keep(names, ids)
        known = torch.zeros_like(self.labels, dtype=torch.bool)
        known[slice(None) if ids is None else ids] = "y" in names
        self.labels = torch.where(known, self.labels, -1)

    def setup(self, stage: str) -> None:
        if self.lacks:  # in the simulator, which keeps all
            learner: Any = self.trainer.lightning_module  # type: ignore[union-attr]
            require(learner.layout.owners, self.columns, self.lacks)

    def sample(self, size: int = 2) -> Fields:
        """Return a few training rows, by which a network takes its shapes."""
        shard = next(iter(self.shards.values()))
        rows = shard[torch.arange(size) % len(shard)]
        fields = in_dtype(next(iter(self.rows.stream([rows], torch.device("cpu")))), torch.float32)
        return {name: field.nan_to_num() for name, field in fields.items()} if self.lacks else fields

    def train_dataloader(self) -> TurnLoader:
        learner: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        self._place(self.rows)
        learner.network.check_sizes(
            {t: self._smallest(len(ids), learner.micro_batches) for t, ids in self.shards.items()}
        )
        return TurnLoader(
            self.rows, self.shards, learner.schedule, learner.pace, self.batch_size, self.seed, self.augment
        )

    def val_dataloader(self) -> EvalLoader | list:
        return self._evaluate(self.rows, self.val_ids) if len(self.val_ids) else []

    def test_dataloader(self) -> EvalLoader:
        return self._evaluate(self.test_rows, self.test_ids)

    def predict_dataloader(self) -> EvalLoader:
        """Of the test rows; whose outputs they are, `Prediction.ids` tells."""
        return self.test_dataloader()

    def _smallest(self, num_rows: int, parts: int) -> int:
        """The rows of an Alice's smallest micro-batch, which a short last mini-batch leaves, or a full one."""
        sizes = {min(self.batch_size, num_rows), (num_rows - 1) % self.batch_size + 1}
        return min((size - 1) % -(-size // parts) + 1 for size in sizes)

    def _deal(self, dealt: Mapping[Party, Tensor], train_ids: Tensor) -> None:
        """Give each taker what is dealt to her, less the rows that are held out."""
        self.owners = owners_of(dealt, len(self.rows))
        trained = rows_trained_on(dealt, train_ids, len(self.rows))
        self.shards = {taker: rows[trained[rows]] for taker, rows in dealt.items()}
        self.val_ids = still_held(self.val_ids, trained, "data.val_fraction")
        if self.test_rows is self.rows:
            self.test_ids = still_held(self.test_ids, trained, "data.test_fraction")

    def _evaluate(self, rows: Rows, ids: Tensor) -> EvalLoader:
        self._place(rows)
        owners = self.owners if rows is self.rows else None
        device = self.trainer.strategy.root_device  # type: ignore[union-attr]
        return EvalLoader(rows, ids, self.eval_batch_size, device, owners)

    def _place(self, rows: Rows) -> None:
        """Stretches pass Lightning unopened, so rows get the trainer's precision (`64-true`) and device here."""
        dtype = self.trainer.precision_plugin.convert_input(torch.zeros(())).dtype  # type: ignore[union-attr]
        rows.place(dtype, self.trainer.strategy.root_device)  # type: ignore[union-attr]
        if isinstance(rows, InMemory):
            self._require_finite(rows)

    def _require_finite(self, rows: InMemory) -> None:
        """Raises InputError for a value that no network can train on, with its row and column."""
        for name, field in rows.fields.items():
            if not field.is_floating_point() or bool(torch.isfinite(field).all()):
                continue
            index = (~torch.isfinite(field)).nonzero()[0].tolist()
            value, (row, *place) = field[tuple(index)].item(), index
            row = row if rows.places is None else int((rows.places == row).nonzero())
            block = None if self.columns is None else self.columns[int(name[1:])]
            place = place if block is None else [*place[:-1], int(block[place[-1]])]
            self._refuse(value, row, place, "test rows" if rows is self.test_rows and rows is not self.rows else "data")

    def _require_finite_values(self, dataset: Dataset | None, where: str) -> None:
        """The same of what a source holds as tensors, but for columns that a file of one's own lacks."""
        tensors = tensors_of(dataset)
        if tensors is None or not tensors[0].is_floating_point():
            return
        odd = ~torch.isfinite(tensors[0])
        odd[..., [place for place in self.lacks if place >= 0]] = False
        if bool(odd.any()):
            index = odd.nonzero()[0].tolist()
            self._refuse(tensors[0][tuple(index)].item(), index[0], index[1:], where)

    def _refuse(self, value: float, row: int, place: list[int], where: str) -> None:
        named = f"column {self.names_of_columns[place[-1]]}" if self.names_of_columns else f"place {place}"
        raise InputError(
            f"row {self.names[row] if self.names else row}, {named} of the {where} is {value}, which no loss survives: "
            "mend it, or leave the row out"
        )


def _alike(source: Source, seen: Mapping[str, Seen]) -> dict[str, str]:
    """What all parties must have alike by its name, in the order in which it is compared: in words, or a digest."""
    names = {"classes": source.classes, "columns": source.columns}
    told = {what: ", ".join(map(str, listed)) for what, listed in names.items() if listed is not None}
    told["number of rows"] = str(len(source.train))  # type: ignore[arg-type]
    if not isinstance(source.train, Part):  # which has some of the columns; its ids are compared
        told |= digests(source.train, seen["data"])
    if source.test is not None:
        tested = digests(source.test, seen["test rows"])
        told |= {f"{what} for testing": digest for what, digest in tested.items()}
    return told


def _warn_of_scale(source: Source, ids: Tensor) -> None:
    """Warn of the column of a table that is farthest from what a network learns well from."""
    tensors = tensors_of(source.train)
    if tensors is None or source.columns is None:
        return
    size = tensors[0][ids].double().square().mean(dim=0).sqrt().nan_to_num()  # NaN: a file of one's own lacks it
    if float(size.max()) > FAR:
        rank_zero_warn(
            f"column {source.columns[int(size.argmax())]} has values around {float(size.max()):.3g}, far from mean 0 "
            "and deviation 1, from which networks learn badly: take data.standardise=true"
        )


def _moments(dataset: Dataset, ids: Tensor, mean: object) -> tuple[list[float], list[float]]:
    tensors = tensors_of(dataset)
    if tensors is None or mean is not None:
        why = "these data are not held as tensors" if tensors is None else "`data.mean` is given too"
        raise ValueError(f"`data.standardise` (=True) cannot be, since {why}: give `data.mean` and `data.std` alone")
    return moments(tensors[0][ids])


def _columns(source: Source, num_columns: int, blocks: Sequence[Sequence[int | str]] | None) -> list[Tensor] | None:
    if num_columns > 1:
        width = Checked(source.train).shape[-1]
        return deal_columns(source.columns if source.columns is not None else width, num_columns, blocks)
    if blocks is not None:
        raise ValueError(
            f"`data.columns` (={blocks}) fits the layouts vertical and extended_vanilla, where each Alice owns some: "
            "take one of them, or leave it null"
        )
    return None


def _check_partition(partition: Callable[..., list[Tensor]], num_columns: int) -> None:
    deals = getattr(partition, "func", partition)
    if num_columns > 1 and deals not in (iid, all_rows):
        raise ValueError(
            f"`partition` (={getattr(deals, '__name__', deals)}) deals rows, and these Alices own columns: "
            "take partition=columns"
        )


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

"""The rows of a data set, normalised and cut into the fields that the layout's parties own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from splitlearn.data.checked import Checked
from splitlearn.data.draws import EVALUATION, Drawn
from splitlearn.errors import InputError
from splitlearn.training.stopping import unblock

Fields = dict[str, Tensor]
"""Data fields by name: `x` [B, ...] (or its columns `x0`, `x1`, ...) and `y` [B] int64."""
Prepare = Callable[[Tensor], Fields]
AS_TRACED = f"{InputError.__module__}.{InputError.__qualname__}: "  # before its message, in a traceback
AS_READ = "take data.in_memory=true, which knows labels as they are read, or drop the target_transform"


class Rows(Protocol):
    """Rows by index."""

    @property
    def labels(self) -> Tensor:
        """The label of every row [N] int64, -1 where only reading it would tell."""
        ...

    def __len__(self) -> int: ...

    def keep(self, names: Collection[str], ids: Tensor | None = None) -> None:
        """Let go of all fields but these, and of all rows but `ids`; None keeps all rows."""
        ...

    def place(self, dtype: torch.dtype, device: torch.device) -> None:
        """From now on fields of floating point are of this type; what is held in memory lies on `device`."""
        ...

    def stream(
        self, batches: Iterable[Tensor], device: torch.device, passes: Iterable[int] | None = None
    ) -> Iterator[Fields]:
        """Yield the fields of each batch of row indices in turn, on `device`; none where rows were let go of.

        A data set that draws random numbers does so anew in each of the `passes`, one for each batch; without them it
        draws what it does in every evaluation.
        """
        ...


class Normalise:
    """Turn raw inputs into fields: pixels to 0..1, minus the mean, over the deviation, in columns.

    Arguments:
        mean, std: per channel, or one number for all; None leaves the values as they are.
        columns: for each party that owns some, their indices in the last dimension; None keeps the input whole.
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        columns: Sequence[Tensor] | None = None,
    ) -> None:
        if (mean is None) != (std is None) or (std is not None and min(std) <= 0):
            raise ValueError(f"`mean` (={mean}) and `std` (={std}) must be given together, `std` above 0")
        self.mean, self.std, self.columns = mean, std, columns

    def __call__(self, x: Tensor) -> Fields:
        # In place from the first copy on: at no time are there two float copies of a data set.
        x = x.float().div_(255) if x.dtype == torch.uint8 else x.clone() if self.mean is not None else x
        if self.mean is not None and self.std is not None:
            x.sub_(_per_channel(self.mean, x)).div_(_per_channel(self.std, x))
        if self.columns is None:
            return {"x": x}
        return {f"x{i}": x.index_select(-1, block.to(x.device)) for i, block in enumerate(self.columns)}


class InMemory:
    """Rows held as tensors and normalised once; a batch is a slice of them, taken on the device where they lie.

    Arguments:
        x: [N, ...] raw inputs. y: [N] int64 labels. prepare: raw inputs to fields.
    """

    def __init__(self, x: Tensor, y: Tensor, prepare: Prepare) -> None:
        if len(x) != len(y):
            raise ValueError(f"{len(x)} inputs and {len(y)} labels: every row must have both")
        self.fields: Fields = {**prepare(x), "y": y}  # as the trainer at hand takes them
        self.as_read = self.fields  # a trainer of more bits may come after one of fewer
        self.num_rows = len(y)
        self.places: Tensor | None = None  # of each row among those kept, -1 where it is not; None: all are kept

    @property
    def labels(self) -> Tensor:
        return self.fields["y"]

    def __len__(self) -> int:
        return self.num_rows

    def keep(self, names: Collection[str], ids: Tensor | None = None) -> None:
        self.fields = self.as_read = {
            name: field if ids is None else field[ids] for name, field in self.as_read.items() if name in names
        }
        if ids is not None:
            self.places = torch.full((self.num_rows,), -1)
            self.places[ids] = torch.arange(len(ids))

    def place(self, dtype: torch.dtype, device: torch.device) -> None:
        placed = {name: field.to(device) for name, field in in_dtype(self.as_read, dtype).items()}
        if all(placed[name].dtype == field.dtype for name, field in self.as_read.items()):
            self.as_read = placed  # no second copy where no bit is lost
        self.fields = placed

    def stream(
        self, batches: Iterable[Tensor], device: torch.device, passes: Iterable[int] | None = None
    ) -> Iterator[Fields]:
        for rows in batches:
            places = rows if self.places is None else self.places[rows]
            kept = self.fields if self.places is None or int(places.min()) >= 0 else {}
            yield {name: field.index_select(0, places.to(field.device)).to(device) for name, field in kept.items()}


class Streamed:
    """Rows read from a `torch.utils.data.Dataset` by the workers of a DataLoader, for data larger than memory.

    `labels` are the data set's `targets`, where it has them; a row that is read with another is refused. `seed` is that
    of the random numbers which the data set draws; None: it draws none.
    """

    def __init__(
        self,
        dataset: Dataset,
        prepare: Prepare,
        num_workers: int = 0,
        num_classes: int | None = None,
        where: str = "data",
        seed: int | None = None,
    ) -> None:
        self.num_classes, self.where = num_classes, where  # by which labels are checked when they are read
        self.dataset, self.prepare, self.num_workers = Checked(dataset, where), prepare, num_workers
        self.seed = seed
        self.names: Collection[str] | None = None  # None: all
        self.dtype = torch.float32
        self.kept = torch.ones(len(self.dataset), dtype=torch.bool)
        self.labels = torch.full((len(self),), -1)
        if hasattr(dataset, "targets"):
            self.labels = as_labels(torch.as_tensor(dataset.targets), where)
            if len(self.labels) != len(self):
                raise InputError(f"{len(self.labels)} `targets` and {len(self)} rows: {AS_READ}")

    def __len__(self) -> int:
        return len(self.dataset)

    def keep(self, names: Collection[str], ids: Tensor | None = None) -> None:
        self.names = names
        if ids is not None or not names:
            self.kept = torch.zeros_like(self.kept)
            self.kept[ids if names else []] = True

    def place(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype

    def stream(
        self, batches: Iterable[Tensor], device: torch.device, passes: Iterable[int] | None = None
    ) -> Iterator[Fields]:
        batches = list(batches)
        passes = [EVALUATION] * len(batches) if passes is None else passes
        wanted = [bool(self.kept[rows].all()) for rows in batches]
        places = [
            rows.tolist() if self.seed is None else [(number, row) for row in rows.tolist()]
            for rows, number, wants in zip(batches, passes, wanted, strict=True)
            if wants
        ]
        loader = DataLoader(
            self.dataset if self.seed is None else Drawn(self.dataset, self.seed),
            batch_sampler=places,
            num_workers=self.num_workers,
            collate_fn=partial(_collate, num_classes=self.num_classes, where=self.where),
            multiprocessing_context=multiprocessing.get_all_start_methods()[0] if self.num_workers else None,
            worker_init_fn=unblock,  # else a worker would not end by SIGTERM, and be waited for
            pin_memory=device.type == "cuda",
        )
        read = iter(loader)
        for rows, wants in zip(batches, wanted, strict=True):
            try:
                x, y = next(read) if wants else (None, None)
            except InputError as error:  # a worker's has its traceback before the message
                raise InputError(str(error).strip().splitlines()[-1].removeprefix(AS_TRACED)) from error
            if x is None or y is None:
                yield {}
            else:
                self.compare(rows, y)
                yield self._fields(x, y, device)

    def compare(self, rows: Tensor, y: Tensor) -> None:
        """Raises InputError where labels y [B], as they were read, are not those by which these rows [B] are known."""
        told, read = self.labels[rows], as_labels(y, self.where)
        odd = ((told >= 0) & (told != read)).nonzero()
        if len(odd):
            i = int(odd[0])
            raise InputError(
                f"{_labels_of(self.where)} must be those in `targets`, by which rows are dealt: row {int(rows[i])} has "
                f"{int(told[i])} there and {int(read[i])} when it is read; {AS_READ}"
            )

    def _fields(self, x: Tensor, y: Tensor, device: torch.device) -> Fields:
        fields = {
            **in_dtype(self.prepare(x.to(device, non_blocking=True)), self.dtype),
            "y": as_labels(y.to(device, non_blocking=True), self.where),
        }
        return {name: field for name, field in fields.items() if self.names is None or name in self.names}


def tensors_of(dataset: Dataset | None) -> tuple[Tensor, ...] | None:
    """Return x [N, ...] and labels [N] of a data set whose items are slices of them; None for any other.

    One with a `__getitem__` of its own is another, e.g. a subclass of TensorDataset that adds a transform.
    """
    if not isinstance(dataset, TensorDataset) or len(dataset.tensors) != 2:
        return None
    own = type(dataset)
    inherits = own.__getitem__ is TensorDataset.__getitem__ and own.__len__ is TensorDataset.__len__
    return dataset.tensors if inherits else None


def load(dataset: Dataset, where: str = "data", seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Read a whole map-style data set of (x, label) into tensors [N, ...] and [N] int64.

    `seed` is that of the random numbers which the data set draws; None: it draws none.
    """
    tensors = tensors_of(dataset)
    if tensors is not None:
        return tensors[0], as_labels(tensors[1], where)
    rows = Checked(dataset, where)
    items = (rows[i] if seed is None else Drawn(rows, seed)[EVALUATION, i] for i in range(len(rows)))
    xs, ys = zip(*items, strict=True)
    return torch.stack(xs), as_labels(torch.as_tensor(ys), where)


def _collate(items: list[tuple[Tensor, Any]], num_classes: int | None, where: str) -> Any:
    x, y = default_collate(items)
    if num_classes is not None:
        check_range(as_labels(y, where), num_classes, where)
    return x, y


def check_range(labels: Tensor, num_classes: int, where: str = "data") -> None:
    """Raises InputError unless labels [N] lie in 0..num_classes-1."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise InputError(
            f"{_labels_of(where)} run from {int(labels.min())} to {int(labels.max())}, outside 0..{num_classes - 1}: "
            "number classes from 0, or give the right `num_classes`"
        )


def as_labels(y: Tensor, where: str = "data") -> Tensor:
    """Return labels [N] int64 of [N] or [N, 1]; InputError for others, and for those that are no whole numbers."""
    if y.ndim != 1 and (y.ndim != 2 or y.shape[1] != 1):
        raise InputError(
            f"{_labels_of(where)} have shape {list(y.shape)}: they must be one whole number a row, [N] or [N, 1]"
        )
    if y.is_floating_point() or y.is_complex():
        raise InputError(
            f"{_labels_of(where)} are {y.dtype}: they must be whole numbers that count classes, e.g. by `.long()`"
        )
    return y.flatten().long()


def _labels_of(where: str) -> str:
    return "labels" if where == "data" else f"labels of the {where}"


def in_dtype(fields: Fields, dtype: torch.dtype) -> Fields:
    """Return the fields with those of floating point in this type."""
    return {name: field.to(dtype) if field.is_floating_point() else field for name, field in fields.items()}


def moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and deviation of each channel of [N, C, ...], as `Normalise` takes them.

    A channel of one value throughout has deviation 1, so that it becomes 0.
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else x.double()
    std, mean = torch.std_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
    return mean.tolist(), torch.where(std > 0, std, 1.0).tolist()


def _per_channel(values: Sequence[float], x: Tensor) -> Tensor:
    """Shape [1, C, 1, 1] beside images [N, C, H, W]; a single value fits inputs of any shape."""
    if len(values) == 1:
        return torch.tensor(values[0], dtype=x.dtype, device=x.device)
    if x.ndim < 2 or x.shape[1] != len(values):
        raise ValueError(f"{len(values)} values of `mean` or `std` do not fit inputs of shape {list(x.shape[1:])}")
    return torch.tensor(values, dtype=x.dtype, device=x.device).view(1, -1, *[1] * (x.ndim - 2))

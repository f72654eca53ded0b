"""The rows of a data set, normalised and cut into the fields that the layout's parties own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Fields = dict[str, Tensor]
"""Data fields by name: `x` [B, ...] (or its columns `x0`, `x1`, ...) and `y` [B] int64."""
Prepare = Callable[[Tensor], Fields]


class Rows(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def keep(self, names: Collection[str], ids: Tensor | None = None) -> None:
        """Let go of all fields but these, and of all rows but `ids`; None keeps all rows."""
        ...

    def stream(self, batches: Iterable[Tensor], device: torch.device) -> Iterator[Fields]:
        """Yield the fields of each batch of row indices in turn, on `device`; none where rows were let go of."""
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
        self.fields: Fields = {**prepare(x), "y": y}
        self.num_rows = len(y)
        self.places: Tensor | None = None  # of each row among those kept, -1 where it is not; None: all are kept

    def __len__(self) -> int:
        return self.num_rows

    def keep(self, names: Collection[str], ids: Tensor | None = None) -> None:
        self.fields = {
            name: field if ids is None else field[ids] for name, field in self.fields.items() if name in names
        }
        if ids is not None:
            self.places = torch.full((self.num_rows,), -1)
            self.places[ids] = torch.arange(len(ids))

    def stream(self, batches: Iterable[Tensor], device: torch.device) -> Iterator[Fields]:
        for rows in batches:
            places = rows if self.places is None else self.places[rows]
            kept = self.fields if self.places is None or int(places.min()) >= 0 else {}
            yield {name: field.index_select(0, places.to(field.device)).to(device) for name, field in kept.items()}


class Streamed:
    """Rows read from a `torch.utils.data.Dataset` by the workers of a DataLoader, for data larger than memory."""

    def __init__(self, dataset: Dataset, prepare: Prepare, num_workers: int = 0) -> None:
        self.dataset, self.prepare, self.num_workers = dataset, prepare, num_workers
        self.names: Collection[str] | None = None  # None: all
        self.kept = torch.ones(len(dataset), dtype=torch.bool)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def keep(self, names: Collection[str], ids: Tensor | None = None) -> None:
        self.names = names
        if ids is not None or not names:
            self.kept = torch.zeros_like(self.kept)
            self.kept[ids if names else []] = True

    def stream(self, batches: Iterable[Tensor], device: torch.device) -> Iterator[Fields]:
        batches = list(batches)
        wanted = [bool(self.kept[rows].all()) for rows in batches]
        loader = DataLoader(
            self.dataset,
            batch_sampler=[rows.tolist() for rows, wants in zip(batches, wanted, strict=True) if wants],
            num_workers=self.num_workers,
            multiprocessing_context=multiprocessing.get_all_start_methods()[0] if self.num_workers else None,
            pin_memory=device.type == "cuda",
        )
        read = iter(loader)
        for wants in wanted:
            x, y = next(read) if wants else (None, None)
            yield {} if x is None or y is None else self._fields(x, y, device)

    def _fields(self, x: Tensor, y: Tensor, device: torch.device) -> Fields:
        fields = {**self.prepare(x.to(device, non_blocking=True)), "y": y.to(device, non_blocking=True).long()}
        return {name: field for name, field in fields.items() if self.names is None or name in self.names}


def load(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Read a whole map-style data set of (x, label) into tensors [N, ...] and [N] int64."""
    tensors = getattr(dataset, "tensors", None)
    if tensors is not None:
        return tensors[0], tensors[1].long()
    xs, ys = zip(*(dataset[i] for i in range(len(dataset))), strict=True)  # type: ignore[arg-type]
    return torch.stack([torch.as_tensor(x) for x in xs]), torch.as_tensor(ys, dtype=torch.int64)


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

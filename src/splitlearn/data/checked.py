"""A user's data set, row by row: whatever goes wrong in it is told with the row's number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from splitlearn.data.draws import seeded
from splitlearn.errors import InputError


class Checked(Dataset):
    """The rows of a user's data set, x as a tensor [...] of row 0's shape, and their labels.

    Raises InputError, by the row's number, for what the data set raises, and for a row of another shape. `where` says
    which rows they are.
    """

    def __init__(self, dataset: Dataset, where: str = "data") -> None:
        self.dataset, self.where = dataset, where
        with seeded(0):
            self.shape = self._read(0)[0].shape  # a batch's own rows would not tell: all of them may have another one

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        x, y = self._read(row)
        if x.shape != self.shape:
            unlike = f"row {row} of the {self.where} has shape {list(x.shape)}, and row 0 {list(self.shape)}"
            raise InputError(f"{unlike}: rows must be of one shape; pad or crop them in the data set")
        return x, y

    def _read(self, row: int) -> tuple[Tensor, Any]:
        with naming_row(row, self.where):
            x, y = self.dataset[row]
            return torch.as_tensor(x), y


@contextmanager
def naming_row(row: int, where: str) -> Iterator[None]:
    """Raises InputError, in one line with the row's number, for whatever goes wrong in a user's data set."""
    try:
        yield
    except InputError:  # names a file
        raise
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"row {row} of the {where} cannot be read ({told}): mend it, or leave it out") from error

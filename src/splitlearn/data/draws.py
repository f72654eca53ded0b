"""Random numbers that a data set draws as its rows are read: a function of the seed, like all others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import Dataset

from splitlearn.seeds import derive

EVALUATION = -1  # in place of a pass: whenever a row is evaluated, it draws the same


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it the global generators of torch's CPU, numpy and `random` draw by `seed`; then they are as before."""
    with isolate_rng(include_cuda=False):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield


def draw() -> tuple[float, ...]:
    """Return one number of each of these generators, to see where they are."""
    return random.random(), float(np.random.random()), float(torch.rand(()))


class Drawn(Dataset):
    """A data set whose items are asked for by (pass, row), and draw by the seed, the pass and the row alone."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        with seeded(derive(self.seed, "rows", *place)):
            return self.dataset[place[1]]

"""Which rows are held in memory as tensors, and which are streamed."""

from __future__ import annotations

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from splitlearn.data.alike import Seen
from splitlearn.data.rows import InMemory, Normalise, Rows, Streamed, check_range, load

FITS_IN_MEMORY = 2 * 1024**3  # bytes of float32; larger data sets are streamed unless `in_memory` says otherwise


def fits(dataset: Dataset, seen: Seen, asked: bool | None) -> bool:
    """Whether to hold rows in memory, by their size unless it is `asked` for."""
    if asked is not None:
        return asked
    x, _ = seen.rows.get(0) or dataset[0]
    return 4 * torch.as_tensor(x).numel() * len(dataset) <= FITS_IN_MEMORY  # type: ignore[arg-type]


def hold_what_is_drawn(dataset: Dataset, seen: Seen, asked: bool | None) -> bool:
    """Whether to hold training rows: not those for which random numbers are drawn, unless it is `asked` for."""
    name = type(dataset).__name__
    if asked and seen.draws:
        rank_zero_warn(
            f"`data.in_memory` (=True) reads each row of {name} once, and the random numbers that it draws stay the "
            "same in all epochs: with data.in_memory=false they are drawn anew"
        )
    elif not seen.by_seed:
        rank_zero_warn(
            f"{name} draws random numbers from a generator of its own, which a resumed run does not find where it was: "
            "draw from torch's, numpy's or random's global one"
        )
    return bool(asked) or not seen.draws


def rows_of(
    dataset: Dataset,
    where: str,
    seen: Seen,
    in_memory: bool,
    prepare: Normalise,
    num_workers: int,
    num_classes: int,
    seed: int,
) -> Rows:
    """Raises InputError for labels that are out of range, or that are not those by which the data set knows rows."""
    draws_by = seed if seen.draws else None
    if in_memory:
        held = InMemory(*load(dataset, where, draws_by), prepare)
        check_range(held.labels, num_classes, where)
        return held
    streamed = Streamed(dataset, prepare, num_workers, num_classes, where, draws_by)
    if seen.rows:
        streamed.compare(torch.tensor(list(seen.rows)), torch.as_tensor([y for _, y in seen.rows.values()]))
    if hasattr(dataset, "targets"):
        check_range(streamed.labels, num_classes, where)
    return streamed

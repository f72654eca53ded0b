"""Which rows are held out for testing and validation, and whose the others are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitlearn.layout import Party
from splitlearn.seeds import derive


def hold_out(num_rows: int, fractions: Sequence[float], seed: int) -> list[Tensor]:
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


def owners_of(dealt: Mapping[Party, Tensor], num_rows: int) -> Tensor:
    """Whose each row is, as a place in `dealt` [N]. Raises ValueError unless each row is dealt once."""
    rows = torch.cat(list(dealt.values()))
    if not torch.equal(rows.sort().values, torch.arange(num_rows)):
        raise ValueError(
            f"`partition` deals {len(rows)} rows, {len(rows.unique())} different ones: it must give each of the rows "
            f"0..{num_rows - 1} to exactly one party"
        )
    owners = torch.empty(num_rows, dtype=torch.int64)
    for place, shard in enumerate(dealt.values()):
        owners[shard] = place
    return owners


def rows_trained_on(dealt: Mapping[Party, Tensor], ids: Tensor, num_rows: int) -> Tensor:
    """Which rows are trained on [N]: those among `ids`, and one of each party all of whose rows are held out."""
    trained = torch.zeros(num_rows, dtype=torch.bool)
    trained[ids] = True
    for taker, rows in dealt.items():
        if len(rows) == 0:
            raise ValueError(f"`partition` gives {taker} no row: take fewer Alices or another partition")
        if not trained[rows].any():
            trained[rows[0]] = True
    return trained


def still_held(ids: Tensor, trained: Tensor, key: str) -> Tensor:
    held = ids[~trained[ids]]
    if len(ids) and not len(held):
        raise ValueError(f"`{key}` holds out {len(ids)} rows, which Alices without others need: take fewer Alices")
    return held

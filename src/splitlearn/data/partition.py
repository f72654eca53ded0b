"""Who gets which rows: pure functions of (labels, number of Alices, seed) that deal every row exactly once.

`labels` [N] int64 are -1 where they are not known before training. Each function returns one tensor of row indices,
int64, for each Alice, none of them empty, and raises ValueError where that cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from splitlearn.data.csv_file import lines_of
from splitlearn.data.labels import WHOLE, require_one_spelling
from splitlearn.seeds import derive

HEADER = ["id", "party"]
LARGEST_ALPHA = 1e6  # the shares are equal to a thousandth, and far beyond it numpy would overflow


def iid(labels: Tensor, num_shards: int, seed: int) -> list[Tensor]:
    """Deal the rows at random into shards whose sizes differ by at most one."""
    _check_shards(labels, num_shards)
    generator = torch.Generator().manual_seed(derive(seed, "partition"))
    return list(torch.randperm(len(labels), generator=generator).tensor_split(num_shards))


def dirichlet(labels: Tensor, num_shards: int, seed: int, alpha: float = 0.5) -> list[Tensor]:
    """Skew the labels: the shares of the Alices in each class are drawn from Dirichlet(alpha, ..., alpha).

    After Yurochkin et al. 2019 (arXiv 1905.12022), "label skew" in Li et al. 2022 (arXiv 2102.02079). Hsu et al. 2019
    draw each Alice's classes instead. The smaller `alpha`, the fewer classes an Alice sees; large, it becomes `iid`.
    They leave Alices empty or draw again; here an empty one takes one row from the largest.
    """
    _check_shards(labels, num_shards)
    _check_labels(labels, "dirichlet")
    _check_alpha(alpha)
    rng = np.random.default_rng(derive(seed, "partition"))
    parts = [_cut(_shuffled(labels == label, rng), num_shards, alpha, rng) for label in labels.unique()]
    return _fill([torch.cat(shard) for shard in zip(*parts, strict=True)])


def label_shards(labels: Tensor, num_shards: int, seed: int, num_classes: int = 2) -> list[Tensor]:
    """Give each Alice exactly `num_classes` classes, and deal a class's rows evenly among those who have it.

    The pathological split of McMahan et al. 2017 (arXiv 1602.05629), who cut the rows sorted by label into shards, so
    that an Alice may get fewer classes; dealt by class as in Li et al. 2022 (arXiv 2102.02079). Each Alice takes the
    classes that the fewest have so far, and draws among equals: classes differ by at most one owner.
    """
    _check_shards(labels, num_shards)
    _check_labels(labels, "label_shards")
    classes, sizes = labels.unique(return_counts=True)
    _check_classes(num_classes, len(classes), num_shards)
    rng = np.random.default_rng(derive(seed, "partition"))
    owners: list[list[int]] = [[] for _ in classes]
    for shard in range(num_shards):
        order = sorted(rng.permutation(len(classes)), key=lambda c: len(owners[c]))
        for c in order[:num_classes]:
            owners[c].append(shard)
    parts: list[list[Tensor]] = [[] for _ in range(num_shards)]
    for label, size, holders in zip(classes.tolist(), sizes.tolist(), owners, strict=True):
        if size < len(holders):
            rule = f"`partition.num_classes` (={num_classes}) lets {len(holders)} Alices have class {label}"
            raise ValueError(f"{rule}, which has {size} rows: take fewer Alices or fewer classes each")
        for shard, rows in zip(holders, _shuffled(labels == label, rng).tensor_split(len(holders)), strict=True):
            parts[shard].append(rows)
    return [torch.cat(part) for part in parts]


def quantity(labels: Tensor, num_shards: int, seed: int, alpha: float = 1.0) -> list[Tensor]:
    """Skew the sizes: the Alices' shares of the shuffled rows are drawn from Dirichlet(alpha, ..., alpha).

    "Quantity skew" in Li et al. 2022 (arXiv 2102.02079). An Alice left empty takes one row from the largest.
    """
    _check_shards(labels, num_shards)
    _check_alpha(alpha)
    rng = np.random.default_rng(derive(seed, "partition"))
    return _fill(_cut(_shuffled(torch.ones(len(labels), dtype=torch.bool), rng), num_shards, alpha, rng))


def by_file(
    labels: Tensor,
    num_shards: int,
    seed: int,
    path: str | Path,
    encoding: str = "utf-8",
    ids: Sequence[str] | None = None,
) -> list[Tensor]:
    """Deal as a CSV file says: header `id,party`, then a line for each row of the training source.

        id,party
        0,alice1
        1,alice0

    Parties are alice0, alice1, ... An id is one of `ids`, the rows' own in their order, which SplitData gives where the
    source has them (`data=own_table`); else a row's place in the source, from 0 on. Rows that are held out for
    validation stand in it too. `seed` changes nothing. FileNotFoundError where there is no such file.
    """
    _check_shards(labels, num_shards)
    path, alices = Path(path).expanduser(), {f"alice{i}": i for i in range(num_shards)}
    places = None if ids is None else {name: i for i, name in enumerate(ids)}
    owners = [-1] * len(labels)
    lines: dict[int, str] = {}  # where each row stands
    for line, name, party in _read(path, encoding):
        where = f"{line}, id {name}"
        row = _place(name, len(labels)) if places is None else places.get(name)
        if row is None:
            require_one_spelling({**dict.fromkeys(places or [], "the source"), name: line}, "id", WHOLE)
            known = f"the source's rows 0 to {len(labels) - 1}" if places is None else "the rows' own ids"
            raise ValueError(f"{where}: not among {known}; remove the line, or mend all ids if they count otherwise")
        if row in lines:
            raise ValueError(
                f"{where}: {lines[row].removeprefix(f'{path}, ')} deals it already, each row once; remove one line"
            )
        if party not in alices:
            raise ValueError(f"{where}: `{party}` is not among alice0 to alice{num_shards - 1}; see `num_alices`")
        lines[row], owners[row] = line, alices[party]
    _check_dealt(path, owners, num_shards, range(len(labels)) if ids is None else ids)
    dealt = torch.tensor(owners)
    return [(dealt == i).nonzero()[:, 0] for i in range(num_shards)]


def all_rows(labels: Tensor, num_shards: int, seed: int) -> list[Tensor]:
    """All rows in one piece: the Alices own columns of them."""
    if num_shards != 1:
        raise ValueError(
            "`partition` (=columns) fits the layouts vertical and extended_vanilla, where each Alice owns columns: "
            "take one of them, or a partition that deals rows"
        )
    return [torch.arange(len(labels))]


def columns(
    names: int | Sequence[str], num_shards: int, blocks: Sequence[Sequence[int | str]] | None = None
) -> list[Tensor]:
    """Deal the columns of the input, its last dimension, and not its rows: column indices for each Alice.

    Arguments:
        names: of the columns, or how many there are.
        blocks: for each Alice the numbers or names of her columns, in the order she sees them; None for equal
            neighbouring blocks.
    """
    width = names if isinstance(names, int) else len(names)
    if blocks is None:
        if width < num_shards:
            raise ValueError(f"`num_alices` (={num_shards}) must not exceed the {width} columns of the input")
        return list(torch.arange(width).tensor_split(num_shards))
    if isinstance(blocks, str) or len(blocks) != num_shards or not all(_is_list(block) for block in blocks):
        rule = f"must have a list of at least one column for each of {num_shards} Alices"
        raise ValueError(f"`data.columns` (={blocks}) {rule}: see `num_alices`")
    found = [[_find_column(column, names) for column in block] for block in blocks]
    owned = [column for block in found for column in block]
    for column, times in enumerate(torch.bincount(torch.tensor(owned), minlength=width).tolist()):
        if times != 1:
            name = f"column {column}" if isinstance(names, int) else f"`{names[column]}`"
            raise ValueError(f"`data.columns` lists {name} {times} times: each column must have exactly one owner")
    return [torch.tensor(block) for block in found]


def _is_list(block: object) -> bool:
    return isinstance(block, Sequence) and not isinstance(block, str) and len(block) > 0


def _find_column(column: int | str, names: int | Sequence[str]) -> int:
    if isinstance(column, str) and isinstance(names, int):
        raise ValueError(f"`data.columns` has `{column}`, but these columns have no names: number them from 0 on")
    if isinstance(column, str) and column not in names:  # type: ignore[operator]
        few = ", ".join(names[:5])  # type: ignore[index]
        raise ValueError(f"`data.columns` has `{column}`, which is not a column: the first of them are {few}")
    if isinstance(column, str):
        return names.index(column)  # type: ignore[union-attr]
    width = names if isinstance(names, int) else len(names)
    if isinstance(column, bool) or not 0 <= column < width:
        raise ValueError(f"`data.columns` has column {column}: columns are numbered 0 to {width - 1}")
    return column


def _shuffled(chosen: Tensor, rng: np.random.Generator) -> Tensor:
    """The rows where `chosen` [N] holds, in random order."""
    rows = chosen.nonzero()[:, 0]
    return rows[torch.from_numpy(rng.permutation(len(rows)))]


def _cut(rows: Tensor, num_shards: int, alpha: float, rng: np.random.Generator) -> list[Tensor]:
    ends = rng.dirichlet(np.full(num_shards, alpha)).cumsum()[:-1] * len(rows)
    return list(rows.tensor_split(ends.round().astype(int).tolist()))


def _fill(shards: list[Tensor]) -> list[Tensor]:
    """Let each empty shard have one row of the largest, which has two or more while one is empty."""
    for i, shard in enumerate(shards):
        if len(shard) == 0:
            largest = max(range(len(shards)), key=lambda j: len(shards[j]))
            shards[largest], shards[i] = shards[largest][:-1], shards[largest][-1:]
    return shards


def _read(path: Path, encoding: str) -> Iterator[tuple[str, str, str]]:
    """Yield (where it stands, id, party) for each line of the file but the first and empty ones."""
    lines = lines_of(path, "partition", "path", encoding)
    where, header = next(lines)
    if header != HEADER:
        raise ValueError(f"{where}: the header must be id,party, not {','.join(header)}")
    for where, (name, party) in lines:
        yield where, name, party


def _place(name: str, num_rows: int) -> int | None:
    place = int(name) if name.isascii() and name.isdecimal() and len(name) < 19 else num_rows
    return place if place < num_rows else None


def _check_dealt(path: Path, owners: list[int], num_shards: int, ids: Sequence[object]) -> None:
    missing = [name for name, owner in zip(ids, owners, strict=True) if owner < 0]
    if missing:
        few = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{path} has no line for {len(missing)} rows of the source, id {few}: give each row an owner")
    empty = set(range(num_shards)) - set(owners)
    if empty:
        raise ValueError(f"{path} gives alice{min(empty)} no row: give her one, or lower `num_alices` (={num_shards})")


def _check_shards(labels: Tensor, num_shards: int) -> None:
    if not 1 <= num_shards <= len(labels):
        raise ValueError(
            f"`num_alices` (={num_shards}) must lie between 1 and the number of training samples (={len(labels)}): "
            "no shard may be empty"
        )


def _check_labels(labels: Tensor, name: str) -> None:
    if bool((labels < 0).any()):
        raise ValueError(
            f"`partition` (={name}) deals rows by their labels, which are not known before training: give the data "
            "set a `targets` attribute, or hold its rows in memory with data.in_memory=true"
        )


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= LARGEST_ALPHA:
        raise ValueError(
            f"`partition.alpha` (={alpha}) must be above 0 and at most {LARGEST_ALPHA:g}: small is skewed, large even"
        )


def _check_classes(num_classes: int, existing: int, num_shards: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or not 1 <= num_classes <= existing:
        raise ValueError(
            f"`partition.num_classes` (={num_classes}) must be a whole number from 1 to {existing}: the data have no "
            "more classes than that"
        )
    if num_shards * num_classes < existing:
        raise ValueError(
            f"`partition.num_classes` (={num_classes}) times `num_alices` (={num_shards}) must be at least {existing}, "
            f"the classes of the data, or some would have no owner: take num_classes={math.ceil(existing / num_shards)}"
        )

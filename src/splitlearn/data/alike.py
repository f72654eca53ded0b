"""What tells two data sets apart that should be one: each party of a run reads its own copy."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from splitlearn.data.checked import Checked
from splitlearn.data.draws import draw, seeded
from splitlearn.data.rows import tensors_of

SAMPLED = 8  # rows of a data set that is too large, or too slow, to read as a whole


class Seen(NamedTuple):
    """A few rows of a data set by their places.

    `draws` tells whether random numbers are drawn for a row when it is read, or it is another each time; `by_seed`
    whether it is the same again where torch's, numpy's and random's global generators are.
    """

    rows: dict[int, tuple[Tensor, Any]]
    draws: bool
    by_seed: bool


def look(dataset: Dataset, where: str = "data") -> Seen:
    """Read up to eight rows twice, and again where they differ; none of a data set that is held as tensors."""
    if tensors_of(dataset) is not None:
        return Seen({}, False, True)
    checked = Checked(dataset, where)
    (rows, drew), (others, _) = (_read(checked, seed) for seed in (0, 1))
    draws = drew or not _equal(rows, others)
    return Seen(rows, draws, not draws or _equal(rows, _read(checked, 0)[0]))


def digests(dataset: Dataset, seen: Seen) -> dict[str, str]:
    """Return digests of `labels`, in order, of `rows`, in whatever order, and of the `order of rows`.

    Of tensors every value counts. Of pictures in folders the names, classes and sizes of all files count, and the bytes
    of eight of them: two versions of a decoder may give other pixels. Of any other data set eight rows count, if
    nothing is drawn for them, and the labels if it has `targets`.
    """
    tensors = tensors_of(dataset)
    if tensors is not None:
        x, labels = tensors[0], tensors[1]
        return {**_labels(labels), **_rows(_bytes(row) for row in torch.as_tensor(x))}
    if isinstance(dataset, ImageFolder) and type(dataset).__getitem__ is ImageFolder.__getitem__:
        paths = [Path(path) for path, _ in dataset.samples]
        opened = {i: paths[i].read_bytes() for i in _some(len(paths))}
        named = (
            f"{path.relative_to(dataset.root).as_posix()} {path.stat().st_size} ".encode() + opened.get(i, b"")
            for i, path in enumerate(paths)
        )
        return {**_labels(torch.as_tensor(dataset.targets)), **_rows(named)}
    told = _labels(torch.as_tensor(dataset.targets)) if hasattr(dataset, "targets") else {}
    return told if seen.draws else {**told, **_rows(map(_item, seen.rows.values()))}


def _labels(labels: Tensor) -> dict[str, str]:
    return {"labels": blake2b(_bytes(torch.as_tensor(labels).long()), digest_size=8).hexdigest()}


def _rows(rows: Iterable[bytes]) -> dict[str, str]:
    """A row that is changed changes both, two that have changed places the order alone."""
    total, order = 0, blake2b(digest_size=8)
    for row in rows:
        digest = blake2b(row, digest_size=8).digest()
        total = (total + int.from_bytes(digest, "big")) % 2**64
        order.update(digest)
    return {"rows": f"{total:016x}", "order of rows": order.hexdigest()}


def _read(rows: Checked, seed: int) -> tuple[dict[int, tuple[Tensor, Any]], bool]:
    """Return some rows, and whether they drew numbers: one in ten may be flipped, say, and none of these."""
    with seeded(seed):
        first = draw()
    with seeded(seed):
        return {i: rows[i] for i in _some(len(rows))}, draw() != first


def _equal(rows: dict[int, tuple[Tensor, Any]], others: dict[int, tuple[Tensor, Any]]) -> bool:
    return all(_item(row) == _item(others[i]) for i, row in rows.items())


def _some(length: int) -> list[int]:
    """Up to eight places, evenly spread, first and last among them."""
    return torch.linspace(0, length - 1, min(SAMPLED, length)).long().tolist()


def _item(item: tuple) -> bytes:
    return b"".join(_bytes(torch.as_tensor(part)) for part in item)


def _bytes(tensor: Tensor) -> bytes:
    return f"{tensor.dtype} {list(tensor.shape)} ".encode() + tensor.contiguous().cpu().numpy().tobytes()

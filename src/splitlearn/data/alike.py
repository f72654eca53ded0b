"""What tells two data sets apart that should be one: each party of a run reads its own copy."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from splitlearn.data.rows import Checked, tensors_of

SAMPLED = 8  # rows of a data set that is too large, or too slow, to read as a whole


def digests(dataset: Dataset, where: str = "data") -> dict[str, str]:
    """Return digests of `labels`, in order, of `rows`, in whatever order, and of the `order of rows`.

    Of tensors every value counts. Of pictures in folders the names, classes and sizes of all files count, and the bytes
    of eight of them: two versions of a decoder may give other pixels. Of any other data set eight rows count, if they
    are the same each time that they are read, and the labels if it has `targets`.
    """
    tensors = tensors_of(dataset)
    if tensors is not None:
        x, labels = tensors[0], tensors[1]
        return {**_labels(labels), **_rows(_bytes(row) for row in torch.as_tensor(x))}
    if isinstance(dataset, ImageFolder) and type(dataset).__getitem__ is ImageFolder.__getitem__:
        paths = [Path(path) for path, _ in dataset.samples]
        seen = {i: paths[i].read_bytes() for i in _some(len(paths))}
        named = (
            f"{path.relative_to(dataset.root).as_posix()} {path.stat().st_size} ".encode() + seen.get(i, b"")
            for i, path in enumerate(paths)
        )
        return {**_labels(torch.as_tensor(dataset.targets)), **_rows(named)}
    told = _labels(torch.as_tensor(dataset.targets)) if hasattr(dataset, "targets") else {}
    rows = Checked(dataset, where)
    once, again = ([_item(rows[i]) for i in _some(len(rows))] for _ in range(2))
    return {**told, **(_rows(once) if once == again else {})}


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


def _some(length: int) -> list[int]:
    """Up to eight places, evenly spread, first and last among them."""
    return torch.linspace(0, length - 1, min(SAMPLED, length)).long().tolist()


def _item(item: tuple) -> bytes:
    return b"".join(_bytes(torch.as_tensor(part)) for part in item)


def _bytes(tensor: Tensor) -> bytes:
    return f"{tensor.dtype} {list(tensor.shape)} ".encode() + tensor.contiguous().cpu().numpy().tobytes()

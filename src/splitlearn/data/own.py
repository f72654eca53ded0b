"""Tables that several parties have together: a CSV of one's own has some of the columns, and an id in each line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, tensor
from torch.utils.data import TensorDataset

from splitlearn.data.sources import Source
from splitlearn.data.table import lines_of, number
from splitlearn.errors import InputError
from splitlearn.layout import Role

LABEL = -1  # its place among the columns; those of x are numbered from 0 on


class Part(TensorDataset):
    """Rows x float32 [N, C] and y int64 [N] of a file that may lack columns.

    `names` are the rows' ids, and `ids` is a digest of them, which all parties compare. `lacks` says what is missing,
    in words, by the column's place in x or LABEL; SplitData sees that nobody reads it. `columns` are those features
    that are there, and `file` is a digest of the file, by which two parties with one file are known.
    """

    def __init__(
        self, x: Tensor, y: Tensor, names: Sequence[str], lacks: Mapping[int, str], columns: Sequence[str], file: str
    ) -> None:
        super().__init__(x, y)
        self.names, self.lacks, self.columns, self.file = names, lacks, columns, file
        self.ids = blake2b("\0".join(names).encode(), digest_size=8).hexdigest()

    @property
    def told(self) -> dict[str, Any]:
        """What the other parties are told of this file before all rows are known to be the same."""
        return {"ids": self.ids, "number": len(self.names), "columns": list(self.columns), "digest": self.file}


class Row(NamedTuple):
    where: str
    x: list[float]
    y: int


def own_table(path: str | Path, features: Sequence[str], label: str, classes: Sequence[str], id: str = "id") -> Source:
    """The rows of one's own CSV, sorted by id: x float32 [C], its C `features`; y, its label's place among `classes`.

        id,age,weight            id,diagnosis
        p2,63,80                 p1,well
        p1,41,72                 p2,ill

    A file has the ids and any of the other columns. Of a column that it lacks, x is NaN and y is 0, not to be read.
    FileNotFoundError where it is not there; ValueError, by file and line, for what does not fit.
    """
    _check(features, label, classes, id)
    path, features = Path(path).expanduser(), [str(name) for name in features]
    header, rows = _read(path, features, label, [str(name) for name in classes], id)
    columns = {**dict(enumerate(features)), LABEL: label}
    lacks = {place: f"{path} has no column {name}" for place, name in columns.items() if name not in header}
    ids = sorted(rows)
    x, y = tensor([rows[name].x for name in ids]), tensor([rows[name].y for name in ids])
    file = blake2b(path.read_bytes(), digest_size=8).hexdigest()
    train = Part(x, y, ids, lacks, [name for name in features if name in header], file)
    return Source(train, None, len(classes), features, [str(name) for name in classes])


def hashed(names: Sequence[str], key: bytes) -> list[str]:
    """Return what tells equal ids from different ones, by a key of 16 to 64 bytes that is used once.

    Who has the key can still try out ids that he can think of.
    """
    return [blake2b(name.encode(), key=key, digest_size=5).hexdigest() for name in names]


def require(owners: Mapping[str, Role], columns: Sequence[Tensor] | None, lacks: Mapping[int, str]) -> None:
    """Raises InputError where a file lacks a column of these fields; `columns` are those of x0, x1, ..., None for x."""
    places = {"x": [place for place in lacks if place != LABEL], "y": [LABEL]}
    places |= {f"x{i}": block.tolist() for i, block in enumerate(columns or [])}
    for name, role in owners.items():
        for lack in [lacks[place] for place in places[name] if place in lacks]:
            raise InputError(f"{lack}, which {role} owns: add it, or name {role}'s file in `data.root`")


def _read(
    path: Path, features: Sequence[str], label: str, classes: Sequence[str], id: str
) -> tuple[list[str], dict[str, Row]]:
    """Return the header, and the rows by their ids."""
    lines = lines_of(path)
    where, header = next(lines)
    _check_header(where, header, [id, *features, label])
    rows: dict[str, Row] = {}
    for where, fields in lines:
        texts = dict(zip(header, fields, strict=True))
        name = texts[id]
        if name in rows:
            raise ValueError(f"{where}: {id} `{name}` is that of {rows[name].where} too; remove one of these lines")
        x = [number(where, texts[column]) if column in texts else math.nan for column in features]
        rows[name] = Row(where, x, _place(where, texts[label], classes) if label in texts else 0)
    return header, rows


def _place(where: str, label: str, classes: Sequence[str]) -> int:
    if label not in classes:
        rule = f"must be one of `data.source.classes`, {', '.join(classes)}"
        raise ValueError(f"{where}: label `{label}` {rule}; mend the line, or name it there at every party")
    return classes.index(label)


def _check(features: Sequence[str], label: str, classes: Sequence[str], id: str) -> None:
    for key, names, least in (("features", features, 1), ("classes", classes, 2)):
        if isinstance(names, str) or not least <= len(names) == len(set(names)):
            raise ValueError(f"`data.source.{key}` (={names}) must be a list of {least} or more, all different")
    if id == label or {id, label} & set(features):
        raise ValueError(f"`data.source.id` (={id}), `data.label` (={label}) and the features must be different")


def _check_header(where: str, header: Sequence[str], known: Sequence[str]) -> None:
    if known[0] not in header or len(set(header)) < len(header):
        rule = f"must have a column {known[0]}, by which rows are matched, and each column once"
        raise ValueError(f"{where}: the header ({','.join(header)}) {rule}: see `data.source.id`")
    if odd := [name for name in header if name not in known]:
        rule = f"is none of {', '.join(known)}; remove it, or add it to `data.source.features` at every party"
        raise ValueError(f"{where}: column {odd[0]} {rule}")

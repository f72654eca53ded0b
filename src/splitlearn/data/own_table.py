"""Tables that several parties have together: a CSV of one's own has some of the columns, and an id in each line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, tensor
from torch.utils.data import TensorDataset

from splitlearn.data.csv_file import lines_of, number, other_delimiter
from splitlearn.data.labels import (
    WHOLE,
    are_whole,
    in_order,
    is_missing,
    require_label,
    require_one_spelling,
    warn_of_case,
)
from splitlearn.data.sources import Source
from splitlearn.data.table import warn_of_ids, warn_of_rounding
from splitlearn.errors import InputError
from splitlearn.layout import Role

CLASSES = "`data.source.classes`"
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


def own_table(
    path: str | Path,
    features: Sequence[str],
    label: str,
    classes: Sequence[str],
    id: str = "id",
    encoding: str = "utf-8",
    delimiter: str = ",",
) -> Source:
    """The rows of one's own CSV, sorted by id: x float32 [C], its C `features`; y, its label's place among `classes`.

        id,age,weight            id,diagnosis
        p2,63,80                 p1,well
        p1,41,72                 p2,ill

    Classes are numbered as they are listed, and whole numbers are listed in their order. A file has the ids and any of
    the other columns. Of a column that it lacks, x is NaN and y is 0, not to be read.
    FileNotFoundError where it is not there; ValueError, by file and line, for what does not fit, and for an id or label
    that stands for none, or is another one in another spelling.
    """
    path, label, id = Path(path).expanduser(), str(label), str(id)
    _check(features, label, classes, id)
    features, classes = [str(name) for name in features], [str(name) for name in classes]
    lines = lines_of(path, "data", "root", encoding, delimiter)
    header, rows = _read(path, lines, features, label, classes, id)
    columns = {**dict(enumerate(features)), LABEL: label}
    lacks = {place: f"{path} has no column {name}" for place, name in columns.items() if name not in header}
    ids = sorted(rows)
    x, y = tensor([rows[name].x for name in ids]), tensor([rows[name].y for name in ids])
    file = blake2b(path.read_bytes(), digest_size=8).hexdigest()
    train = Part(x, y, ids, lacks, [name for name in features if name in header], file)
    # NaN, of a column that is not there, is no whole number.
    values = list(zip(*(rows[name].x for name in ids), strict=True))
    warn_of_ids(path, features, values, "data.source.features")
    warn_of_rounding(path, features, values, "data.source.features")
    return Source(train, None, len(classes), features, classes)


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
    path: Path,
    lines: Iterator[tuple[str, list[str]]],
    features: Sequence[str],
    label: str,
    classes: Sequence[str],
    id: str,
) -> tuple[list[str], dict[str, Row]]:
    """Return the header, and the rows by their ids."""
    where, header = next(lines)
    _check_header(where, header, [id, *features, label])
    rows: dict[str, Row] = {}
    for where, fields in lines:
        texts = dict(zip(header, fields, strict=True))
        name = texts[id]
        if is_missing(name):
            found = f", but `{name}`" if name else ""
            raise ValueError(f"{where}: the row has no {id}{found}; fill it in, or remove the line")
        if name in rows:
            raise ValueError(f"{where}: {id} `{name}` is that of {rows[name].where} too; remove one of these lines")
        x = [number(where, column, texts[column]) if column in texts else math.nan for column in features]
        rows[name] = Row(where, x, _place(where, label, texts[label], classes) if label in texts else 0)
    if not rows:
        raise ValueError(f"{path} has no line below its header: it must have at least one row")
    places = {name: row.where for name, row in rows.items()}
    require_one_spelling(places, id, WHOLE)
    warn_of_case(places, id)
    if label in header and len(rows) > 1 and len(held := {row.y for row in rows.values()}) < 2:
        raise ValueError(f"{path}: column {label} must hold two labels or more, not only {classes[held.pop()]}")
    return header, rows


def _place(where: str, column: str, label: str, classes: Sequence[str]) -> int:
    if label not in classes:
        require_label(where, column, label)
        require_one_spelling({**dict.fromkeys(classes, CLASSES), label: where}, "label")
        rule = f"must be one of {CLASSES}, {', '.join(classes)}"
        raise ValueError(f"{where}: label `{label}` {rule}; mend the line, or name it there at every party")
    return classes.index(label)


def _check(features: Sequence[str], label: str, classes: Sequence[str], id: str) -> None:
    for key, names, least in (("features", features, 1), ("classes", classes, 2)):
        if isinstance(names, str) or not least <= len(names) == len(set(map(str, names))):
            raise ValueError(f"`data.source.{key}` (={names}) must be a list of {least} or more, all different")
    listed = [str(name) for name in classes]
    if missing := list(filter(is_missing, listed)):
        raise ValueError(f"{CLASSES} (={classes}) has `{missing[0]}`, which is no label: call the class otherwise")
    require_one_spelling(dict.fromkeys(listed, CLASSES), "label")
    warn_of_case(dict.fromkeys(listed, CLASSES), "label")
    if are_whole(listed) and listed != in_order(listed):  # texts are numbered as they are listed, whatever they say
        rule = f"are whole numbers, and must stand in their order: data.source.classes=[{','.join(in_order(listed))}]"
        raise ValueError(f"{CLASSES} (={classes}) {rule}")
    if id == label or {id, label} & set(map(str, features)):
        raise ValueError(f"`data.source.id` (={id}), `data.label` (={label}) and the features must be different")


def _check_header(where: str, header: Sequence[str], known: Sequence[str]) -> None:
    if known[0] not in header:
        rule = f"must have a column {known[0]}, by which rows are matched: see `data.source.id`"
        raise ValueError(f"{where}: the header ({','.join(header)}) {rule}{other_delimiter(header, 'data')}")
    if odd := [name for name in header if name not in known]:
        rule = f"is none of {', '.join(known)}; remove it, or add it to `data.source.features` at every party"
        raise ValueError(f"{where}: column {odd[0]} {rule}")

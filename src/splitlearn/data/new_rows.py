"""Rows that came after the training, for a network that is trained: a CSV or a folder of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from splitlearn.data.csv_file import lines_of, number, other_delimiter
from splitlearn.data.rows import Fields, Normalise, tensors_of
from splitlearn.data.sources import Pictures, is_picture, opened, to_tensor

Inputs = Mapping[str, Mapping[str, Any]]
"""What manifests say of the data fields: `shape`, `kind`, `mean`, `std`, `columns`, `places`, see `saved.manifest`."""
BYTES, SHARES, VALUES, OWN = "bytes", "shares", "values", "own"
"""Of rows as they were read for the training: pixels from 0 to 255, pixels from 0 to 1, other numbers, and what a data
set of the user's own has made of them, which no file tells."""
MODES = {1: "L", 3: "RGB"}  # of pictures, by their channels


class NewRows(NamedTuple):
    """The `ids` of the rows, what was read, x [N, ...], and y [N] int64, their labels; None where there are none."""

    ids: list[str]
    x: Tensor
    y: Tensor | None


class Kept(NamedTuple):
    """How the rows of a file are read. `label` names the column of labels, `id` that of what rows are called."""

    id: str = "id"
    label: str | None = None
    encoding: str = "utf-8"
    delimiter: str = ","
    image_size: int | None = None


def kind_of(dataset: Dataset | None) -> str:
    """Return which of `BYTES`, `SHARES`, `VALUES` and `OWN` the rows of a data set are."""
    if type(dataset) is Pictures:
        return BYTES
    tensors = tensors_of(dataset)
    if tensors is None:
        return OWN
    x = tensors[0]
    if x.dtype == torch.uint8:
        return BYTES
    if x.ndim != 4:
        return VALUES
    least, most = torch.aminmax(x)
    return SHARES if 0 <= float(least) <= float(most) <= 1 else VALUES


def new_rows(path: str | Path, inputs: Inputs, classes: Sequence[str] | None, kept: Kept) -> NewRows:
    """Read rows as a trained network takes them, in the order of the file, or of the pictures' names.

    A CSV has the columns of the training by their names, in any order, and others besides; where these had no names, as
    many columns as the input has values. Rows without a column `kept.id` are numbered from 0 on. Pictures are in greys
    where the network takes one channel; in folders that are called as classes are, those are their labels.

    FileNotFoundError where nothing is there; ValueError, by file and line, for what is missing or does not fit.
    """
    path = Path(path).expanduser()
    (kind,) = {field["kind"] for field in inputs.values()}
    if kind == OWN:
        raise ValueError(
            "the network was trained on a data set of your own, whose transforms no file tells: predict its rows in "
            "Python, trainer.predict(learner, datamodule)"
        )
    if path.is_dir() and kind == VALUES:
        raise ValueError(f"`data.root` (={path}) is a folder, and the network was trained on no pictures: name a CSV")
    if path.is_dir():
        return _pictures(path, _shape(inputs), classes, kept)
    if path.is_file():
        return _table(path, inputs, classes, kept)
    raise FileNotFoundError(f"`data.root` (={path}) is not there: name a CSV with a header, or a folder of pictures")


def prepare(x: Tensor, inputs: Inputs) -> Fields:
    """Return the fields, as in the training: each party's columns, with mean and deviation taken out of them."""
    fields = {}
    for name, field in inputs.items():
        own = x if field["places"] is None else x.index_select(-1, torch.tensor(field["places"]))
        fields[name] = Normalise(field["mean"], field["std"])(own)["x"]
    return fields


def _shape(inputs: Inputs) -> list[int]:
    """Of a whole row."""
    shapes = [list(field["shape"]) for field in inputs.values()]
    return [*shapes[0][:-1], sum(shape[-1] for shape in shapes)]


def _columns(inputs: Inputs) -> list[str] | None:
    """The names of all columns in their order, None where they have none."""
    if any(field["columns"] is None for field in inputs.values()):
        return None
    named = {
        place: str(name)
        for field in inputs.values()
        for place, name in zip(field["places"] or range(len(field["columns"])), field["columns"], strict=True)
    }
    return [named[place] for place in sorted(named)]


def _table(path: Path, inputs: Inputs, classes: Sequence[str] | None, kept: Kept) -> NewRows:
    lines = lines_of(path, "data", "root", kept.encoding, kept.delimiter)
    where, header = next(lines)
    names, shape = _columns(inputs), _shape(inputs)
    columns = names or [name for name in header if name not in (kept.id, kept.label)]
    if lacking := [name for name in columns if name not in header]:
        told = f"{where}: there is no column {', '.join(lacking)}, which the network was trained on"
        raise ValueError(f"{told}: add it, or name it as in the training{other_delimiter(header, 'data')}")
    if len(columns) != math.prod(shape):
        told = f"{where}: {len(columns)} columns, and the network takes {shape}, {math.prod(shape)} values"
        raise ValueError(f"{told}: name the column of labels in `data.label`, and that of ids in `data.id`")
    ids: dict[str, str] = {}  # and where each stands
    x, labels = [], []
    for where, fields in lines:
        texts = dict(zip(header, fields, strict=True))
        id = texts.get(kept.id, str(len(ids)))
        if not id or id in ids:
            again = f"`{id}` is that of {ids[id]} too" if id else "is empty"
            raise ValueError(f"{where}: {kept.id} {again}; give each row one of its own")
        ids[id] = where
        x.append([number(where, name, texts[name]) for name in columns])
        labels.append((where, texts.get(kept.label or "", "")))
    if not x:
        raise ValueError(f"{path} has no line below its header: it must have at least one row")
    values = torch.tensor(x).view(len(x), *shape)
    return NewRows(list(ids), _pixels(path, values, next(iter(inputs.values()))["kind"]), _numbers(labels, classes))


def _pixels(path: Path, x: Tensor, kind: str) -> Tensor:
    """Values of the scale of the training, where these were pixels."""
    if kind == BYTES and not bool(((x >= 0) & (x <= 255) & (x == x.round())).all()):
        raise ValueError(f"{path} has values that are no pixels: these are whole numbers from 0 to 255, as in training")
    if kind == SHARES and not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"{path} has values that are no pixels: these are numbers from 0 to 1, as in training")
    return x.to(torch.uint8) if kind == BYTES else x


def _numbers(labels: Sequence[tuple[str, str]], classes: Sequence[str] | None) -> Tensor | None:
    """The places of labels among the classes; None where no row has one. Each stands behind where it was read."""
    if not any(label for _, label in labels):
        return None
    named = [str(name) for name in classes or []]
    for where, label in labels:
        known = label in named if named else label.isdecimal()
        if not known:
            which = f"must be one of {', '.join(named)}" if named else "must be the number of a class"
            raise ValueError(f"{where}: the label `{label}` {which}, in all rows or in none: mend it, or empty all")
    return torch.tensor([named.index(label) if named else int(label) for _, label in labels])


def _pictures(folder: Path, shape: list[int], classes: Sequence[str] | None, kept: Kept) -> NewRows:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and is_picture(path, folder))
    if not paths:
        raise ValueError(f"{folder} holds no pictures: put some there, or name a CSV")
    if len(shape) != 3 or shape[0] not in MODES:
        raise ValueError(f"the network takes {shape}, which is no picture of one or three channels: name a CSV")
    read, x = to_tensor(kept.image_size), []
    for path in paths:
        with opened(str(path)) as image:
            x.append(read(image.convert(MODES[shape[0]])))
        if list(x[-1].shape) != shape:
            told = f"{path} is {x[-1].shape[2]}x{x[-1].shape[1]} pixels, and the network takes {shape[2]}x{shape[1]}"
            raise ValueError(f"{told}: bring the pictures to that size")
    ids = [path.relative_to(folder).as_posix() for path in paths]
    named = {str(name) for name in classes or []}
    labelled = all(path.parent.name in named for path in paths)
    labels = [(str(path), path.parent.name if labelled else "") for path in paths]
    return NewRows(ids, torch.stack(x), _numbers(labels, classes))

"""Tables: a CSV of numbers in named columns, with one column of labels."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from splitlearn.data.sources import Source

LARGEST = torch.finfo(torch.float32).max


def table(path: str | Path, label: str, test_path: str | Path | None = None) -> Source:
    """The rows of a CSV with a header: x float32 [C], its C columns of numbers in their order; y from column `label`.

        age,pressure,diagnosis
        63,145,healthy
        41,130,ill

    Labels are any text, and numbered as they sort. A test file has the same columns, and no label of its own.
    FileNotFoundError where a file is not there; ValueError, by file and line, for what is not a table of numbers.
    """
    names, x, labels = _read(Path(path).expanduser(), label)
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"{path}: column {label} must hold two labels or more, not only {classes[0]}")
    train = _dataset(x, labels, classes)
    if test_path is None:
        return Source(train, None, len(classes), names, classes)
    test_names, x, labels = _read(Path(test_path).expanduser(), label)
    if test_names != names:
        raise ValueError(f"{test_path} must have the columns of {path}, {', '.join(names)}, in the same order")
    if odd := sorted(set(labels) - set(classes)):
        raise ValueError(f"{test_path} has labels that {path} has not, {', '.join(odd[:5])}: add them there")
    return Source(train, _dataset(x, labels, classes), len(classes), names, classes)


def _dataset(x: list[list[float]], labels: list[str], classes: list[str]) -> TensorDataset:
    number = {name: i for i, name in enumerate(classes)}
    return TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor([number[name] for name in labels]))


def _read(path: Path, label: str) -> tuple[list[str], list[list[float]], list[str]]:
    """Return the names of the columns, their values [N][C], and the labels [N]."""
    rows = lines_of(path)
    where, header = next(rows)
    if len(header) < 2 or len(set(header)) < len(header):
        raise ValueError(f"{where}: the header ({','.join(header)}) must name two columns or more, all different")
    if label not in header:
        raise ValueError(f"`data.label` (={label}) must be a column of {path}: {', '.join(header)}")
    place, x, labels = header.index(label), [], []
    for where, fields in rows:
        labels.append(fields.pop(place))
        x.append([number(where, text) for text in fields])
    return [name for name in header if name != label], x, labels


def lines_of(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the header of a CSV, then the fields of each line that is not empty; before each, where it stands.

    FileNotFoundError where the file is not there; ValueError for a line that is shorter or longer than the header, and
    where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`data.root` (={path}) is not a file: name a CSV with a header")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        lines, fields = csv.reader(file), []
        header = next(lines, [])
        yield f"{path}, line 1", [name.strip() for name in header]
        for fields in filter(None, lines):
            where = f"{path}, line {lines.line_num}"
            if len(fields) != len(header):
                raise ValueError(f"{where}: {len(fields)} fields, but the header has {len(header)}; mend the line")
            yield where, [text.strip() for text in fields]
    if not fields:
        raise ValueError(f"{path} has no line below its header: it must have at least one row")


def number(where: str, text: str) -> float:
    """Return the number that `text` is; ValueError, saying `where`, for what float32 cannot hold."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:
        raise ValueError(f"{where}: `{text}` is not a number of float32; fill it in, or remove its line or column")
    return value

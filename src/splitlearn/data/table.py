"""Tables: a CSV of numbers in named columns, with one column of labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from splitlearn.data.csv_file import NUMBER, lines_of, number, other_delimiter
from splitlearn.data.labels import in_order, require_label, require_one_spelling, warn_of_case
from splitlearn.data.sources import FEW, Source, too_many


def table(
    path: str | Path,
    label: str,
    test_path: str | Path | None = None,
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    encoding: str = "utf-8",
    delimiter: str = ",",
) -> Source:
    """The rows of a CSV with a header: x float32 [C], its C columns of numbers in their order; y from column `label`.

        age,pressure,diagnosis
        63,145,healthy
        41,130,ill

    Labels are any text, and numbered as they sort, by number where all are whole numbers. `features` names the columns
    of x, `drop` those that are left out. A test file has the same columns, and no label of its own. FileNotFoundError
    where a file is not there; ValueError, by file and line, for what is not a table of numbers, for a label that stands
    for none or is another one in another spelling, and for labels that are mostly different.
    """
    path, label = Path(path).expanduser(), str(label)

    def read(path: Path, key: str) -> tuple[list[str], list[list[float]], list[str], dict[str, str]]:
        return _read(lines_of(path, "data", key, encoding, delimiter), path, label, features, drop)

    names, x, labels, places = read(path, "root")
    classes = in_order(places)
    _check_classes(path, label, classes, len(labels))
    require_one_spelling(places, "label")
    warn_of_case(places, "label")
    train = _dataset(x, labels, classes)
    warn_of_ids(path, names, zip(*x, strict=True), "data.drop")
    warn_of_rounding(path, names, zip(*x, strict=True), "data.drop")
    if test_path is None:
        return Source(train, None, len(classes), names, classes)
    test_path = Path(test_path).expanduser()
    test_names, x, labels, theirs = read(test_path, "source.test_path")
    if test_names != names:
        raise ValueError(f"{test_path} must have the columns of {path}, {', '.join(names)}, in the same order")
    require_one_spelling(places | {name: where for name, where in theirs.items() if name not in places}, "label")
    if odd := in_order(theirs.keys() - places.keys()):
        raise ValueError(f"{test_path} has labels that {path} has not, {', '.join(odd[:5])}: add them there")
    warn_of_rounding(test_path, names, zip(*x, strict=True), "data.drop")
    return Source(train, _dataset(x, labels, classes), len(classes), names, classes)


def warn_of_ids(path: Path, names: Sequence[str], columns: Iterable[Sequence[float]], key: str) -> None:
    """Warn of columns whose values are whole numbers, all different, as a running number of rows is."""
    for name, values in zip(names, columns, strict=True):
        if len(values) > FEW and len(set(values)) == len(values) and all(value.is_integer() for value in values):
            rule = "has whole numbers, all different, as an id has, by which rows would be learnt by heart"
            warnings.warn(f"{path}: column {name} {rule}: leave it out by `{key}` if it is one", stacklevel=3)


def warn_of_rounding(path: Path, names: Sequence[str], columns: Iterable[Sequence[float]], key: str) -> None:
    """Warn of columns of whole numbers that are no longer the same as float32, which has 24 bits for them."""
    for name, values in zip(names, columns, strict=True):
        if not all(value.is_integer() for value in values):
            continue
        exact = torch.tensor(values, dtype=torch.float64)
        rounded = exact.float().double()
        if bool((lost := rounded != exact).any()):
            largest = int(torch.where(lost, exact.abs(), 0).argmax())
            told = f"column {name} has {exact[largest]:.0f}, which as float32 is {rounded[largest]:.0f}"
            cure = f"subtract in the file what all have in common, or leave the column out by `{key}`"
            warnings.warn(f"{path}: {told}, whatever the trainer's precision: {cure}", stacklevel=3)


def _check_classes(path: Path, label: str, classes: Sequence[str], num_rows: int) -> None:
    if len(classes) < 2:
        raise ValueError(f"{path}: column {label} must hold two labels or more, not only {classes[0]}")
    measured = all(map(NUMBER.fullmatch, classes)) and not all(float(name).is_integer() for name in classes)
    if too_many(len(classes), num_rows) or (measured and len(classes) > FEW):
        rule = f"has {len(classes)} different values in {num_rows} rows, which are no classes"
        raise ValueError(
            f"{path}: column {label} {rule}: name another in `data.label`, or sort its values into classes"
        )


def _dataset(x: list[list[float]], labels: list[str], classes: list[str]) -> TensorDataset:
    number = {name: i for i, name in enumerate(classes)}
    return TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor([number[name] for name in labels]))


def _read(
    rows: Iterator[tuple[str, list[str]]], path: Path, label: str, features: Sequence[str] | None, drop: Sequence[str]
) -> tuple[list[str], list[list[float]], list[str], dict[str, str]]:
    """Return the names of the columns, their values [N][C], the labels [N], and where each label stands first."""
    where, header = next(rows)
    if len(header) < 2:
        rule = "must name two columns or more"
        raise ValueError(f"{where}: the header ({','.join(header)}) {rule}{other_delimiter(header, 'data')}")
    if label not in header:
        raise ValueError(f"`data.label` (={label}) must be a column of {path}: {', '.join(header)}")
    names = _chosen(path, [name for name in header if name != label], features, drop)
    columns, place, x, labels = [header.index(name) for name in names], header.index(label), [], []
    places: dict[str, str] = {}
    for where, fields in rows:
        if fields[place] not in places:
            require_label(where, label, fields[place])
        places.setdefault(fields[place], where)
        labels.append(fields[place])
        x.append([number(where, name, fields[i]) for name, i in zip(names, columns, strict=True)])
    if not labels:
        raise ValueError(f"{path} has no line below its header: it must have at least one row")
    return names, x, labels, places


def _chosen(path: Path, names: list[str], features: Sequence[str] | None, drop: Sequence[str]) -> list[str]:
    """Return those of the columns that x has; their names may be numbers, which Hydra reads as such."""
    for key, listed in (("features", features), ("drop", drop)):
        if isinstance(listed, str):
            raise ValueError(f"`data.{key}` (={listed}) must be a list: data.{key}=[{listed}]")
        if odd := [str(name) for name in listed or () if str(name) not in names]:
            raise ValueError(
                f"`data.{key}` has `{odd[0]}`, which is no column of numbers of {path}: {', '.join(names)}"
            )
    if features is not None and (drop or not 1 <= len(features) == len({str(name) for name in features})):
        raise ValueError(f"`data.features` (={features}) must name columns, each once, and `data.drop` then be empty")
    left = [name for name in names if name not in {str(name) for name in drop}]
    if not left:
        raise ValueError(f"`data.drop` (={drop}) leaves no column of {path}: keep one")
    return left if features is None else [str(name) for name in features]

"""What stands beside exported files, `export.json`: what goes in, what comes out, and what the check found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitlearn.errors import told_if_full
from splitlearn.saved.folder import write_whole
from splitlearn.saved.loading import Part
from splitlearn.saved.programs import SEED, Difference, Format, versions

NOTES = "export.json"


class Notes:
    """`export.json` in a folder. What is told of files of other weights is forgotten, and they are removed."""

    def __init__(self, place: Path, parts: Sequence[Part]) -> None:
        self.place = place
        self.weights = {part.manifest.role: part.manifest.weights["digest"] for part in parts}
        self.files = _read(place / NOTES)
        self.forget([name for name, told in self.files.items() if told["weights"] != self.weights])

    def forget(self, names: Sequence[str]) -> None:
        """Remove files: what is not written anew, because it fails, does not stand there as if it were."""
        with told_if_full(self.place, "run"):
            for name in names:
                for beside in ("", ".data"):  # where ONNX has the weights of more than 2 GB
                    (self.place / f"{Path(name).name}{beside}").unlink(missing_ok=True)
                self.files.pop(name, None)
            if self.place.is_dir():
                self._write()

    def add(self, name: str, told: Mapping[str, Any]) -> None:
        self.files[name] = {**told, "weights": self.weights}
        self._write()

    def _write(self) -> None:
        write_whole(self.place / NOTES, json.dumps({"files": self.files}, indent=2, allow_nan=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """Nothing, where there are no notes, or others than ours."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: told for name, told in files.items() if "weights" in told}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def prepared(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What must be done to an input: `mean` and `std` that are taken out, of each column where they differ."""
    fields = list(told.values())
    if "mean" not in fields[0]:
        return {}  # an activation
    if len(fields) == 1:
        return {key: fields[0][key] for key in ("mean", "std", "columns")}
    places = [place for field in fields for place in field["places"]]
    whole = {key: [value for field in fields for value in _by_column(field, key)] for key in ("mean", "std", "columns")}
    in_order = sorted(range(len(places)), key=places.__getitem__)
    columns = {key: [values[i] for i in in_order] if None not in values else None for key, values in whole.items()}
    if len(fields[0]["shape"]) > 1:  # pictures, with channels that all have alike
        columns |= {key: fields[0][key] for key in ("mean", "std")}
    return columns


def _by_column(field: Mapping[str, Any], key: str) -> list[Any]:
    values, num = field[key], len(field["places"])
    if values is None:
        return [None] * num
    return list(values) if len(values) == num else list(values[:1]) * num


def checked_by(each: Format, num_rows: int, difference: Difference) -> dict[str, Any]:
    found = {"rows": num_rows, "seed": SEED, "difference": difference.largest}
    return {**found, "rtol": difference.rtol, "atol": difference.atol, "versions": versions(each)}

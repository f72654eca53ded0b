"""What stands beside the weights in a model folder: all that is needed to use them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitlearn.errors import InputError, outside
from splitlearn.layout import Layout, Party, Role, Stage

MANIFEST = "manifest.json"
FORMAT = 1
"""Goes up when a reader of today could misread what is written; keys that are only added leave it."""


@dataclass(frozen=True)
class Manifest:
    """Of a party's part of a network.

    Shapes are those of one row, without the dimension of the mini-batch; dtypes are torch's names, `float32`.

    Arguments:
        party, role: whose part it is, and the role that she plays.
        layout: who holds what, of the whole network.
        run: what all parts of a run share, in words; among them the digest of the data.
        weights: which they are: `of` the `best` checkpoint or the `last` mini-batch, after how many (`step`), `monitor`
            and `score` of the best; `stale` where another has the trained ones, who is `trained_at`; the `digest` of
            the file; `unsaved`, the names that no `state_dict` has.
        stages: the party's own: `shape` and `dtype` of what goes in.
        inputs: the data fields that she owns: `shape` and `dtype`, the `kind` of their values before the `mean` and
            `std` were taken out of them, and of columns their `places` in the whole input and their names.
        crosses: what she sends or receives: `src` and `dst` (roles), `shape` and `dtype`.
        num_classes, classes: of the labels, and their names where they have some.
        output: what the loss takes the network's output for: `logits`, `log-probabilities`, or another loss's name.
        model: how the model was asked for, with `_target_`; None where it was made without a configuration.
        config: a digest of the configuration that all parties share, if there was one.
        metrics: of these very weights.
        precision: of the trainer. versions: of splitlearn, torch and python. date: when it was written.
    """

    party: Party
    role: Role
    layout: Layout
    run: Mapping[str, str]
    weights: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, Mapping[str, Any]]
    crosses: list[Mapping[str, Any]]
    num_classes: int
    classes: list[str] | None
    output: str
    model: Mapping[str, Any] | None
    config: str | None
    metrics: Mapping[str, float | None]
    precision: str
    versions: Mapping[str, str]
    date: str
    format: int = field(default=FORMAT)

    @property
    def stale(self) -> bool:
        return bool(self.weights["stale"])

    @property
    def step(self) -> int:
        return int(self.weights["step"])

    def to_json(self) -> str:
        layout = {
            "name": self.layout.kind,
            "stages": [stage._asdict() for stage in self.layout.stages],
            "owners": dict(self.layout.owners),
        }
        return json.dumps({"format": self.format, **asdict(self), "layout": layout}, indent=2, allow_nan=False) + "\n"


def shape_and_dtype(x: Tensor) -> dict[str, Any]:
    """Of rows [N, ...]: the shape of one, and torch's name of the dtype."""
    return {"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a model folder. Raises InputError where there is none, or one that cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} has no model: name the folder of a run that has ended, or a party's in it")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        version = int(told.pop("format"))
        if version <= FORMAT:
            return _manifest(told, version)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        why = outside(f"{type(error).__name__}: {error}", 100)
        raise InputError(f"{path} is damaged ({why}): take the folder as the run left it") from error
    raise InputError(f"{path} has format {version}, and this splitlearn reads up to {FORMAT}: install a newer one")


def _manifest(told: dict[str, Any], version: int) -> Manifest:
    layout = told["layout"]
    stages = tuple(Stage(s["name"], s["role"], tuple(s["inputs"]), tuple(s["blocks"])) for s in layout["stages"])
    known = {name: told[name] for name in Manifest.__dataclass_fields__ if name not in ("layout", "format")}
    manifest = Manifest(layout=Layout(layout["name"], stages, layout["owners"]), format=version, **known)
    _ = manifest.step, [manifest.weights[name] for name in ("stale", "trained_at", "digest")]
    for name, own in manifest.stages.items():
        if name not in {stage.name for stage in stages} or not isinstance(getattr(torch, own["dtype"]), torch.dtype):
            raise ValueError(f"stage {name} of {own['dtype']}")
        torch.Size(own["shape"])
    return manifest

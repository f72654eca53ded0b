"""What a run has trained as files for other programs: the network in one piece, or each party's stages."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from splitlearn.errors import InputError, check_whole, told_if_full
from splitlearn.layout import Layout, Party, Stage
from splitlearn.network import join
from splitlearn.saved.folder import WEIGHTS, write_weights
from splitlearn.saved.loading import (
    FOLDER,
    Model,
    Part,
    choose,
    in_one_piece,
    inputs_of,
    part_in,
    parts_of,
    segments_of,
)
from splitlearn.saved.manifest import shape_and_dtype
from splitlearn.saved.notes import Notes, checked_by, prepared
from splitlearn.saved.programs import (
    FORMATS,
    SEED,
    Difference,
    Format,
    Joined,
    random_rows,
    require,
    write_program,
)
from splitlearn.segment import Segment

EXPORT = "export"
WHAT = ("merged", "parts")
ZOO = "splitlearn.models.zoo.torchvision"
CONSTANT = re.compile(r"_tensor_constant\d+")  # of the trace of a torchvision model, which that model does not have


def export(
    folder: str | Path,
    what: str | None = None,
    formats: str = "all",
    rows: int = 64,
    alice: Party | None = None,
    model: Model | None = None,
) -> Iterator[str]:
    """Write the files, each checked on random rows; yield a line for each check, when it is done.

    Beside them is `export.json`: of each file what goes in, what comes out, and what the check found.

    Arguments:
        folder: of a run, or of one party in it.
        what: `merged`, the network in one piece, into `FOLDER/export`, with its weights by the names of the uncut
            model; or `parts`, the stages of each party, into `FOLDER/PARTY/export`. None: merged where all parts are
            there.
        formats: `onnx`, `torch`, or `all` of them.
        rows: so many rows a check has.
        alice: whose bottom it shall be, where each has one of her own; of the parts, hers alone of all Alices.
        model: as `load` takes it.

    Raises InputError for what does not fit, what `load` refuses, a block that a format cannot have, which is named, and
    for a file that does something else than the network; that file is not kept.
    """
    folder, asked = Path(folder), _asked(formats)
    if what not in (None, *WHAT):
        raise InputError(f"`what` (={what}) must be one of {', '.join(WHAT)}, or left out")
    check_whole("rows", rows)
    own = part_in(folder)
    parts = [own] if own is not None else parts_of(folder)
    layout = parts[0].manifest.layout
    _check_alice(layout, alice)
    missing = [role for role in layout.roles if role not in {part.manifest.role for part in parts}]
    if what == "merged" and missing:
        cure = f"put the folder of that party there, {missing[0]}/{FOLDER}" if own is None else "name the run's folder"
        raise InputError(f"{folder} lacks the part of {missing[0]}: {cure}, or take what=parts")
    if what == "parts" or missing or own is not None:
        yield from _parts(folder, parts, asked, rows, alice, model)
    else:
        yield from _merged(folder, choose(folder, parts, alice), asked, rows, model)


def _asked(formats: str) -> list[Format]:
    if formats not in (*FORMATS, "all"):
        raise InputError(f"`format` (={formats}) must be one of {', '.join(FORMATS)}, all")
    asked = [FORMATS[formats]] if formats in FORMATS else list(FORMATS.values())
    require(asked)
    return asked


def _check_alice(layout: Layout, alice: Party | None) -> None:
    if alice is not None and "alice" not in layout.roles:
        raise InputError(
            f"`alice` (={alice}) chooses among Alices who take turns, and in {layout.kind} all are part of one "
            "network: leave it out"
        )


def _merged(
    folder: Path, parts: Sequence[Part], formats: Sequence[Format], num_rows: int, model: Model | None
) -> Iterator[str]:
    manifest, layout = parts[0].manifest, parts[0].manifest.layout
    told = inputs_of(parts)
    network = in_one_piece(layout, _segments(parts, model), told).eval()
    alone = {name: segment for part in parts for name, segment in _segments([part], model).items()}
    generator = torch.Generator().manual_seed(SEED)
    fields = _rows_of_fields(layout, told, num_rows, generator)
    x = _side_by_side(fields, told)
    _check_merged(network, x, alone, layout, fields, folder)
    stages = ", ".join(stage.name for stage in layout.stages)
    yield f"{folder}: the network in one piece equals {stages} one after the other, to the bit on {num_rows} rows"

    place = folder / EXPORT
    notes = Notes(place, parts)
    notes.forget([WEIGHTS, *(f"model{each.suffix}" for each in formats)])
    named = _uncut(network, parts, model)
    with told_if_full(place, "run"):
        write_weights(place, named)
    _check_weights(place / WEIGHTS, named)
    notes.add(WEIGHTS, {"tensors": len(named)})
    yield f"{place / WEIGHTS}: {len(named)} tensors by the names of the uncut model, read again to the bit"
    into = {"x": {**shape_and_dtype(x), **prepared(told)}}
    named_classes = {"num_classes": manifest.num_classes, "classes": manifest.classes}
    program = Joined(network._modules)
    for path, each, difference in write_program(program, {"x": x}, "output", formats, place / "model"):
        found = checked_by(each, num_rows, difference)
        with torch.no_grad():
            out = {"output": shape_and_dtype(network(x[:1]))}
        notes.add(path.name, {"inputs": into, "outputs": out, **named_classes, **found, "equals_parts": True})
        yield _line(path, num_rows, difference)


def _parts(
    folder: Path,
    parts: Sequence[Part],
    formats: Sequence[Format],
    num_rows: int,
    alice: Party | None,
    model: Model | None,
) -> Iterator[str]:
    """Of Alices who have the same weights one is exported, and the others get copies."""
    if alice is not None:
        parts = [part for part in parts if part.manifest.role != "alice" or part.manifest.party == alice]
        if not any(part.manifest.party == alice for part in parts):
            raise InputError(
                f"{folder} lacks the part of {alice}: put the folder of that party there, {alice}/{FOLDER}"
            )
    made: dict[tuple[str, str], Path] = {}
    for part in parts:
        manifest, place = part.manifest, _place(part)
        if manifest.stale and len(parts) > 1:
            yield f"{part.folder}: left out; {manifest.weights['trained_at']} has what is trained of {manifest.role}"
            continue
        same = (manifest.role, manifest.weights["digest"])
        if same in made:
            Notes(place, [part])  # what is there of other weights goes
            with told_if_full(place, "run"):
                shutil.copytree(made[same], place, dirs_exist_ok=True)
            yield f"{place}: the same as {made[same]}"
        else:
            yield from _stages(part, place, formats, num_rows, model)
            made[same] = place


def _stages(part: Part, place: Path, formats: Sequence[Format], num_rows: int, model: Model | None) -> Iterator[str]:
    manifest, generator = part.manifest, torch.Generator().manual_seed(SEED)
    notes, segments = Notes(place, [part]), _segments([part], model)
    mine = [stage for stage in manifest.layout.stages if stage.name in segments]
    notes.forget([f"{stage.name}{each.suffix}" for stage in mine for each in formats])
    known: dict[str, Mapping[str, Any]] = {each["value"]: each for each in manifest.crosses} | dict(manifest.inputs)
    for stage in mine:
        if Path(stage.name).name != stage.name:
            raise InputError(
                f"{part.folder} has a stage {stage.name}, which is no name of a file: ask where it is from"
            )
        inputs = {
            name: random_rows(num_rows, known[name]["shape"], getattr(torch, known[name]["dtype"]), generator)
            for name in stage.inputs
        }
        program = Joined(segments[stage.name].eval()._modules)
        with torch.no_grad():
            known[stage.name] = shape_and_dtype(program(*inputs.values()))
        into = {name: {**shape_and_dtype(x), **prepared({name: known[name]})} for name, x in inputs.items()}
        out = {stage.name: known[stage.name]}
        for path, each, difference in write_program(program, inputs, stage.name, formats, place / stage.name):
            found = checked_by(each, num_rows, difference)
            notes.add(path.name, {"inputs": into, "outputs": out, **_labels(manifest.layout, stage, part), **found})
            yield _line(path, num_rows, difference)


def _segments(parts: Sequence[Part], model: Model | None) -> dict[str, Segment]:
    """As `segments_of`, which would write into a model that is given as such, in a dtype of its own."""
    return segments_of(parts, copy.deepcopy(model) if isinstance(model, nn.Module) else model)


def _place(part: Part) -> Path:
    """Beside a party's model; within it, where it does not stand in a party's folder."""
    return (part.folder.parent if part.folder.name == FOLDER else part.folder) / EXPORT


def _labels(layout: Layout, stage: Stage, part: Part) -> dict[str, Any]:
    """What the outputs are called, of the last stage."""
    if stage != layout.stages[-1]:
        return {}
    return {"num_classes": part.manifest.num_classes, "classes": part.manifest.classes}


def _rows_of_fields(
    layout: Layout, told: Mapping[str, Mapping[str, Any]], num_rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    return {
        name: random_rows(num_rows, told[name]["shape"], getattr(torch, told[name]["dtype"]), generator)
        for name in layout.fields
    }


def _side_by_side(fields: Mapping[str, Tensor], told: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """The whole input, each one's columns in their places."""
    if len(fields) == 1:
        return next(iter(fields.values()))
    places = torch.tensor([place for name in fields for place in told[name]["places"]])
    return torch.cat(list(fields.values()), dim=-1).index_select(-1, places.argsort())


@torch.no_grad()
def _check_merged(
    network: nn.Sequential,
    x: Tensor,
    segments: Mapping[str, Segment],
    layout: Layout,
    fields: Mapping[str, Tensor],
    folder: Path,
) -> None:
    values = dict(fields)
    for stage in layout.stages:
        values[stage.name] = segments[stage.name].eval()(join([values[name] for name in stage.inputs]))
    expected, found = values[layout.stages[-1].name], network(x)
    if not torch.equal(expected.nan_to_num(), found.nan_to_num()):
        raise InputError(
            f"the network in one piece of {folder} is not what its parts are one after the other, so nothing is "
            "exported: a block draws random numbers in evaluation, or keeps state; make it do the same each time"
        )


def _uncut(network: nn.Sequential, parts: Sequence[Part], model: Model | None) -> dict[str, Tensor]:
    """The weights by the names of the uncut model: a model of torchvision has no blocks in front of its own names."""
    tensors = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    asked = parts[0].manifest.model or {}
    if model is not None or asked.get("_target_") != ZOO or "bottoms" in network._modules:
        return tensors
    own = {name.partition(".")[2]: value for name, value in tensors.items()}
    return {name: value for name, value in own.items() if not CONSTANT.fullmatch(name)}


def _check_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    found = safetensors.load_file(path)
    if odd := [name for name in {*found, *tensors} if name not in found or not _same(found[name], tensors.get(name))]:
        path.unlink()
        raise InputError(f"{path} is wrong, and not kept: {odd[0]} is read as something else; try another folder")


def _same(found: Tensor, written: Tensor | None) -> bool:
    return (
        written is not None and found.dtype == written.dtype and torch.equal(found.nan_to_num(), written.nan_to_num())
    )


def _line(path: Path, num_rows: int, difference: Difference) -> str:
    return (
        f"{path}: differs from torch by at most {difference.largest:.2g} on {num_rows} rows and on one "
        f"(rtol={difference.rtol:g}, atol={difference.atol:.2g})"
    )

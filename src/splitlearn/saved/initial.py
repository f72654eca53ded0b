"""Which weights a new run starts from: those of model folders and of files, by the blocks of the uncut model.

folder of a run     PARTY/model of all, or of some, parties
folder of a party   her part alone
file                a state_dict, .safetensors or .pth, of the uncut model or of torchvision's
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from splitlearn.errors import InputError, outside
from splitlearn.network import SplitNetwork, labels_of
from splitlearn.saved.folder import misfits, named, put, read_weights, unsaved
from splitlearn.saved.loading import Part, check_same_run, part_in, parts_of, trained_one
from splitlearn.saved.manifest import Manifest
from splitlearn.segment import Segment

FILES = (".safetensors", ".pth", ".pt")
COUNTER = "num_batches_tracked"  # which files of older torch lack
SHOWN = 120  # characters of a list


class Prepared(Protocol):
    """Data that say what was done to them, such as `SplitData`."""

    @property
    def classes(self) -> Sequence[str] | None: ...

    def preparation(self, field: str) -> Mapping[str, Any]: ...


class Given(NamedTuple):
    """What a model folder or a file has for `labels`, blocks of the uncut model; it is read when it is asked for."""

    where: Path
    labels: Sequence[str]
    read: Callable[[], Mapping[str, Tensor]]
    manifest: Manifest | None = None


class Origins(NamedTuple):
    """Where the blocks of a party's, or of all, have their weights from; `unused` has no block here to take it."""

    taken: Mapping[str, Path]
    fresh: Sequence[str]
    unused: Sequence[str]

    def __str__(self) -> str:
        told = [
            f"{', '.join(label for label, place in self.taken.items() if place == where)} from {where}"
            for where in dict.fromkeys(self.taken.values())
        ]
        told += [f"{', '.join(self.fresh)} fresh"] if self.fresh else []
        told += [f"no block here for {', '.join(self.unused)}"] if self.unused else []
        return f"Initial weights: {'; '.join(told)}"


def start_from(
    network: SplitNetwork, places: Sequence[str | Path], leave_fresh: Sequence[str], data: Prepared
) -> Origins:
    """Give the blocks of `network` that live in this process the weights of folders and files; others stay fresh.

    Where the trained network was cut does not count. Blocks named in `leave_fresh` are passed over. `data` are those
    that the network is for.

    Raises InputError for a place where nothing is, or that is stale, damaged or of another run than the others, for
    weights that do not fit, and for columns and classes in another order. Warns of other ones, and of rows that were
    standardised otherwise.
    """
    everywhere, own = dict[str, dict[str, Tensor]](), dict[str, dict[str, Tensor]]()
    for stage, segment in network.program:
        everywhere |= _by_block(segment)
        own |= _by_block(segment) if network.wire.hosts(stage.role) else {}
    if odd := [label for label in leave_fresh if label not in everywhere]:
        raise InputError(f"`init_fresh` (={odd[0]}) must name blocks with weights: {', '.join(everywhere)}")
    optional = {name for _, segment in network.program for name in unsaved(segment)}
    given = _all_given(places, everywhere)
    taken: dict[str, Path] = {}
    for each in given:
        wanted = [label for label in each.labels if label in own and label not in leave_fresh]
        if twice := [label for label in wanted if label in taken]:
            raise InputError(
                f"`init` has block {twice[0]} in {taken[twice[0]]} and in {each.where}: name one of them, or a party's "
                "folder or file for each"
            )
        if wanted:
            _take(each, {label: own[label] for label in wanted}, optional)
            _check_data(each, wanted, network, data)
            taken |= dict.fromkeys(wanted, each.where)
    blocks = {label for _, segment in network.program for label in segment.labels.values()}
    unused = [label for each in given for label in each.labels if label not in blocks]
    taken = {label: taken[label] for label in own if label in taken}
    return Origins(taken, [label for label in own if label not in taken], unused)


def _all_given(places: Sequence[str | Path], known: Mapping[str, Mapping[str, Tensor]]) -> list[Given]:
    """Raises InputError where nothing of what is given has a block of the model by its name."""
    given: list[Given] = []
    parts: list[Part] = []
    for place in map(Path, places):
        if place.suffix in FILES and place.is_file():
            given.append(_in_file(place, known))
            continue
        if not place.is_dir():
            raise InputError(
                f"`init` (={place}) must be the folder of a run, a party's in it, or a file of weights "
                f"({', '.join(FILES)}): name one"
            )
        parts += _parts_in(place)
    for part in parts[1:]:
        check_same_run(parts[0], part)
    given += [_of_part(part) for part in parts]
    if not any(label in known for each in given for label in each.labels):
        there = ", ".join(dict.fromkeys(label for each in given for label in each.labels))
        raise InputError(
            f"`init` (={', '.join(map(str, places))}) has the blocks {outside(there, SHOWN)}, and the model here has "
            f"{outside(', '.join(known), SHOWN)}: take the `model` it was trained with"
        )
    return given


def _parts_in(folder: Path) -> list[Part]:
    """The part of a party's folder, or one for each role that has one in the folder of a run."""
    own = part_in(folder)
    if own is not None:
        return [own]
    found = parts_of(folder)
    roles = dict.fromkeys(part.manifest.role for part in found)
    cure = f"init=[{folder}/{{}},{folder}/bob]"
    return [trained_one(folder, [part for part in found if part.manifest.role == role], cure) for role in roles]


def _of_part(part: Part) -> Given:
    stages = part.manifest.layout.stages
    uses = Counter(name for stage in stages for name in stage.blocks)
    labels = [label for s in stages if s.name in part.manifest.stages for label in labels_of(s, uses).values()]
    return Given(part.folder, labels, lambda: read_weights(part.folder, part.manifest), part.manifest)


def _in_file(path: Path, known: Mapping[str, Mapping[str, Tensor]]) -> Given:
    """What a file has, be it by the names of the uncut model or, of one of torchvision's, by those of torchvision."""
    tensors = _read(path)
    ours = [name for block in known.values() for name in block]
    theirs = {name.removeprefix(f"{label}."): name for label, block in known.items() for name in block}
    if len(theirs) == len(ours) and sum(n in theirs for n in tensors) > sum(n in ours for n in tensors):
        tensors = {theirs.get(name, name): value for name, value in tensors.items()}
    labels = dict.fromkeys(_label(name, known) for name in tensors)
    return Given(path, list(labels), lambda: tensors)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises is up to its bytes
        raise InputError(f"`init` (={path}) cannot be read ({type(error).__name__}): take another one") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise InputError(
            f"`init` (={path}) must hold tensors by name alone: save the model's state_dict(), or take `weights` for a "
            "checkpoint"
        )
    return tensors


def _take(given: Given, own: Mapping[str, Mapping[str, Tensor]], optional: Iterable[str]) -> None:
    """Raises InputError, with the names, for what does not fit."""
    read = {name: value for name, value in given.read().items() if _label(name, own) in own}
    lacking = {*optional}
    mine = {
        name: value
        for block in own.values()
        for name, value in block.items()
        if name in read or not (name in lacking or name.endswith(f".{COUNTER}"))
    }
    if told := misfits(mine, read):
        blocks = [label for label in own if misfits(_only(label, own, mine), _only(label, own, read))]
        raise InputError(
            f"`init` (={given.where}) does not fit: {told}: take the `model` it was trained with, or leave what "
            f"differs fresh, init_fresh=[{','.join(blocks)}]"
        )
    put(mine, read)


def _check_data(given: Given, labels: Sequence[str], network: SplitNetwork, data: Prepared) -> None:
    """Whether inputs and classes mean what they meant, as far as these blocks see them."""
    if given.manifest is None:
        return
    *_, last = (label for _, segment in network.program for label in _by_block(segment))
    if last in labels:
        _compare_names(given, "classes", given.manifest.classes, data.classes)
    for stage, segment in network.program:
        first = next(iter(_by_block(segment)), None)
        for field in stage.inputs if first in labels else ():
            told = given.manifest.inputs.get(field)
            if told is None:
                continue
            here = data.preparation(field)
            _compare_names(given, "columns", told["columns"], here["columns"])
            if differing := [what for what in ("mean", "std") if str(told[what]) != str(here[what])]:
                there, now = (
                    " and ".join(f"data.{what} {outside(each[what], SHOWN)}" for what in differing)
                    for each in (told, here)
                )
                warnings.warn(
                    f"`init` (={given.where}) was trained on rows with {there}, and here they have {now}: give those "
                    "of there, unless the rows are of another kind",
                    stacklevel=2,
                )


def _compare_names(given: Given, what: str, there: Sequence[str] | None, here: Sequence[str] | None) -> None:
    """Raises InputError for the same names in another order, by which one would be taken for another."""
    if there is None or here is None or [*there] == [*map(str, here)]:
        return
    told = f"`init` (={given.where}) was trained for the {what} {outside(', '.join(there), SHOWN)}, and here they are "
    told += outside(", ".join(map(str, here)), SHOWN)
    if sorted(there) == sorted(map(str, here)):
        raise InputError(f"{told}: bring them into the order of there")
    warnings.warn(f"{told}: leave the block fresh that reads or tells them, init_fresh=[...]", stacklevel=2)


def _only(label: str, labels: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if _label(name, labels) == label}


def _by_block(segment: Segment) -> dict[str, dict[str, Tensor]]:
    """The tensors of each block that has some, by its name in the uncut model."""
    tensors, labels = named(segment), segment.labels.values()
    return {label: mine for label in labels if (mine := _only(label, labels, tensors))}


def _label(name: str, labels: Iterable[str]) -> str:
    """The block that a tensor is of; the first part of its name where no block of `labels` is."""
    return next((label for label in labels if name.startswith(f"{label}.")), name.partition(".")[0])

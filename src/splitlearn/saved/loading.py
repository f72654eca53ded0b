"""From model folders to modules: a party's segments, or the whole network."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from splitlearn.blocks import check_blocks
from splitlearn.errors import InputError, outside
from splitlearn.layout import Layout, Party
from splitlearn.network import SplitNetwork, join, segment_of
from splitlearn.saved.folder import fill, read_weights
from splitlearn.saved.manifest import MANIFEST, Manifest, read_manifest
from splitlearn.segment import Segment
from splitlearn.wire import Wire

FOLDER = "model"
"""A party's model folder within its folder of a run."""
OURS = "splitlearn.models"
Model = nn.Sequential | Callable[..., nn.Sequential]


class Part(NamedTuple):
    """A party's model folder."""

    folder: Path
    manifest: Manifest


class Branches(nn.Module):
    """The bottoms of a vertical layout beside each other: each takes its columns of the input, outputs are joined.

    x: [B, ..., C] to the activations of all, joined along dimension 1.
    """

    def __init__(self, bottoms: Mapping[str, nn.Sequential], places: Sequence[Sequence[int]]) -> None:
        super().__init__()
        for name, bottom in bottoms.items():
            self.add_module(name, bottom)
        for i, columns in enumerate(places):
            self.register_buffer(f"places{i}", torch.tensor(columns), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [
            bottom(x.index_select(-1, self.get_buffer(f"places{i}"))) for i, bottom in enumerate(self.children())
        ]
        return join(outputs)


def load(folder: str | Path, model: Model | None = None, alice: Party | None = None) -> nn.Sequential | nn.ModuleDict:
    """Return what a run has trained, in evaluation mode. Nothing is unpickled, and no code of the folder's is run.

    The folder of a run, with the parts of all parties, gives the network in one piece: the blocks of the model by their
    names, behind `bottoms` where each Alice owns columns. It takes the rows as the network did, with what the
    manifests say of mean and deviation. A party's folder gives its segments by stage.

    Arguments:
        folder: `outputs/DATE/TIME`, a party's folder in it, or that one's `model`.
        model: a model that is not splitlearn's own, as nn.Sequential, which then gets the weights, or as the function
            that made it; what a manifest names is not imported.
        alice: whose bottom it shall be, where each has one of her own.

    Raises InputError for a folder without a model, with parts missing or of several runs, damaged or of a newer format,
    and for a model that the weights do not fit.
    """
    folder = Path(folder)
    own = part_in(folder)
    if own is not None:
        return nn.ModuleDict({name: _plain(segment) for name, segment in segments_of([own], model).items()}).eval()
    chosen = choose(folder, parts_of(folder), alice)
    return in_one_piece(chosen[0].manifest.layout, segments_of(chosen, model), inputs_of(chosen)).eval()


def inputs_of(parts: Sequence[Part]) -> dict[str, Mapping[str, Any]]:
    """Return what the manifests of these parties say of the data fields that they own."""
    return {name: field for part in parts for name, field in part.manifest.inputs.items()}


def part_in(folder: Path) -> Part | None:
    """Return the part in a party's folder, None where it is not one."""
    places = [place for place in (folder, folder / FOLDER) if (place / MANIFEST).is_file()]
    return Part(places[0], read_manifest(places[0])) if places else None


def parts_of(folder: Path) -> list[Part]:
    """Return all parts in the folder of a run. Raises InputError where there are none, or those of two runs."""
    places = sorted(path.parent for path in folder.glob(f"*/{FOLDER}/{MANIFEST}"))
    if not places:
        raise InputError(f"{folder} has no model: name the folder of a run that has ended, or a party's in it")
    parts = [Part(place, read_manifest(place)) for place in places]
    for part in parts[1:]:
        check_same_run(parts[0], part)
    return parts


def check_same_run(one: Part, other: Part) -> None:
    """Raises InputError, with the first difference, for parts of two runs."""
    ours, theirs = one.manifest, other.manifest
    told = {"configuration": (ours.config, theirs.config), "mini-batches": (ours.step, theirs.step)}
    told |= {name: (ours.run.get(name), theirs.run.get(name)) for name in sorted({*ours.run, *theirs.run})}
    for name, (mine, others) in reversed(told.items()):
        if mine != others:
            raise InputError(
                f"{one.folder} and {other.folder} are of two runs: `{name}` is {outside(mine)} in one and "
                f"{outside(others)} in the other; take the folders of one run"
            )


def network_of(
    parts: Sequence[Part], sample: Mapping[str, Tensor], wire: Wire | None = None, model: Model | None = None
) -> SplitNetwork:
    """Return the split network of these parties in evaluation mode, with their weights; a few rows are the `sample`."""
    weights = {part.folder: read_weights(part.folder, part.manifest) for part in parts}
    with _making(parts[0].folder):
        network = SplitNetwork(_make(parts[0], model), parts[0].manifest.layout, sample, wire)
    segments = {stage.name: segment for stage, segment in network.program}
    for part in parts:
        fill([segments[name] for name in part.manifest.stages], weights[part.folder], part.folder)
    return network.eval()


def segments_of(parts: Sequence[Part], model: Model | None = None) -> dict[str, Segment]:
    """Return the segments of these parties by stage, in the order of the layout, with their weights."""
    layout = parts[0].manifest.layout
    weights = {part.folder: read_weights(part.folder, part.manifest) for part in parts}
    told = {name: stage for part in parts for name, stage in part.manifest.stages.items()}
    uses = Counter(name for stage in layout.stages for name in stage.blocks)
    with _making(parts[0].folder):
        blocks = check_blocks(_make(parts[0], model))
        if odd := [name for name in uses if name not in blocks]:
            raise ValueError(f"it has no block {odd[0]}")
        segments = {
            stage.name: _shaped(segment_of(stage, blocks, uses, seed=0), **told[stage.name])
            for stage in layout.stages
            if stage.name in told
        }
    for part in parts:
        fill([segments[name] for name in part.manifest.stages], weights[part.folder], part.folder)
    return segments


@contextmanager
def _making(where: Path) -> Iterator[None]:
    """Raises InputError for a model that cannot be made; leaves the random numbers as they are."""
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except InputError:
        raise
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        why = outside(" ".join(str(error).split()))
        raise InputError(f"the model of {where} cannot be made ({why}): give the trained one, model=...") from error


def _shaped(segment: Segment, shape: Sequence[int], dtype: str, **_: object) -> Segment:
    """Give lazy layers their shapes, by rows of zeros."""
    kind = getattr(torch, dtype)
    segment.shape(torch.zeros(2, *shape, dtype=torch.get_default_dtype() if kind.is_floating_point else kind))
    return segment


def _make(part: Part, model: Model | None) -> Any:
    if isinstance(model, nn.Module):
        return model
    asked = dict(part.manifest.model or {})
    target = str(asked.pop("_target_", ""))
    module, _, name = target.rpartition(".")
    if model is None:
        if not f"{module}.".startswith(f"{OURS}."):
            whose = f"the model {outside(target)}" if target else "a model that no configuration names"
            raise InputError(
                f"{part.folder} has {whose}, which is not splitlearn's own and is not imported for a folder's asking: "
                "give it, model=my_net, or on the command line model._target_=my_module.my_net"
            )
        if "weights" in asked:
            asked["weights"] = None  # pretrained ones, which would be fetched and then replaced
    make = getattr(import_module(module), name) if model is None else model
    return make(num_classes=part.manifest.num_classes, **asked)


def choose(folder: Path, parts: Sequence[Part], alice: Party | None) -> list[Part]:
    """Return a part for each role. Raises InputError where one is missing, or several Alices have different ones."""
    chosen = []
    for role in parts[0].manifest.layout.roles:
        having = [part for part in parts if part.manifest.role == role]
        if role == "alice" and alice is not None:
            having = [part for part in having if part.manifest.party == alice]
        if not having:
            who = alice if role == "alice" and alice is not None else role
            raise InputError(f"{folder} lacks the part of {who}: put the folder of that party there, {who}/{FOLDER}")
        chosen.append(trained_one(folder, having, "alice='{}'"))
    return chosen


def trained_one(folder: Path, parts: Sequence[Part], cure: str) -> Part:
    """Return the part of one role that has the trained weights. Raises InputError where these are not the same of all.

    `cure` tells how to say whose, with `{}` for the name of a party.
    """
    fresh = [part for part in parts if not part.manifest.stale] or parts
    if len({part.manifest.weights["digest"] for part in fresh}) > 1:
        names = ", ".join(part.manifest.party for part in fresh)
        raise InputError(
            f"{folder} has another bottom of each Alice ({names}): say whose, {cure.format(fresh[0].manifest.party)}"
        )
    return fresh[0]


def in_one_piece(
    layout: Layout, segments: Mapping[str, Segment], fields: Mapping[str, Mapping[str, Any]]
) -> nn.Sequential:
    bottoms = [stage for stage in layout.stages if set(stage.inputs) <= set(layout.fields)]
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    if len(bottoms) > 1:
        own = {stage.name: _plain(segments[stage.name]) for stage in bottoms}
        blocks["bottoms"] = Branches(own, [fields[stage.inputs[0]]["places"] for stage in bottoms])
    for stage in layout.stages:
        if len(bottoms) == 1 or stage not in bottoms:
            blocks.update(segments[stage.name]._modules)
    return nn.Sequential(blocks)


def _plain(segment: Segment) -> nn.Sequential:
    return nn.Sequential(OrderedDict(segment._modules))

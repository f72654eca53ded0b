"""Who holds what: the stages of a split network in order, and the owners of the data fields.

A layout is data. It is drawn the same way everywhere; `sends` stands for the activation going right and its
gradient coming back:

    two_party           alice: x -> bottom  |  bob: top <- y
    multi_hop           alice: x -> segment0  |  bob: segment1  |  carol: segment2 <- y
    u_shaped            alice: x -> head  |  bob: body  |  alice: tail <- y
    vertical            alice0: x0 -> bottom0, alice1: x1 -> bottom1  |  bob: top <- y
    extended_vanilla    alice0: x0 -> bottom0, alice1: x1 -> bottom1  |  carol: middle  |  bob: top <- y
    whole               alice: x -> whole <- y

Gupta & Raskar 2018 (arXiv 1810.06060) define the first three and vertical data, Vepakomma et al. 2018
(arXiv 1812.00564) the extended vanilla configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from torch import nn

Party = str
"""A name: `alice0`, `bob`, `carol`. The party owns segments, an optimizer and the data fields the layout gives it."""
Role = str
"""The part that a party plays: `alice` is played by each Alice in her turn, any other by the party of its name."""

Blocks = nn.Module | Sequence[str]
"""A model of named blocks, or their names, in order."""

CHAIN = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")


class Stage(NamedTuple):
    """One segment's place in the network: the blocks it runs, who runs them, on which earlier values.

    `inputs` names data fields (`x`) or earlier stages; several are concatenated along dimension 1.
    """

    name: str
    role: Role
    inputs: tuple[str, ...]
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Stages in order, and the role that owns each data field. The role of the last stage holds the loss.

    Raises ValueError when a stage would read what its role cannot hold: raw data never crosses.
    """

    kind: str
    stages: tuple[Stage, ...]
    owners: Mapping[str, Role]

    def __post_init__(self) -> None:
        known: set[str] = set()
        for stage in self.stages:
            for name in stage.inputs:
                if name in self.owners and self.owners[name] != stage.role:
                    raise ValueError(
                        f"stage `{stage.name}` of {stage.role} reads `{name}`, which {self.owners[name]} owns: "
                        f"data never crosses; give the stage to {self.owners[name]}"
                    )
                if name not in self.owners and name not in known:
                    raise ValueError(f"stage `{stage.name}` reads `{name}`, which no earlier stage computes")
            known.add(stage.name)
        _check_labels(self.kind, self.owners["y"], self.roles)

    @cached_property
    def roles(self) -> tuple[Role, ...]:
        return tuple(dict.fromkeys(stage.role for stage in self.stages))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the input, `("x",)` or `("x0", "x1", ...)` where several parties own columns of it."""
        return tuple(name for name in self.owners if name != "y")

    def takers(self, num_alices: int) -> tuple[Party, ...]:
        """Who takes turns: every Alice after the other, or all Alices at once under the one name `alices`."""
        if not isinstance(num_alices, int) or num_alices < 1:
            raise ValueError(f"`num_alices` (={num_alices}) must be a whole number of at least 1")
        return tuple(f"alice{i}" for i in range(num_alices)) if "alice" in self.roles else ("alices",)

    def cast(self, taker: Party) -> dict[Role, Party]:
        """Return the party that plays each role while `taker` has the turn."""
        return {role: taker if role == "alice" else role for role in self.roles}

    def describe(self) -> str:
        """One line that two equal layouts share and two different ones do not: checkpoints carry it."""
        stages = [f"{s.role}.{s.name}({', '.join(s.inputs)})=[{', '.join(s.blocks)}]" for s in self.stages]
        return f"{self.kind}: " + " | ".join(stages) + f" | labels at {self.owners['y']}"


def two_party(blocks: Blocks, cut: int | str, labels: Role = "bob") -> Layout:
    """Alice has the data and the blocks before `cut`, Bob the rest and (by default) the labels."""
    blocks = _names(blocks)
    at = _find_cuts("two_party", blocks, [cut])[0]
    bottom = Stage("bottom", "alice", ("x",), tuple(blocks[:at]))
    top = Stage("top", "bob", ("bottom",), tuple(blocks[at:]))
    return Layout("two_party", (bottom, top), {"x": "alice", "y": labels})


def multi_hop(
    blocks: Blocks, cuts: Sequence[int | str], parties: Sequence[str] | None = None, labels: Role | None = None
) -> Layout:
    """A chain of `len(cuts) + 1` parties; the last holds the labels unless `labels` names another."""
    blocks = _names(blocks)
    bounds = [0, *_find_cuts("multi_hop", blocks, cuts), len(blocks)]
    roles = list(parties) if parties is not None else list(CHAIN[: len(bounds) - 1])
    if len(roles) != len(bounds) - 1 or len(set(roles)) != len(roles) or roles[0] != "alice":
        raise ValueError(
            f"`parties` (={roles}) must be {len(bounds) - 1} different names for {len(cuts)} cuts, alice first"
        )
    stages = tuple(
        Stage(f"segment{i}", role, (f"segment{i - 1}" if i else "x",), tuple(blocks[bounds[i] : bounds[i + 1]]))
        for i, role in enumerate(roles)
    )
    return Layout("multi_hop", stages, {"x": "alice", "y": roles[-1] if labels is None else labels})


def u_shaped(blocks: Blocks, cuts: Sequence[int | str], labels: Role = "alice") -> Layout:
    """Alice has both ends, data and labels; Bob the body. No label ever leaves Alice."""
    blocks = _names(blocks)
    first, second = _find_cuts("u_shaped", blocks, cuts, exactly=2)
    if labels != "alice":
        raise ValueError(f"`layout.labels` (={labels}) must be alice in a U: the loss is hers; use two_party otherwise")
    head = Stage("head", "alice", ("x",), tuple(blocks[:first]))
    body = Stage("body", "bob", ("head",), tuple(blocks[first:second]))
    tail = Stage("tail", "alice", ("body",), tuple(blocks[second:]))
    return Layout("u_shaped", (head, body, tail), {"x": "alice", "y": "alice"})


def vertical(blocks: Blocks, cut: int | str, num_alices: int, labels: Role = "bob") -> Layout:
    """Each Alice owns columns of the input and a bottom of her own; Bob joins the activations and holds the labels."""
    blocks = _names(blocks)
    at = _find_cuts("vertical", blocks, [cut])[0]
    bottoms = _bottoms(blocks[:at], num_alices)
    top = Stage("top", "bob", tuple(stage.name for stage in bottoms), tuple(blocks[at:]))
    return Layout("vertical", (*bottoms, top), {**_columns(bottoms), "y": labels})


def extended_vanilla(blocks: Blocks, cuts: Sequence[int | str], num_alices: int, labels: Role = "bob") -> Layout:
    """Vertical bottoms whose joined activations pass through Carol before they reach Bob."""
    blocks = _names(blocks)
    first, second = _find_cuts("extended_vanilla", blocks, cuts, exactly=2)
    bottoms = _bottoms(blocks[:first], num_alices)
    middle = Stage("middle", "carol", tuple(stage.name for stage in bottoms), tuple(blocks[first:second]))
    top = Stage("top", "bob", ("middle",), tuple(blocks[second:]))
    return Layout("extended_vanilla", (*bottoms, middle, top), {**_columns(bottoms), "y": labels})


def whole(blocks: Blocks) -> Layout:
    """No cut: Alice has the data, the labels and the whole network. The baseline that the others must equal."""
    return Layout("whole", (Stage("whole", "alice", ("x",), tuple(_names(blocks))),), {"x": "alice", "y": "alice"})


def _names(blocks: Blocks) -> Sequence[str]:
    return list(blocks._modules) if isinstance(blocks, nn.Module) else blocks


def _bottoms(blocks: Sequence[str], num_alices: int) -> tuple[Stage, ...]:
    if not isinstance(num_alices, int) or num_alices < 2:
        raise ValueError(f"`num_alices` (={num_alices}) must be at least 2 to own columns; use two_party for one")
    return tuple(Stage(f"bottom{i}", f"alice{i}", (f"x{i}",), tuple(blocks)) for i in range(num_alices))


def _columns(bottoms: Sequence[Stage]) -> dict[str, Role]:
    return {stage.inputs[0]: stage.role for stage in bottoms}


def _check_labels(kind: str, owner: Role, roles: Sequence[Role]) -> None:
    if owner not in roles:
        raise ValueError(f"`layout.labels` (={owner}) must be one of the roles of {kind}: {', '.join(roles)}")


def _find_cuts(kind: str, blocks: Sequence[str], cuts: Sequence[int | str], exactly: int | None = None) -> list[int]:
    """Return each cut as the number of blocks before it; a block's name cuts behind that block."""
    key = "layout.cut" if kind in ("two_party", "vertical") else "layout.cuts"
    listed = isinstance(cuts, Sequence) and not isinstance(cuts, str)
    if not listed or not cuts or (exactly is not None and len(cuts) != exactly):
        wanted = f"exactly {exactly} cuts" if exactly is not None else "a list of at least one cut"
        raise ValueError(f"`{key}` (={cuts}) must be {wanted}, e.g. `{key}=[1,2]`, for {kind}")
    found = [_find_cut(key, blocks, cut) for cut in cuts]
    if any(a >= b for a, b in pairwise(found)):
        raise ValueError(f"`{key}` (={list(cuts)}) must increase from the input to the output: {_numbered(blocks)}")
    return found


def _find_cut(key: str, blocks: Sequence[str], cut: int | str) -> int:
    if isinstance(cut, str):
        if cut not in blocks[:-1]:
            raise ValueError(f"`{key}` (={cut}) must name a block before the last one: {_numbered(blocks)}")
        return blocks.index(cut) + 1
    if isinstance(cut, bool) or not isinstance(cut, int) or not 0 < cut < len(blocks):
        raise ValueError(
            f"`{key}` (={cut}) must lie between 1 and {len(blocks) - 1}, the blocks being {_numbered(blocks)}"
        )
    return cut


def _numbered(blocks: Sequence[str]) -> str:
    return ", ".join(f"{i}: {name}" for i, name in enumerate(blocks, start=1))

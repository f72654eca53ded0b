"""The layout as a drawing: who owns which blocks, and what crosses each cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitlearn.cut import Hop
from splitlearn.data import SplitData
from splitlearn.layout import Party
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Handoff
from splitlearn.schedules.weights import RoleWeights

MOST_CLASSES = 20  # that are told one by one


def draw(network: SplitNetwork, sample: Mapping[str, Tensor], batch_size: int, schedule: Schedule) -> str:
    """Return the drawing: a line for each stage, with what crosses on the way to it above it.

    two_party
    alice   x 1x28x28 -> hidden1 hidden2                    183,040 parameters
      | alice -> bob: activation 64 x 640 float32, 163,840 bytes, and its gradient back
    bob     head <- y                                         6,410 parameters
    """
    layout, times = network.layout, batch_size / len(sample["y"])
    tape, ledger = network.look(sample)
    segments = {stage.name: segment for stage, segment in network.program}
    hops, trained = iter(tape), set[str]()  # stages that want a gradient
    in_turns = isinstance(schedule.alice, Handoff)
    takers, how = schedule.takers, "at once" if schedule.turn == "step" else "in turns" if in_turns else "side by side"
    lines = [layout.kind if len(takers) == 1 else f"{layout.kind}, {how}: {_shorten(takers)}"]
    for stage in layout.stages:
        crossing = [name for name in stage.inputs if network.owners.get(name, stage.role) != stage.role]
        lines += [_crossing(next(hops), batch_size, times, name in trained) for name in crossing]
        if any(p.requires_grad for p in segments[stage.name].parameters()) or trained & set(stage.inputs):
            trained.add(stage.name)
        blocks = [f"{name} {_shape(sample[name])} ->" for name in stage.inputs if name in sample] + list(stage.blocks)
        size = sum(p.numel() for p in segments[stage.name].parameters())
        labels = " <- y" if stage is layout.stages[-1] and layout.owners["y"] == stage.role else ""
        lines.append(f"{stage.role:<8}{' '.join(blocks) + labels:<48}{size:>14,} parameters")
    for (src, dst, kind), num_bytes in ledger.num_bytes.items():
        if kind == "label":
            lines.append(f"  | {src} -> {dst}: {batch_size} labels, {times * num_bytes:,.0f} bytes")
    if len(takers) > 1 and schedule.alice.way:
        hers = {stage.name: segments[stage.name] for stage in layout.stages if stage.role == "alice"}
        weights = RoleWeights("alice", hers, network.wire)
        moved = {**weights.trained, **weights.buffers} if schedule.alice.defers else weights.tensors
        lines.append("  | " + schedule.alice.way.format(f"{sum(v.nbytes for v in moved.values()):,}"))
    return "\n".join(lines)


def show(learner: SplitLearner, data: SplitData, sample: Mapping[str, Tensor]) -> None:
    """Print the drawing of a run for some rows of its data, and the classes that these have."""
    drawn = draw(learner.network, sample, data.batch_size, learner.schedule)
    print(drawn, *classes_found(data.labels, data.classes), sep="\n", flush=True)


def classes_found(labels: Tensor, classes: Sequence[str] | None) -> list[str]:
    """Return a line that says which class has which number, and how many rows, or none where classes have no names.

    classes: 0 ill (24 rows), 1 well (40)

    `labels` [N] int64, -1 where this party does not know them.
    """
    known = labels[labels >= 0]
    if classes is None or not len(known):
        return []
    counts = torch.bincount(known, minlength=len(classes)).tolist()
    told = [f"{i} {name} ({counts[i]:,}{' rows' * (i == 0)})" for i, name in enumerate(classes[:MOST_CLASSES])]
    return [f"classes: {', '.join(told)}{', ...' * (len(classes) > MOST_CLASSES)}"]


def _crossing(hop: Hop, batch_size: int, times: float, returns: bool) -> str:
    kind = str(hop.received.dtype).removeprefix("torch.")
    what = f"activation {batch_size} x {_shape(hop.received)} {kind}, {times * hop.received.nbytes:,.0f} bytes"
    return f"  | {hop.sender} -> {hop.receiver}: {what}{', and its gradient back' * returns}"


def _shape(value: Tensor) -> str:
    return "x".join(str(size) for size in value.shape[1:])


def _shorten(takers: Sequence[Party]) -> str:
    return ", ".join(takers) if len(takers) <= 5 else f"{takers[0]}, {takers[1]}, ..., {takers[-1]}"

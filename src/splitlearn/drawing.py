"""The layout as a drawing: who owns which blocks, and what crosses each cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from splitlearn.layout import Party
from splitlearn.network import SplitNetwork


def draw(network: SplitNetwork, sample: Mapping[str, Tensor], batch_size: int, takers: Sequence[Party]) -> str:
    """Return the drawing: a line for each stage, with what crosses on the way to it above it.

        two_party
        alice   x 1x28x28 -> hidden1 hidden2                    183,040 parameters
          | alice -> bob: activation 64 x 640 float32, 163,840 bytes, and its gradient back
        bob     head <- y                                         6,410 parameters
    """
    layout, rows = network.layout, len(sample["y"])
    tape, ledger = network.look(sample)
    hops = iter(tape)
    lines = [layout.kind if len(takers) == 1 else f"{layout.kind}, in turns: {_shorten(takers)}"]
    for stage in layout.stages:
        for name in stage.inputs:
            if network.owners.get(name, stage.role) != stage.role:
                hop = next(hops)
                what = f"activation {_shape(hop.received, batch_size)}, {batch_size * hop.received.nbytes // rows:,} bytes"
                lines.append(f"  | {hop.sender} -> {hop.receiver}: {what}, and its gradient back")
        blocks = [f"{name} {_shape(sample[name])} ->" for name in stage.inputs if name in sample] + list(stage.blocks)
        size = sum(p.numel() for p in network.segments[stage.name].parameters())
        labels = " <- y" if stage is layout.stages[-1] else ""
        lines.append(f"{stage.role:<8}{' '.join(blocks) + labels:<48}{size:>14,} parameters")
    for (src, dst, kind), num_bytes in ledger.num_bytes.items():
        if kind == "label":
            lines.append(f"  | {src} -> {dst}: {batch_size} labels, {batch_size * num_bytes // rows:,} bytes")
    if len(takers) > 1:
        weights = sum(value.nbytes for segment in network.segments_of("alice") for value in segment.state_dict().values())
        lines.append(f"  | each alice -> the next: weights, {weights:,} bytes a turn")
    return "\n".join(lines)


def _shape(value: Tensor, batch_size: int | None = None) -> str:
    row = "x".join(str(size) for size in value.shape[1:])
    return row if batch_size is None else f"{batch_size} x {row} {str(value.dtype).removeprefix('torch.')}"


def _shorten(takers: Sequence[Party]) -> str:
    return ", ".join(takers) if len(takers) <= 5 else f"{takers[0]}, {takers[1]}, ..., {takers[-1]}"

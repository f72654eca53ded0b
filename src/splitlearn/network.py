"""The split network: segments of a model, run stage by stage, each by the party that owns it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from splitlearn.cut import CutLayer, Hop, run_backward
from splitlearn.layout import Layout, Party, Role, Stage
from splitlearn.ledger import Ledger
from splitlearn.seeds import derive
from splitlearn.wire import Wire


class Batch(NamedTuple):
    """One mini-batch: the rows `ids` of every data field, wherever its owner keeps it.

    `ids` [B] int64, the rows' places in the data set; `fields` maps `x` (or `x0`, `x1`, ...) and `y` to [B, ...];
    `number` is (epoch, place in the epoch), which seeds whatever is drawn on the way.
    """

    ids: Tensor
    fields: dict[str, Tensor]
    number: tuple[int, int]


class Segment(nn.Sequential):
    """A named slice of the model. What a block draws (dropout) depends on (seed, block, mini-batch) alone.

    So the draw is the same wherever the network is cut, in every engine and in a resumed run.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], labels: Mapping[str, str], seed: int) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)
        self.labels = dict(labels)
        self.seed = seed
        self.drawing: frozenset[str] = frozenset()

    def forward(self, x: Tensor, number: tuple[int, int] = (0, 0)) -> Tensor:
        if not (self.drawing and self.training):
            return super().forward(x)
        for name, block in self.named_children():
            if name in self.drawing:
                _seed(derive(self.seed, "draw", self.labels[name], *number), x.device)
            x = block(x)
        return x

    def shape(self, x: Tensor) -> Tensor:
        """Give lazy layers their shapes and draw their weights, a block at a time; return the output for `x`.

        Raises ValueError when a block does not fit the output of the one before it, or writes into its input.
        """
        drawing = set()
        for i, (name, block) in enumerate(self.named_children()):
            torch.manual_seed(derive(self.seed, "weights", self.labels[name]))
            try:
                with torch.no_grad(), _evaluating(block):
                    out = block(x)
                if _draws(copy.deepcopy(block), x.detach().requires_grad_(i == 0 and x.is_floating_point())):
                    drawing.add(name)
            except (RuntimeError, ValueError, TypeError) as error:
                raise ValueError(_misfit(name, x, error)) from error
            if not isinstance(out, Tensor):
                raise ValueError(f"block `{name}` returns a {type(out).__name__}: every block must return one tensor")
            x = out
        self.drawing = frozenset(drawing)
        return x


class SplitNetwork(nn.Module):
    """A model cut into the segments of a layout, with a cut layer wherever a value goes to another party.

    Arguments:
        model: named blocks, at least one, each taking the output of the one before it.
        layout: made for the names of these blocks.
        wire: what the cut layers and the labels go through.
        sample: a few rows of each data field, from which lazy layers take their shapes.
        seed: initial weights are a function of (seed, block name) for lazy layers.

    `sample_output` is the output for the sample, by which a loss is checked.
    """

    def __init__(
        self, model: nn.Sequential, layout: Layout, wire: Wire, sample: Mapping[str, Tensor], seed: int = 0
    ) -> None:
        super().__init__()
        self.layout = layout
        self.wire = wire
        self.cut = CutLayer(wire)
        blocks = check_blocks(model)
        uses = Counter(name for stage in layout.stages for name in stage.blocks)
        segments = {stage.name: _segment(stage, blocks, uses, seed) for stage in layout.stages}
        self.segments = nn.ModuleDict(segments)
        self.owners = {stage.name: stage.role for stage in layout.stages}
        # A list beside the ModuleDict, whose look-ups would cost as much as the cut itself.
        self.program = [(stage, segments[stage.name]) for stage in layout.stages]
        with torch.random.fork_rng(devices=[]):
            self.sample_output = self._shape(sample)

    def forward(self, batch: Batch, cast: Mapping[Role, Party]) -> tuple[Tensor, Tensor, list[Hop]]:
        """Run all stages. Return the output and the labels, both at the holder of the loss, and the tape of hops."""
        values = dict(batch.fields)
        tape: list[Hop] = []
        for stage, segment in self.program:
            inputs = [self._bring(values, name, stage.role, cast, tape) for name in stage.inputs]
            values[stage.name] = segment(_join(inputs), batch.number)
        holder, owner = cast[stage.role], cast[self.layout.owners["y"]]
        labels = values["y"] if owner == holder else self.wire.carry(values["y"], owner, holder, "label")
        return values[stage.name], labels, tape

    def backward(self, loss: Tensor, tape: list[Hop]) -> None:
        """Walk the tape backwards: each gradient crosses its cut to the party that sent the activation."""
        run_backward(loss)
        for hop in reversed(tape):
            self.cut.backward(hop)

    @torch.no_grad()
    def look(self, fields: Mapping[str, Tensor]) -> tuple[list[Hop], Ledger]:
        """Run some rows in evaluation mode. Return what would cross, each party named by its role, and its bytes.

        Nothing is sent: the network's own ledger and taps do not hear of it.
        """
        wire = self.wire
        self.wire = self.cut.wire = Wire()
        try:
            with _evaluating(self):
                rows = torch.arange(len(fields["y"]))
                _, _, tape = self(Batch(rows, dict(fields), (0, 0)), {role: role for role in self.layout.roles})
            return tape, self.wire.ledger
        finally:
            self.wire = self.cut.wire = wire

    def segments_of(self, role: Role) -> list[nn.Module]:
        return [self.segments[stage.name] for stage in self.layout.stages if stage.role == role]

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """Return the parameters of the role that are trained; frozen ones are left out."""
        return [p for segment in self.segments_of(role) for p in segment.parameters() if p.requires_grad]

    def _bring(
        self, values: dict[str, Tensor], name: str, role: Role, cast: Mapping[Role, Party], tape: list[Hop]
    ) -> Tensor:
        owner = self.owners.get(name, role)
        if owner == role:
            return values[name]
        hop = self.cut(values[name], cast[owner], cast[role])
        tape.append(hop)
        return hop.received

    def _shape(self, sample: Mapping[str, Tensor]) -> Tensor:
        values = dict(sample)
        for stage, segment in self.program:
            values[stage.name] = segment.shape(_join([values[name] for name in stage.inputs]))
        return values[stage.name]


def check_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's blocks by name. Raises ValueError for a model that is not a sequence of them."""
    if not isinstance(model, nn.Sequential) or len(model) == 0:
        raise ValueError(
            f"`model` (={type(model).__name__}) must be an nn.Sequential of at least one block: "
            "the cut falls between blocks; return nn.Sequential(OrderedDict(name=block, ...))"
        )
    return dict(model.named_children())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to each part's own: a batch norm that was put into evaluation mode stays there."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _join(inputs: list[Tensor]) -> Tensor:
    return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)


def _segment(stage: Stage, blocks: Mapping[str, nn.Module], uses: Counter[str], seed: int) -> Segment:
    """A block that several stages run (the bottoms of a vertical net) is a block of its own in each."""
    mine = {name: copy.deepcopy(blocks[name]) if uses[name] > 1 else blocks[name] for name in stage.blocks}
    labels = {name: f"{stage.name}.{name}" if uses[name] > 1 else name for name in stage.blocks}
    _make_safe(mine.values())
    return Segment(mine, labels, seed)


def _make_safe(blocks: Iterable[nn.Module]) -> None:
    """An in-place layer right behind a cut would write into a leaf of the graph; out of place, the values are equal."""
    for block in blocks:
        for module in block.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]


def _seed(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and `device` alone.

    For each kind of device that is not in use torch's own formats a stack trace, 2 ms in all under a Trainer.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _draws(block: nn.Module, x: Tensor) -> bool:
    """Whether the block draws random numbers when it trains. `x` is a leaf, as it is right behind a cut."""
    before = torch.get_rng_state()
    block.train()(x)
    return not torch.equal(before, torch.get_rng_state())


def _misfit(name: str, x: Tensor, error: Exception) -> str:
    shape = "x".join(str(size) for size in x.shape[1:])
    if "in-place operation" in str(error):
        return f"block `{name}` writes into its input in place, which fails right behind a cut: make it out of place"
    return (
        f"block `{name}` does not fit its input of shape {shape} ({str(x.dtype).removeprefix('torch.')}) per sample: "
        f"change the model or the data ({error})"
    )

"""The split network: segments of a model, run stage by stage, each by the party that owns it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from splitlearn.blocks import check_blocks, check_ties, fresh, make_safe, memory_of
from splitlearn.cut import CutLayer, Hop, run_backward
from splitlearn.errors import InputError
from splitlearn.layout import Layout, Party, Role, Stage
from splitlearn.ledger import Ledger
from splitlearn.segment import Segment, evaluating, to_meta
from splitlearn.wire import Absent, Wire, elsewhere


class Batch(NamedTuple):
    """One mini-batch: the rows `ids` of every data field, wherever its owner keeps it.

    `ids` [B] int64, the rows' places in the data set; `fields` maps `x` (or `x0`, `x1`, ...) and `y` to [B, ...];
    `number` is (epoch, place in the epoch), and of a micro-batch its place there; it seeds whatever is drawn on the
    way. `owners` [B] int64 are the places among the takers of the parties whose rows these are; None where nobody has
    said so.
    """

    ids: Tensor
    fields: dict[str, Tensor]
    number: tuple[int, ...]
    owners: Tensor | None = None


def micro(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into at most so many parts of equal size, the last of which may be smaller."""
    if parts == 1:
        return [batch]
    size = -(-len(batch.ids) // parts)
    fields = {name: field.split(size) for name, field in batch.fields.items()}
    return [
        Batch(ids, {name: field[i] for name, field in fields.items()}, (*batch.number, i))
        for i, ids in enumerate(batch.ids.split(size))
    ]


Pass = tuple[Tensor, Tensor, list[Hop]]
"""Output and labels, both at the holder of the loss, and the tape of hops."""


class Sampled(Protocol):
    """Data that can show a few rows."""

    def sample(self) -> Mapping[str, Tensor]: ...


class SplitNetwork(nn.Module):
    """A model cut into the segments of a layout, with a cut layer wherever a value goes to another party.

    Arguments:
        model: named blocks, at least one, each taking the output of the one before it.
        layout: made for the names of these blocks.
        sample: a few rows of each data field, from which lazy layers take their shapes, or what has a `sample()` of
            them, such as `SplitData`.
        wire: what the cut layers and the labels go through; None: that of the simulator.
        seed: initial weights are a function of (seed, block name) for lazy layers.

    `sample_output` is the output for the sample, by which a loss is checked; `sample` is its shapes, on meta.
    """

    def __init__(
        self,
        model: nn.Sequential,
        layout: Layout,
        sample: Mapping[str, Tensor] | Sampled,
        wire: Wire | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        wire = Wire() if wire is None else wire
        sample = sample if isinstance(sample, Mapping) else sample.sample()
        self.layout, self.seed = layout, seed
        self.wire = wire
        self.cut = CutLayer(wire)
        blocks = check_blocks(model)
        check_ties(blocks, layout.stages)
        uses = Counter(name for stage in layout.stages for name in stage.blocks)
        segments = {stage.name: segment_of(stage, blocks, uses, seed) for stage in layout.stages}
        # Those of other processes are no submodules: they are outlines on meta, which have nothing to save or train.
        self.segments = nn.ModuleDict({s.name: segments[s.name] for s in layout.stages if wire.hosts(s.role)})
        self.owners = {stage.name: stage.role for stage in layout.stages}
        # A list beside the ModuleDict, whose look-ups would cost as much as the cut itself.
        self.program = [(stage, segments[stage.name]) for stage in layout.stages]
        self.sample = {name: field.to("meta") for name, field in sample.items()}
        with torch.random.fork_rng(devices=[]):
            self.shapes = self._shape(sample)
        self.sample_output = self.shapes[layout.stages[-1].name]
        self.origins = ""
        """Where the initial weights come from, in words; nothing where they are drawn."""

    def forward(self, batch: Batch, cast: Mapping[Role, Party]) -> Pass:
        """Run the stages of the parties that this process plays; the values of others are on meta."""
        output, tape = self._run(batch, cast)
        holder, owner = self.holder(cast), cast[self.layout.owners["y"]]
        labels = batch.fields["y"] if "y" in batch.fields else elsewhere((len(batch.ids),), torch.int64)
        labels = labels if owner == holder else self.wire.carry(labels, owner, holder, "label")
        return output, labels, tape

    def predict(self, batch: Batch, cast: Mapping[Role, Party], receiver: Party) -> Tensor:
        """Return the output as `receiver` has it, on meta where another process plays her. No label is asked for."""
        output, _ = self._run(batch, cast)
        holder = self.holder(cast)
        return output if receiver == holder else self.wire.carry(output, holder, receiver, "prediction")

    def holder(self, cast: Mapping[Role, Party]) -> Party:
        """Return who runs the last stage."""
        return cast[self.layout.stages[-1].role]

    def backward(self, loss: Tensor | None, tape: list[Hop]) -> None:
        """Walk the tape backwards: each gradient crosses its cut to the party that sent the activation.

        `loss` is None where another process holds it.
        """
        if loss is not None:
            run_backward(loss)
        for hop in reversed(tape):
            self.cut.backward(hop)

    @torch.no_grad()
    def look(self, fields: Mapping[str, Tensor]) -> tuple[list[Hop], Ledger]:
        """Run some rows in evaluation mode. Return what would cross, each party named by its role, and its bytes.

        Nothing is sent: the network's own ledger and taps do not hear of it. Where a part of the network lives in
        another process, what would cross is on meta.
        """
        wire = self.wire
        self.wire = self.cut.wire = Wire() if self.complete else Absent()
        try:
            with evaluating(self):
                rows = torch.arange(len(fields["y"]))
                _, _, tape = self(Batch(rows, dict(fields), (0, 0)), {role: role for role in self.layout.roles})
            return tape, self.wire.ledger
        finally:
            self.wire = self.cut.wire = wire

    @property
    def complete(self) -> bool:
        """Whether all of the network lives in this process."""
        return len(self.segments) == len(self.program)

    def freeze(self, names: Sequence[str]) -> None:
        """Let blocks not train, or all blocks of a role: no gradients, and in evaluation mode, buffers stay, too.

        Raises InputError for a name that is neither, for all blocks, and for a layer that a frozen block shares with
        one that trains.
        """
        blocks = list(dict.fromkeys(name for stage, _ in self.program for name in stage.blocks))
        roles = [role for role in self.layout.roles if role not in blocks]
        if odd := [name for name in names if name not in (*roles, *blocks)]:
            raise InputError(
                f"`freeze` (={odd[0]}) must name parties, {', '.join(roles)}, or blocks, {', '.join(blocks)}"
            )
        for stage, segment in self.program:
            segment.freeze(name for name in stage.blocks if stage.role in names or name in names)
        if names and not any(p.requires_grad for _, segment in self.program for p in segment.parameters()):
            raise InputError(f"`freeze` (={', '.join(names)}) leaves nothing to train: leave a party or a block out")
        self._check_shared()

    @property
    def frozen(self) -> list[str]:
        """The blocks that do not train, by their names in the uncut model."""
        segments = [segment for _, segment in self.program]
        return [label for segment in segments for name, label in segment.labels.items() if name in segment.frozen]

    def describe(self) -> str:
        """One line that two models of the same blocks share; a parameter that is tied counts in the first of them."""
        seen: set[int] = set()
        blocks = [block for _, segment in self.program for block in segment._modules.items()]
        return ", ".join(f"{name} of {sum(p.numel() for p in fresh(m.parameters(), seen))}" for name, m in blocks)

    @property
    def texts(self) -> dict[str, str]:
        """What is to be known of each block, in one line: its layers and their options."""
        blocks = {name: block for _, segment in self.program for name, block in segment.named_children()}
        return {name: " ".join(" ".join([repr(block), *_attributes(block)]).split()) for name, block in blocks.items()}

    def check_sizes(self, smallest: Mapping[Party, int]) -> None:
        """Raises InputError when the smallest mini-batch of a party is one row, and a block cannot train on one."""
        averse = [name for _, segment in self.program for name in segment.averse]
        for party, size in smallest.items():
            if size == 1 and averse:
                raise InputError(
                    f"block `{averse[0]}` cannot train on one row (batch norm of one value has no variance), and "
                    f"{party} has a mini-batch of one: change `data.batch_size`, the partition or the model"
                )

    def segments_of(self, role: Role) -> dict[str, Segment]:
        """Return the segments of a role, by stage; none where they live in another process."""
        return {stage.name: part for stage, part in self.program if stage.role == role and self.wire.hosts(role)}

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """Return the parameters of the role that are trained, each once; frozen ones are left out."""
        parameters = (p for segment in self.segments_of(role).values() for p in segment.parameters())
        return list(dict.fromkeys(p for p in parameters if p.requires_grad))

    def transparent(self) -> list[Stage]:
        """The stages that send on what they do not change by any weight, so that raw data cross as they are."""
        raw, found = set(self.layout.fields), []
        for stage, segment in self.program:
            if raw & set(stage.inputs) and next(segment.parameters(), None) is None:
                raw.add(stage.name)
                if any(stage.name in other.inputs and other.role != stage.role for other in self.layout.stages):
                    found.append(stage)
        return found

    def unsaved(self) -> dict[str, Tensor]:
        """The buffers that no `state_dict` has (`persistent=False`), by name, for checkpoints to have them."""
        kept = self.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.named_buffers(remove_duplicate=False) if name not in kept}

    def load_unsaved(self, buffers: Mapping[str, Tensor]) -> None:
        """Put these in their places, whatever shapes they have grown to."""
        for name, value in buffers.items():
            path, _, key = name.rpartition(".")
            setattr(self.get_submodule(path), key, value.to(self.get_buffer(name).device))

    def _run(self, batch: Batch, cast: Mapping[Role, Party]) -> tuple[Tensor, list[Hop]]:
        """The output of the last stage, and the tape of hops."""
        values = dict(batch.fields)
        self.wire.number = batch.number[:2]  # what crosses between processes says which mini-batch it is of
        tape: list[Hop] = []
        for stage, segment in self.program:
            inputs = [self._bring(values, name, stage.role, cast, tape) for name in stage.inputs]
            mine = self.wire.plays(cast[stage.role])
            values[stage.name] = segment(join(inputs), batch.number) if mine else self._outline(stage, batch)
        return values[stage.name], tape

    def _check_shared(self) -> None:
        """What a frozen block shares would be frozen in both, and be in evaluation mode in both."""
        places = [(segment, name) for _, segment in self.program for name in segment._modules]
        for (segment, still), (other, moving) in product(places, places):
            if still not in segment.frozen or moving in other.frozen:
                continue
            one, two = getattr(segment, still), getattr(other, moving)
            tied = {*map(memory_of, one.parameters())} & {*map(memory_of, two.parameters())}
            if tied or (moving in other.drawing and {*one.modules()} & {*two.modules()}):
                raise InputError(
                    f"`freeze` (={still}) shares a layer with {moving}, which trains: freeze both, or give each its own"
                )

    def _bring(
        self, values: dict[str, Tensor], name: str, role: Role, cast: Mapping[Role, Party], tape: list[Hop]
    ) -> Tensor:
        owner = self.owners.get(name, role)
        if owner == role:
            return values[name] if name in values else self.sample[name]  # another's, so that only its absence counts
        hop = self.cut(values[name], cast[owner], cast[role])
        tape.append(hop)
        return hop.received

    def _outline(self, stage: Stage, batch: Batch) -> Tensor:
        """What a stage in another process returns, as far as it is known here."""
        like = self.shapes[stage.name]
        return elsewhere((len(batch.ids), *like.shape[1:]), like.dtype)

    def _shape(self, sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give lazy layers their shapes; return every stage's output for the sample, zeros where it is not known."""
        values = dict(sample)
        to_meta(segment for stage, segment in self.program if not self.wire.hosts(stage.role))
        for stage, segment in self.program:
            inputs = join([values[name] for name in stage.inputs])
            values[stage.name] = segment.shape(inputs) if self.wire.hosts(stage.role) else segment.outline(inputs)
        return values


def _attributes(block: nn.Module) -> list[str]:
    """The plain values that layers of the user's own have, of which torch prints nothing."""
    return [
        f"{path}.{name}={value!r}"
        for path, part in block.named_modules()
        if not type(part).__module__.startswith("torch")
        for name, value in sorted(vars(part).items())
        if name not in ("training", *vars(nn.Module())) and isinstance(value, str | int | float | tuple)
    ]


def join(inputs: list[Tensor]) -> Tensor:
    """What a stage takes: one value, or several along dimension 1."""
    return inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)


def segment_of(stage: Stage, blocks: Mapping[str, nn.Module], uses: Counter[str], seed: int) -> Segment:
    """A block that several stages run (the bottoms of a vertical net) is a block of its own in each."""
    memo: dict[int, object] = {}  # what is tied within a bottom is tied within its copy
    mine = {name: copy.deepcopy(blocks[name], memo) if uses[name] > 1 else blocks[name] for name in stage.blocks}
    make_safe(mine.values())
    return Segment(mine, labels_of(stage, uses), seed)


def labels_of(stage: Stage, uses: Mapping[str, int]) -> dict[str, str]:
    """The names of a stage's blocks in the uncut model; of one that several stages run, `STAGE.BLOCK`."""
    return {name: f"{stage.name}.{name}" if uses[name] > 1 else name for name in stage.blocks}

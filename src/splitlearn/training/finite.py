"""Whether all is a finite number, and where the first that is not comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from splitlearn.errors import CURE, DivergedError, UnsentError
from splitlearn.layout import Party, Role
from splitlearn.ledger import is_alice
from splitlearn.network import Batch, SplitNetwork, join, micro


def is_finite(tensor: Tensor) -> bool:
    """Whether all of it is finite. Ten times as fast as `torch.isfinite(tensor).all()`; on a GPU it waits."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))  # a NaN is both


def check_finite(module: nn.Module, num_steps: int) -> None:
    """Raises DivergedError where weights are not numbers."""
    if not all(map(is_finite, module.parameters())):
        raise DivergedError(f"weights are not finite after {num_steps} mini-batches: {CURE}")


@torch.no_grad()
def cause(network: SplitNetwork, batch: Batch, alice: Party, num_parts: int = 1) -> str:
    """What was the first that is not finite in Alice's mini-batch of `num_parts` micro-batches, and the cure.

    It is a value of a row, a weight, or what a block makes of both; with one process per party each looks at its own.
    The mini-batch runs once more, so that buffers change: the run must end here.
    """
    cast, parts = network.layout.cast(alice), micro(batch, num_parts)
    for name, field in batch.fields.items():
        if not is_finite(field):
            row, place, value = _first(field, batch)
            return f"`{name}` of row {row} of the data is {value} itself, at {place}: mend it, or leave the row out"
    for stage, segment in network.program:
        for name, weight in segment.named_parameters() if network.wire.hosts(stage.role) else ():
            if not is_finite(weight):
                return f"the rows are finite, the weight `{name}` of {cast[stage.role]} is not: {CURE}"
    return next(filter(None, (_of_blocks(network, part, cast) for part in parts)), _of_loss(network))


@contextmanager
def explained(network: SplitNetwork, batch: Batch, alice: Party, num_parts: int = 1) -> Iterator[None]:
    """Raises DivergedError with the cause in place of UnsentError."""
    try:
        yield
    except UnsentError as error:
        alice = error.party if is_alice(error.party) else alice
        raise DivergedError(f"{error}: {cause(network, batch, alice, num_parts)}") from None


def _of_blocks(network: SplitNetwork, batch: Batch, cast: Mapping[Role, Party]) -> str | None:
    """The first block that makes what is not finite, of those whose inputs are at hand."""
    values = dict(batch.fields)
    for stage, segment in network.program:
        party = cast[stage.role]
        if not network.wire.plays(party) or not values.keys() >= set(stage.inputs):
            continue
        values[stage.name] = inputs = join([values[name] for name in stage.inputs])
        for name, out in segment.steps(inputs, batch.number):
            if not is_finite(out):
                row, place, value = _first(out, batch)
                return (
                    f"rows and weights are finite, block `{name}` of {party} makes {value} of row {row} of the data, "
                    f"at {place}: {CURE}"
                )
            values[stage.name] = out
    return None


def _of_loss(network: SplitNetwork) -> str:
    if network.complete:
        return f"rows, weights and the network's output are finite, their loss is not: {CURE}, or look at `loss`"
    return f"what others sent is finite, so it arose here, behind it: {CURE}"


def _first(values: Tensor, batch: Batch) -> tuple[int, list[int], float]:
    """Row, place in it, and value of the first that is not finite of `values` [B, ...]."""
    index = (~torch.isfinite(values)).nonzero()[0].tolist()
    return int(batch.ids[index[0]]), index[1:], values[tuple(index)].item()

"""The blocks of a model, between any two of which a network may be cut: what they must be, and what they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from splitlearn.layout import Stage


def check_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's blocks by name, also one that stands twice. Raises ValueError for a model that is more."""
    blocks = dict(model._modules) if isinstance(model, nn.Sequential) else {}
    if not blocks or None in blocks.values():
        raise ValueError(
            f"`model` (={type(model).__name__}) must be an nn.Sequential of at least one block: "
            "the cut falls between blocks; return nn.Sequential(OrderedDict(name=block, ...))"
        )
    if type(model).forward is not nn.Sequential.forward or model._forward_hooks or model._forward_pre_hooks:
        raise ValueError(
            f"`model` (={type(model).__name__}) has a forward or hooks of its own, and its parties run its blocks "
            "alone, one behind the other: put what it does into a block"
        )
    return blocks


def check_ties(blocks: Mapping[str, nn.Module], stages: Sequence[Stage]) -> None:
    """Raises ValueError where two parties would hold one tensor: each would go on with a weight of its own.

    A block that several stages run is copied for each, with all that is tied inside its stage.
    """
    first: dict[int, tuple[str, list[str], str]] = {}
    for block in dict.fromkeys(chain.from_iterable(stage.blocks for stage in stages)):
        running = [stage for stage in stages if block in stage.blocks]
        roles = list(dict.fromkeys(stage.role for stage in running))
        holders = [stage.name for stage in running] if len(running) > 1 else [str(role) for role in roles]
        for name, tensor in chain(blocks[block].named_parameters(block), blocks[block].named_buffers(block)):
            other, theirs, owners = first.setdefault(memory_of(tensor), (name, holders, " and ".join(roles)))
            if theirs != holders:
                raise ValueError(
                    f"`{other}` of {owners} and `{name}` of {' and '.join(roles)} are one tensor (tied weights), which "
                    "two parties cannot train: untie them, or take a layout and a cut that give both to one party"
                )


def memory_of(tensor: Tensor) -> int:
    """The same number for one tensor, and for two that begin at one place: `nn.Parameter(a.weight)` is tied, too."""
    placed = tensor.layout == torch.strided and not is_lazy(tensor) and tensor.data_ptr()
    return placed or id(tensor)


def fresh(tensors: Iterable[Tensor], seen: set[int]) -> list[Tensor]:
    """Return those whose memory is not yet in `seen`, to which it is added: what is tied counts once."""
    new = {memory_of(tensor): tensor for tensor in tensors if memory_of(tensor) not in seen}
    seen.update(new)
    return list(new.values())


def make_safe(blocks: Iterable[nn.Module]) -> None:
    """An in-place layer right behind a cut would write into a leaf of the graph; out of place, the values are equal."""
    for block in blocks:
        for module in block.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]

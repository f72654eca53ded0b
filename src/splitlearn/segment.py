"""A named slice of the model, which one party runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from splitlearn.seeds import derive, seed_draws

MISFITS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError)  # what a block raises at a wrong input


class Segment(nn.Sequential):
    """A named slice of the model. What a block draws (dropout) depends on (seed, block, mini-batch) alone.

    So the draw is the same wherever the network is cut, in every engine and in a resumed run.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], labels: Mapping[str, str], seed: int) -> None:
        super().__init__()
        self.labels = dict(labels)
        self.seed = seed
        self.drawing: frozenset[str] = frozenset()
        self.averse: frozenset[str] = frozenset()
        """The blocks that cannot train on a single row: batch norm of one value has no variance."""
        self.frozen: frozenset[str] = frozenset()
        for name, block in blocks.items():
            if hasattr(self, name):
                raise ValueError(f"block `{name}` has a name that every segment uses itself: give it another one")
            self.add_module(name, block)

    def forward(self, x: Tensor, number: tuple[int, ...] = (0, 0)) -> Tensor:
        if not (self.drawing and self.training):
            return super().forward(x)
        out = x
        for _, out in self.steps(x, number):  # noqa: B007
            pass
        return out

    def steps(self, x: Tensor, number: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
        """Run block by block: yield the name of each and its output."""
        for name, block in self._modules.items():  # `named_children` leaves out what stands twice
            if self.training and name in self.drawing:
                seed_draws(derive(self.seed, "draw", self.labels[name], *number), x.device)
            x = block(x)
            yield name, x

    def shape(self, x: Tensor) -> Tensor:
        """Give lazy layers their shapes and draw their weights, a block at a time; return the output for `x`.

        Raises ValueError when a block does not fit the output of the one before it, writes into its input, computes in
        complex numbers, or keeps what no checkpoint has.
        """
        drawing, averse = set(), set()
        for i, (name, block) in enumerate(self._modules.items()):
            torch.manual_seed(derive(self.seed, "weights", self.labels[name]))
            out = _run(name, block, x)
            try:
                leaf = x.detach().requires_grad_(i == 0 and x.is_floating_point())  # as it is right behind a cut
                once, again, draws = run_twice(copy.deepcopy(block).train(), leaf)
                if draws:
                    drawing.add(name)
                if not _trains_on(copy.deepcopy(block), x[:1]):
                    averse.add(name)
            except MISFITS as error:
                raise ValueError(_misfit(name, x, error)) from error
            if not are_same(once, again):
                raise ValueError(
                    f"block `{name}` makes different things of one input: it keeps state in an attribute, which no "
                    "checkpoint has and no Alice hands on (make it a buffer, by register_buffer), or draws by numpy or "
                    "Python's random (draw by torch)"
                )
            x = out
        self.drawing, self.averse = frozenset(drawing), frozenset(averse)
        return x

    def freeze(self, names: Iterable[str]) -> None:
        """Let these blocks stay as they are, buffers too: no gradients, and in evaluation mode from now on."""
        self.frozen |= {*names}
        for part in self.still():
            part.requires_grad_(False)
        self.drawing, self.averse = self.drawing - self.frozen, self.averse - self.frozen
        self.train(self.training)

    def still(self) -> Iterator[nn.Module]:
        """All modules of frozen blocks."""
        for name in self.frozen:
            yield from getattr(self, name).modules()

    def train(self, mode: bool = True) -> Segment:
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def outline(self, x: Tensor) -> Tensor:
        """Return zeros for the output of a segment that lives in another process, and is on meta here."""
        out = x.to("meta")
        for name, block in self._modules.items():
            out = _run(name, block, out)
        return torch.zeros_like(out, device=x.device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to each part's own: a batch norm that was put into evaluation mode stays there."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def to_meta(segments: Iterable[nn.Module]) -> None:
    """Let go of weights that live in another process: `to("meta")`, also of a lazy layer, and what is tied stays so."""
    known: dict[Tensor, Tensor] = {}
    for part in nn.ModuleList(segments).modules():
        for kept in (part._parameters, part._buffers):
            for name, value in kept.items():
                if value is not None:
                    kept[name] = known.setdefault(value, _on_meta(value))  # type: ignore[assignment]


def _on_meta(value: Tensor) -> Tensor:
    if isinstance(value, nn.Parameter):
        if is_lazy(value):
            return UninitializedParameter(value.requires_grad, device="meta")
        return nn.Parameter(value.detach().to("meta"), value.requires_grad)
    return UninitializedBuffer(device="meta") if is_lazy(value) else value.to("meta")  # type: ignore[call-arg]


def _run(name: str, block: nn.Module, x: Tensor) -> Tensor:
    """The block's output in evaluation mode. Raises ValueError for one that does not fit, or that is complex."""
    try:
        with torch.no_grad(), evaluating(block):
            out = block(x)
    except MISFITS as error:
        raise ValueError(_misfit(name, x, error)) from error
    if not isinstance(out, Tensor):
        raise ValueError(f"block `{name}` returns a {type(out).__name__}: every block must return one tensor")
    if any(value.is_complex() for value in (out, *block.parameters(), *block.buffers())):
        raise ValueError(f"block `{name}` computes complex numbers, which do not cross: take torch.view_as_real")
    return out


def run_twice(module: nn.Module, *inputs: Tensor) -> tuple[Any, Any, bool]:
    """Run `module`, a copy that nobody else has, twice with the same inputs, weights, buffers and draws of torch.

    Return what it makes of them once and again, and whether it draws random numbers.
    """
    before = torch.get_rng_state()
    buffers = [copy.deepcopy(part._buffers) for part in module.modules()]
    once = module(*map(_unshared, inputs))
    draws = not torch.equal(before, torch.get_rng_state())
    for part, kept in zip(module.modules(), buffers, strict=True):
        part._buffers.update(kept)
    torch.set_rng_state(before)
    return once, module(*map(_unshared, inputs)), draws


def are_same(once: Tensor, again: Tensor) -> bool:
    """Whether two results are the same to the bit; of shapes alone nothing is known."""
    return once.is_meta or torch.equal(once.nan_to_num(), again.nan_to_num())


def _unshared(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.clone()  # which the module may write into


@torch.no_grad()
def _trains_on(block: nn.Module, x: Tensor) -> bool:
    try:
        block.train()(x)
    except ValueError:
        return False
    return True


def _misfit(name: str, x: Tensor, error: Exception) -> str:
    shape = "x".join(str(size) for size in x.shape[1:])
    if "in-place operation" in str(error):
        return f"block `{name}` writes into its input in place, which fails right behind a cut: make it out of place"
    return (
        f"block `{name}` does not fit its input of shape {shape} ({str(x.dtype).removeprefix('torch.')}) per sample: "
        f"change the model or the data ({error})"
    )

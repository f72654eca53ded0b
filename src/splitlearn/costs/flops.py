"""What a network costs in arithmetic: FLOPs, forward and backward, by party."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from splitlearn.layout import Party
from splitlearn.ledger import Ledger, is_alice, merged
from splitlearn.network import SplitNetwork, join


class Cost(NamedTuple):
    """FLOPs, two per multiply-add."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.total // 2


def cost_of(segment: nn.Module, inputs: Sequence[Tensor], wants_input_gradient: bool) -> Cost:
    """What one training pass of `segment(*inputs)` costs, backward with or without a gradient for the inputs.

    Of the inputs only the shapes count, and whether they are floating, on any device: a copy of the segment runs on
    meta tensors. Counted are products of matrices, convolutions and attention, as torch's FlopCounterMode counts them
    (padding included), and in the way back only what autograd computes: a frozen segment that nothing in front of needs
    a gradient from costs nothing. Products of a matrix and a vector, elementwise operations, normalisation, pooling,
    biases and the loss count nothing.
    """
    return _measure(segment, inputs, wants_input_gradient)[0]


class Meter:
    """The FLOPs of training so far, by party.

    The ledger knows how many passes each Alice's turns made of how many rows. What one costs is measured when somebody
    asks, once for every number of rows, with those parameters frozen that are frozen then.
    """

    def __init__(self, network: SplitNetwork, ledger: Ledger) -> None:
        self.network, self.ledger = network, ledger
        self.known: dict[int, dict[str, Cost]] = {}

    def by_party(self, merge: bool = False) -> dict[Party, Cost]:
        """Every party that has computed, and what, with all Alices as `alice*` to `merge`. Evaluation is not in it."""
        layout, costs, passes = self.network.layout, dict[Party, list[Cost]](), Counter[tuple[Party, int]]()
        for (taker, num_rows), num_passes in self.ledger.passes.items():
            passes[merged(taker) if merge else taker, num_rows] += num_passes
        for (taker, num_rows), num_passes in passes.items():
            of_pass, cast = self.of_pass(num_rows), layout.cast(taker)
            for stage in layout.stages:
                forward, backward = of_pass[stage.name]
                party = merged(cast[stage.role]) if merge else cast[stage.role]
                costs.setdefault(party, []).append(Cost(num_passes * forward, num_passes * backward))
        return {party: add_up(each) for party, each in costs.items()}

    def of_pass(self, num_rows: int) -> dict[str, Cost]:
        """What one pass of `num_rows` rows costs, by stage."""
        if num_rows not in self.known:
            self.known[num_rows] = self._walk(num_rows)
        return self.known[num_rows]

    def _walk(self, num_rows: int) -> dict[str, Cost]:
        sample = self.network.sample
        values = {name: field.new_empty(num_rows, *field.shape[1:]) for name, field in sample.items()}
        costs = {}
        for stage, segment in self.network.program:
            inputs = [values[name] for name in stage.inputs]
            wants = any(value.requires_grad for value in inputs)
            # The blocks without the segment, which seeds their draws: there is no generator for meta tensors.
            still = {*segment.still()}
            costs[stage.name], values[stage.name] = _measure(nn.Sequential(*segment), [join(inputs)], wants, still)
        return costs


def add_up(costs: Iterable[Cost]) -> Cost:
    """The sum, which `+` is not: costs are tuples."""
    forward, backward = zip(*costs, strict=True)
    return Cost(sum(forward), sum(backward))


def clients(flops: Mapping[Party, Cost]) -> list[int]:
    """The FLOPs of every Alice, forward and backward."""
    return [cost.total for party, cost in flops.items() if is_alice(party)]


def _measure(
    segment: nn.Module, inputs: Sequence[Tensor], wants_input_gradient: bool, still: Collection[nn.Module] = ()
) -> tuple[Cost, Tensor]:
    """The cost, and the output as a meta tensor that says whether it has a gradient to give.

    What is `still` is in evaluation mode when the segment is trained.
    """
    try:
        return _run(segment, inputs, wants_input_gradient, still, "meta")
    except Exception:  # a user's block may look at values, which meta tensors have not
        return _run(segment, inputs, wants_input_gradient, still, "cpu")


def _run(
    segment: nn.Module, inputs: Sequence[Tensor], wants: bool, still: Collection[nn.Module], device: str
) -> tuple[Cost, Tensor]:
    # Asked for in the middle of an evaluation too, which must find its random state as it was.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        twin = _twin(segment, still, device)
        zeros = [_zeros(x, device).requires_grad_(wants and x.is_floating_point()) for x in inputs]
        formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            output = twin(*zeros)
            forward = counter.get_total_flops()
            if output.requires_grad:
                output.backward(torch.ones_like(output))
        cost = Cost(forward, counter.get_total_flops() - forward)
        return cost, torch.empty_like(output, device="meta", requires_grad=output.requires_grad)


def _twin(segment: nn.Module, still: Collection[nn.Module], device: str) -> nn.Module:
    """A copy in training mode that holds zeros, made without a copy of the weights, and that no forward hook hears."""
    instead: dict[int, Tensor] = {id(t): _zeros(t, device) for t in segment.buffers()}
    instead |= {id(p): nn.Parameter(_zeros(p, device), p.requires_grad) for p in segment.parameters()}
    for module in segment.modules():  # a block may have kept an activation, which cannot be copied
        kept = [value for value in vars(module).values() if isinstance(value, Tensor)]
        instead |= {id(value): _zeros(value, device) for value in kept if id(value) not in instead}
    twin = copy.deepcopy(segment, instead).train()
    for module, its_twin in zip(segment.modules(), twin.modules(), strict=True):
        if module in still:
            its_twin.training = False
    for module in twin.modules():
        module._forward_hooks.clear()
    return twin


def _zeros(like: Tensor, device: str) -> Tensor:
    """Always float32 where floating: FLOPs do not depend on it, and rows may yet be converted to a run's precision."""
    dtype = torch.float32 if like.is_floating_point() else like.dtype
    return torch.zeros(like.shape, dtype=dtype, device=device)


def _convolution_backward(grad, x, weight, _b, _s, _p, _d, transposed, _o, _g, mask, **_) -> int:  # type: ignore[no-untyped-def]
    """Either gradient takes the multiply-adds of the forward pass. torch's own formula forgets the groups."""
    return sum(mask[:2]) * conv_flop_count(x, weight, grad, transposed)

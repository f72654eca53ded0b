"""The weighted mean of what parties send one after the other, without keeping what each has sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STEP = "/step"  # ends the name of an optimizer's step count, which torch keeps as a float


class WeightedMean:
    """The mean of tensors by name, each sender's with a weight: one running sum, however many senders.

    Sums are float64, which holds the product of a float32 and a number of samples exactly, so that in float32 nothing
    is left of the order of arrival unless what arrives all but cancels out. Counters (whole numbers, and an optimizer's
    step count) are not averaged: the largest stays. Who sends nothing by a name has sent zeros, unless nobody has: what
    nobody has sent since the last mean has none.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.zeros: dict[str, Tensor] = {}  # for the next sums: to make them anew each time costs more than to add
        self.dtypes: dict[str, torch.dtype] = {}  # of what was added
        self.total = 0.0

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        for name, tensor in tensors.items():
            if _counts(name, tensor):
                self.dtypes[name] = tensor.dtype
                largest = self.sums.get(name, tensor).to(tensor.device)
                self.sums[name] = torch.maximum(largest, tensor)
            else:
                self._sum_of(name, tensor).add_(tensor, alpha=weight)
        self.total += weight

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the mean of what was added into tensors of the same names, in their dtypes, and begin anew."""
        for name, tensor in tensors.items():
            tensor.copy_(self.sums[name] if _counts(name, tensor) else self.sums[name].div_(self.total))
        self.zeros |= {name: sum_.zero_() for name, sum_ in self.sums.items() if not _counts(name, sum_)}
        self.sums, self.total = {}, 0.0

    def take(self) -> dict[str, Tensor]:
        """Return the mean of what was added, in the dtypes it had, and begin anew."""
        means = {name: torch.empty_like(sum_, dtype=self.dtypes[name]) for name, sum_ in self.sums.items()}
        self.write(means)
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums if self.total else {}, "dtypes": self.dtypes, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.dtypes, self.total = state["sums"], state["dtypes"], state["total"]

    def _sum_of(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self.sums:
            wide = tensor.dtype if tensor.device.type == "mps" else torch.float64  # which MPS does not have
            made = self.zeros.pop(name, None)
            self.sums[name] = torch.zeros_like(tensor, dtype=wide) if made is None else made
            self.dtypes[name] = tensor.dtype
        if self.sums[name].device != tensor.device:  # as a checkpoint has it
            self.sums[name] = self.sums[name].to(tensor.device)
        return self.sums[name]


def _counts(name: str, tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or name.endswith(STEP)

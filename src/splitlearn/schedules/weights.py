"""The one copy of what a role trains: its weights and its optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from splitlearn.layout import Party, Role
from splitlearn.segment import Segment
from splitlearn.wire import Wire


class RoleWeights:
    """The weights (buffers included) and the optimizer of a role; whoever has the turn trains them.

    Blocks that a network has frozen are not among them: everybody has them as they are.

    Arguments:
        role: whose they are. An Alice's cross the wire; any other role is played by one party, who keeps all its
            copies at home.
        segments: the role's, by stage; wire: what weights and optimizer state cross.
        optimizer: None where the role has nothing to train.
    """

    def __init__(
        self, role: Role, segments: Mapping[str, nn.Module], wire: Wire, optimizer: Optimizer | None = None
    ) -> None:
        self.role, self.segments, self.wire, self.optimizer = role, segments, wire, optimizer
        self.find()

    def find(self) -> None:
        """Look the weights up again, by whole names: what is tied, also across two stages, is one."""
        role = nn.ModuleDict(self.segments)
        still = {part for each in self.segments.values() if isinstance(each, Segment) for part in each.still()}
        moving = [(path, part) for path, part in role.named_modules() if part not in still]
        held_still = {id(parameter) for part in still for parameter in part._parameters.values()}
        known = dict(role.named_parameters())
        self.parameters: dict[str, Tensor] = {name: p for name, p in known.items() if id(p) not in held_still}
        self.thawed = [name for name, p in known.items() if id(p) in held_still and p.requires_grad]
        self.places = {f"{path}.{key}": (part._buffers, key) for path, part in moving for key in part._buffers}
        self.trained = self.wanting

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Those that no `state_dict` has, too, as they are now: a block may make new ones in a forward pass."""
        found = {name: kept[key] for name, (kept, key) in self.places.items()}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}

    @property
    def wanting(self) -> dict[str, Tensor]:
        """Those parameters that want a gradient at this moment."""
        return {name: value for name, value in self.parameters.items() if value.requires_grad}

    @property
    def unheld(self) -> dict[str, Tensor]:
        """Those parameters that want a gradient and are not the optimizer's, so that no step would change them."""
        held = {id(parameter) for parameter in self._parameters()}
        return {name: value for name, value in self.wanting.items() if id(value) not in held}

    @property
    def gradients(self) -> dict[str, Tensor]:
        return {name: value.grad for name, value in self.trained.items() if value.grad is not None}

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the optimizer's state: `{"0/exp_avg": ...}`, by the number of the parameter."""
        return {
            f"{i}/{key}": value
            for i, state in self.own_state().items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def at(self, party: Party) -> bool:
        """Whether this copy is the one of `party`. In the simulator, which has but one, it is everybody's."""
        return self.role != "alice" or self.wire.plays(party)

    def carry(self, tensors: Mapping[str, Tensor], src: Party, dst: Party, kind: str) -> Mapping[str, Tensor]:
        """Return what `dst` receives, by name; nothing where it lives in another process.

        What a role other than alice has stays with the one party who plays it.
        """
        if self.role != "alice":
            return tensors
        if kind == "weights":  # both ends have the same ones
            return self.wire.carry_all(tensors, src, dst, kind) if tensors else {}
        return self.wire.carry_all(tensors if self.at(src) else self._shapes(kind), src, dst, kind)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        write(self.tensors, tensors)

    def load_gradients(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these the gradients of the weights of their names."""
        for name, tensor in tensors.items():
            self.trained[name].grad = tensor.to(self.trained[name].device)  # from a checkpoint it comes on the CPU

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy these tensors into the optimizer's state, as `state` names them."""
        own = self.own_state()
        for name, tensor in tensors.items():
            i, key = name.split("/")
            there = own.setdefault(int(i), {})
            if key in there:
                there[key].copy_(tensor)
            else:
                there[key] = tensor.clone()
        self.set_state(own)

    def own_state(self) -> dict[int, dict[str, Any]]:
        """The optimizer's state by the number of the parameter, not a copy."""
        if self.optimizer is None:
            return {}
        state = self.optimizer.state
        return {i: state[p] for i, p in enumerate(self._parameters()) if p in state}

    def set_state(self, own: Mapping[int, dict[str, Any]]) -> None:
        if self.optimizer is None:
            return
        parameters, on_device = self._parameters(), _counts_on_device(self.optimizer)
        self.optimizer.state.clear()
        for i, state in own.items():
            # From a checkpoint it comes on the CPU.
            self.optimizer.state[parameters[i]] = {
                key: value.to(parameters[i].device)
                if isinstance(value, Tensor) and (key != "step" or on_device)
                else value
                for key, value in state.items()
            }

    def _parameters(self) -> Sequence[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]] if self.optimizer else []

    def _shapes(self, kind: str) -> Mapping[str, Tensor]:
        """What to expect of somebody else: `0/exp_avg` has the shape of parameter `0`, or is a number."""
        if kind == "optimizer_state":
            return {str(i): parameter for i, parameter in enumerate(self._parameters())}
        return self.trained


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def write(tensors: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
    """Copy what was received over the tensors of these names, where it is not the same memory anyway."""
    for name, tensor in received.items():
        if tensor.data_ptr() != tensors[name].data_ptr():
            tensors[name].copy_(tensor)


def _counts_on_device(optimizer: Optimizer) -> bool:
    """Whether torch keeps the count of steps beside the parameters; on the CPU, otherwise."""
    return bool(optimizer.defaults.get("capturable") or optimizer.defaults.get("fused"))

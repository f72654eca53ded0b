"""A small net and few rows to train splitlearn on, and the plain torch that it must equal."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from splitlearn.data import Source, SplitData
from splitlearn.layout import Layout
from splitlearn.learner import SplitLearner
from splitlearn.network import Batch, SplitNetwork
from splitlearn.schedules.schedule import Schedule, Step
from splitlearn.schedules.sharing import Handoff
from splitlearn.seeds import derive
from splitlearn.wire import Message, Wire

SEED = 3
BLOCKS = ("block1", "block2", "block3", "head")
DRAWING = ("block1", "block3")  # the blocks of `net` with a Dropout
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM = partial(torch.optim.Adam, lr=0.01, weight_decay=0.01)


def cases(named: Mapping[str, Sequence], slow: Iterable[str]) -> list:
    """Arguments of a test by the name of the case, some of them for `pytest -m slow` alone."""
    odd = {*slow} - {*named}
    assert not odd, odd
    return [pytest.param(*args, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, args in named.items()]


def net() -> nn.Sequential:
    """Rows [N, 1, 4, 6] in; behind the blocks 2x4x6, 10, 7 and 3 elements a row."""
    torch.manual_seed(1)
    blocks = {
        "block1": nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.2)),
        "block2": nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.ReLU()),
        "block3": nn.Sequential(nn.Linear(10, 7), nn.BatchNorm1d(7), nn.Dropout(0.5)),
        "head": nn.Linear(7, 3),
    }
    return nn.Sequential(OrderedDict(blocks))


def smooth() -> nn.Sequential:
    """The same shapes, without what depends on the mini-batch: batch norm and dropout."""
    torch.manual_seed(1)
    blocks = {
        "block1": nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh()),
        "block2": nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.Tanh()),
        "block3": nn.Linear(10, 7),
        "head": nn.Linear(7, 3),
    }
    return nn.Sequential(OrderedDict(blocks))


class Routed(nn.Module):
    """Sends few rows through a layer, which in most mini-batches has no gradient, as an expert of a mixture."""

    def __init__(self, width: int, above: float) -> None:
        super().__init__()
        self.layer, self.above = nn.Linear(width, width), above

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, :1] > self.above
        if self.training and not chosen.any():
            return x
        return torch.where(chosen, x + self.layer(x), x)


def routed() -> nn.Sequential:
    """`smooth` with a layer in `block2` and one in `head` that few rows come through."""
    model = smooth()
    model.block2.insert(1, Routed(48, 0.6))
    model.head = nn.Sequential(Routed(7, 0.5), model.head)
    return model


def dealt(*sizes: int) -> Callable[..., list[Tensor]]:
    """A partition into shards of these sizes."""
    return lambda labels, num_shards, seed: list(torch.arange(len(labels)).split(sizes))


def make_rows(num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_rows, 1, 4, 6, generator=generator)
    return x, torch.randint(3, (num_rows,), generator=generator)


class Losses(nn.CrossEntropyLoss):
    """Keeps the training losses, one a mini-batch."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.seen: list[Tensor] = []
        self.register_forward_hook(_keep)


def _keep(losses: nn.Module, inputs: tuple, loss: Tensor) -> None:
    if losses.training:
        losses.seen.append(loss.detach())


class Thaw(BaseFinetuning):
    """Lightning's own way to train Alice's convolution from the second epoch on."""

    def freeze_before_training(self, learner: pl.LightningModule) -> None:
        self.freeze(self.convolution(learner))

    def finetune_function(self, learner: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1 and optimizer is learner.stepper.optimizers.get("alice"):
            self.unfreeze_and_add_param_group(self.convolution(learner), optimizer, initial_denom_lr=1)

    def convolution(self, learner: pl.LightningModule) -> list[nn.Module]:
        """None in a process that has no bottom."""
        return [part for name, part in learner.network.named_modules() if name.endswith("block1.0")]


class Recorder:
    """A tap that keeps every message."""

    def __init__(self, party: str) -> None:
        self.party = party
        self.messages: list[Message] = []

    def hear(self, message: Message) -> None:
        self.messages.append(message)


class Run(NamedTuple):
    """What `train` leaves: the trained learner, its data, the loss of each mini-batch, the steps of each epoch."""

    learner: SplitLearner
    data: SplitData
    trainer: pl.Trainer
    losses: list[Tensor]
    steps: list[list[Step]]

    @property
    def weights(self) -> dict[str, Tensor]:
        return weights_of(self.learner.network)


def train(
    layout: Layout,
    model: nn.Sequential | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    num_alices: int = 1,
    batch_size: int = 4,
    make: Callable = SGD,
    optimizer_state: str = "carry",
    taps: Sequence = (),
    val_fraction: float = 0.0,
    epochs: int = 2,
    schedule: Mapping[str, object] = MappingProxyType({}),
    data: Mapping[str, object] = MappingProxyType({}),
    trainer: Mapping[str, object] = MappingProxyType({}),
    loss: Mapping[str, object] = MappingProxyType({}),
    **learner: object,
) -> Run:
    """Train `net` for two epochs on 19 rows: ten steps, two of them short. Alices hand on, or as `schedule` says."""
    x, y = make_rows(19) if rows is None else rows
    source = Source(TensorDataset(x, y), TensorDataset(x[:5], y[:5]), 3)
    sizes = {"batch_size": batch_size, "eval_batch_size": 3, "val_fraction": val_fraction}
    data = SplitData(source, layout, num_alices, seed=SEED, **sizes, **data)
    wire, losses = Wire(), Losses(**loss)
    network = SplitNetwork(net() if model is None else model, layout, data, wire, SEED)
    wire.taps = list(taps)
    arranged = Schedule(data.takers, **{"alice": Handoff(optimizer_state), "seed": SEED, **schedule})
    trained = SplitLearner(network, arranged, make, losses, 3, **learner)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"), False
    )
    lightning = pl.Trainer(**{**quiet, "accelerator": "cpu", "max_epochs": epochs, **trainer})
    lightning.fit(trained, datamodule=data)
    steps = [lightning.train_dataloader.steps(epoch) for epoch in range(epochs)]
    return Run(trained, data, lightning, losses.seen, steps)


def run_blocks(blocks: Iterable[tuple[str, nn.Module]], x: Tensor, number: tuple[int, int]) -> Tensor:
    """Plain torch, with the one thing that splitlearn defines: what a block draws in mini-batch `number`."""
    for name, block in blocks:
        if name.rpartition(".")[2] in DRAWING:
            torch.manual_seed(derive(SEED, "draw", name, *number))
        x = block(x)
    return x


def plainly(
    model: nn.Module, optimizers_of: Callable[[str], Sequence], run: Run, rows: tuple[Tensor, Tensor] | None = None
) -> list[Tensor]:
    """A plain loop over the mini-batches of `run`, in their order. Return their losses.

    `model` takes (x, number); `optimizers_of(taker)` are those that step in the turn of `taker`.
    """
    x, y = make_rows(19) if rows is None else rows
    losses = []
    model.train()
    for epoch, steps in enumerate(run.steps):
        for place, step in enumerate(steps):
            ((taker, ids),) = step.batches.items()
            optimizers = optimizers_of(taker)
            loss = nn.functional.cross_entropy(model(x[ids], (epoch, place)), y[ids])
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.detach())
    return losses


class Unsplit(nn.Module):
    """The whole model in one graph."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, number: tuple[int, int]) -> Tensor:
        return run_blocks(self.model._modules.items(), x, number)


def make_network(layout: Layout, model: nn.Sequential | None = None, seed: int = SEED) -> SplitNetwork:
    x, y = make_rows(2)
    return SplitNetwork(net() if model is None else model, layout, {"x": x, "y": y}, seed=seed)


def make_batch(num_rows: int = 5, number: tuple[int, int] = (0, 0)) -> Batch:
    x, y = make_rows(num_rows)
    return Batch(torch.arange(num_rows), {"x": x, "y": y}, number)


def weights_of(network: SplitNetwork) -> dict[str, Tensor]:
    """Weights and buffers by block, whatever segment it is in: `block1.0.weight`."""
    return {name.split(".", 2)[2]: value for name, value in network.state_dict().items()}


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """The names whose tensors are not equal to the bit."""
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]

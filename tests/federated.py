"""Small runs of the whole program from a configuration, in the simulator and with one process per party."""

import json
import os
import signal
import socket
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from commands import Command
from helpers import make_rows, net, routed, smooth
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import TensorDataset

from splitlearn.data import Source
from splitlearn.federation.wiring import GlooWiring, NcclWiring
from splitlearn.train import train

TINY = (
    *("model=custom", "model._target_=federated.tiny", "optimizer=adam", "optimizer.lr=0.01"),
    *("data=digits", "data.source._target_=federated.source"),
    *("data.batch_size=4", "data.val_fraction=0.16", "data.eval_batch_size=7", "trainer.max_epochs=2"),
    *("logger=none", "layout.cut=2", "seed=1"),
)


# What a greeting must have besides what is compared.
TOLD = {
    **{"run": None, "snapshots": {}, "common": [], "nonce": "", "threads": 1, "certificate": None, "gpu": None},
    **{"alike": {}, "file": None, "initial": None},
}


def tiny(num_classes: int) -> nn.Sequential:
    """With batch norm in two and four dimensions, and dropout on both sides of a cut behind two blocks."""
    return net()


def plain(num_classes: int) -> nn.Sequential:
    """Without what depends on the mini-batch."""
    return smooth()


def experts(num_classes: int) -> nn.Sequential:
    """With layers that few rows come through."""
    return routed()


class Drifting(nn.Module):
    """Scales by a buffer that training changes, or makes `anew`, and that no `state_dict` has unless `persistent`."""

    def __init__(self, anew: bool = False, persistent: bool = False) -> None:
        super().__init__()
        self.anew = anew
        self.register_buffer("scale", torch.ones(()), persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.anew:
            self.scale = self.scale + 0.01
        elif self.training:
            self.scale += 0.01
        return self.scale * x


def tied(num_classes: int, **drifting: bool) -> nn.Sequential:
    """Behind the first two blocks, and behind the next four, a cut leaves what is tied with one party."""
    torch.manual_seed(1)
    act, drop, linear = nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 9)
    first = nn.Sequential(nn.Flatten(), nn.Linear(24, 9), act, linear, act, drop, linear, Drifting(**drifting))
    blocks = {"block1": first, "block2": linear, "act": act, "drop": drop, "again": drop, "act2": act}
    return nn.Sequential(OrderedDict(**blocks, head=nn.Linear(9, num_classes)))


def tied_ends(num_classes: int) -> nn.Sequential:
    """One layer in the head and in the tail of a U, and buffers that are made anew on both sides."""
    torch.manual_seed(1)
    linear = nn.Linear(9, 9)
    first = nn.Sequential(nn.Flatten(), nn.Linear(24, 9), linear, Drifting(anew=True))
    blocks = {"block1": first, "block2": nn.Sequential(nn.Linear(9, 9), Drifting(anew=True)), "block3": linear}
    return nn.Sequential(OrderedDict(**blocks, head=nn.Linear(9, num_classes)))


def source() -> Source:
    x, y = make_rows(57)
    return Source(TensorDataset(x[:50], y[:50]), TensorDataset(x[50:], y[50:]), 3)


def run_tiny(configure: Callable, folder: Path, *overrides: str) -> dict:
    """Train as asked; return results.json without what is measured in seconds, and without what processes add."""
    layouts = any(override.startswith("layout=") for override in overrides)
    common = [part for part in TINY if not (layouts and part.startswith("layout.cut"))]
    train(configure(*common, f"output_dir={folder}", *overrides))
    return results_of(folder)


def results_of(folder: Path) -> dict:
    kept = json.loads((folder / "results.json").read_text())
    for timed in (kept, *kept["epochs"]):
        del timed["seconds"]
        timed.pop("party_seconds", None)
    kept.pop("parties", None)
    return kept


def weights_of(folder: Path, parties: Sequence[str] = ()) -> dict[str, Tensor]:
    """Weights and buffers of the last checkpoint, of these parties' segments where each has a folder of its own."""
    folders = [folder / party for party in parties] or [folder]
    states = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in folders]
    return {name: value for state in states for name, value in state.items()}


@contextmanager
def started(folder: Path, *overrides: str) -> Iterator[Callable[..., Command]]:
    """A function that starts the command of a party of a tiny run, which says in `folder`/PARTY.log what it says."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = [*TINY, "engine=processes", *overrides]
    running: list[Command] = []

    def start(party: str, *own: str) -> Command:
        where = [f"engine.address={address}", f"engine.party={party}", f"hydra.run.dir={folder}/{party}"]
        running.append(launched(*common, *own, *where, out=folder / f"{party}.log"))
        return running[-1]

    try:
        yield start
    finally:
        for process in running:
            process.kill()


def launched(*overrides: str, out: Path) -> Command:
    quiet = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    return Command(*quiet, *overrides, cwd=out.parent, out=out)


def until(so: Callable[[], object], within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def says(log: Path, text: str, times: int = 1) -> None:
    """Wait until a party has said `text`."""
    until(lambda: log.exists() and log.read_text().count(text) >= times)


class Slow(Callback):
    """Waits in every mini-batch of `party`, whose stretches stay long."""

    def __init__(self, party: str, seconds: float) -> None:
        self.party, self.seconds = party, seconds

    def on_before_zero_grad(self, trainer: pl.Trainer, learner: pl.LightningModule, *_: object) -> None:
        if learner.network.wire.plays(self.party):
            self.wait(trainer)

    def wait(self, trainer: pl.Trainer) -> None:
        time.sleep(self.seconds)


class Held(Slow):
    """From mini-batch 6 on waits; in that one until there is `go` in `folder`, where it leaves `held` meanwhile."""

    def __init__(self, party: str, folder: str) -> None:
        super().__init__(party, 0.3)
        self.folder = Path(folder)

    def wait(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == 5 and not (self.folder / "go").exists():
            (self.folder / "held").touch()
            until((self.folder / "go").exists, 300)
        elif trainer.global_step > 5:
            super().wait(trainer)


def held(folder: Path) -> list[str]:
    return [f"+callbacks.held={{_target_: federated.Held, party: bob, folder: {folder}}}"]


class LikeNccl:
    """A group of gloo in which two ranks meet by the first that one sends, and wait for each other, as in NCCL."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self.group = dist.ProcessGroupGloo(store, rank, size, options)
        self.store, self.met = store, set[int]()

    def rank(self) -> int:
        return self.group.rank()

    def send(self, tensors: list[Tensor], other: int, tag: int) -> dist.Work:
        self._meet(other)
        return self.group.send(tensors, other, tag)

    def recv(self, tensors: list[Tensor], other: int, tag: int) -> dist.Work:
        self._meet(other)
        return self.group.recv(tensors, other, tag)

    def _meet(self, other: int) -> None:
        if other not in self.met:
            self.store.set(f"{self.rank()} to {other}", "here")
            self.store.wait([f"{other} to {self.rank()}"], timedelta(seconds=10))
            self.met.add(other)


class BesideByGloo(NcclWiring):
    """wire=nccl from CPU to CPU: what NCCL brings is brought by another group of gloo."""

    direct = "cpu"

    def gpu(self, party: str, device: torch.device) -> str:
        return party

    def _group(self, store: dist.Store, rank: int, size: int) -> LikeNccl:
        return LikeNccl(store, rank, size)


class OneGpu(BesideByGloo):
    """All parties compute on the same."""

    def gpu(self, party: str, device: torch.device) -> str:
        return "GPU-7"


class MoreThreads(GlooWiring):
    """Alice computes with a thread more than Bob, and where that is warned of, the run ends."""

    def identity(self, party: str) -> None:
        torch.set_num_threads(2 if party == "alice0" else 1)
        warnings.filterwarnings("error", "threads differ")


class Killer(Callback):
    """Kills the process of `party`, once, before it sends its frame number `frame` of training."""

    content_with_stretches = True

    def __init__(self, party: str, frame: int, once: str, by: str = "SIGKILL") -> None:
        self.party, self.frame, self.once, self.by = party, frame, Path(once), signal.Signals[by]

    def on_train_start(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        wire = learner.network.wire
        if wire.plays(self.party) and not self.once.exists():
            transport, send, left = wire.transport, wire.transport.send, iter(range(self.frame - 1, -1, -1))

            def kill_or_send(*frame) -> None:
                if next(left, None) == 0:
                    self.once.touch()
                    os.kill(os.getpid(), self.by)
                send(*frame)

            transport.send = kill_or_send


def killer(party: str, frame: int, folder: Path, by: str = "SIGKILL") -> list[str]:
    """Overrides that kill a party, and leave `killed` in `folder` just before."""
    killer = f"{{_target_: federated.Killer, party: {party}, frame: {frame}, once: {folder}/killed, by: {by}}}"
    return [f"+callbacks.killer={killer}", "engine.save_every_n_steps=4"]


class Breaker(Callback):
    """Raises at `party` when an epoch ends."""

    content_with_stretches = True

    def __init__(self, party: str) -> None:
        self.party = party

    def on_train_epoch_end(self, trainer: pl.Trainer, learner: pl.LightningModule) -> None:
        if learner.network.wire.plays(self.party):
            raise RuntimeError("broken")

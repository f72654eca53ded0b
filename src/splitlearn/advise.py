"""Where to cut: `python -m splitlearn.advise +experiment=mnist_2party`, with the configuration of a training run.

Every cut is taken as that of two parties. Nothing is trained and nothing fetched: where the data are not there, their
known shape will do, and the leakage is left out.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from splitlearn.build import as_input_error, build, make, one_line
from splitlearn.callbacks.summary import quieten
from splitlearn.costs.by_cut import Cut, Terms, compare, measure
from splitlearn.data import Source
from splitlearn.errors import InputError
from splitlearn.layout import CHAIN, whole
from splitlearn.ledger import is_alice
from splitlearn.schedules.schedule import Schedule
from splitlearn.train import CONF

# Shape of a sample, number of classes and of training rows, by the name of the source: of data that may not be there.
KNOWN = {
    "mnist": ((1, 28, 28), 10, 60_000),
    "fashion_mnist": ((1, 28, 28), 10, 60_000),
    "cifar10": ((3, 32, 32), 10, 50_000),
    "cifar100": ((3, 32, 32), 100, 50_000),
}
NUM_ROWS = 128  # of the training rows, for the leakage
TRANSFERS = {"Handoff": 1, "Average": 2, "MeanGradient": 2}  # of a bottom, for each turn of an Alice
TITLES = {
    "parameters": "weights",
    "flops": "FLOPs",
    "elements": "values",
    "sample_bytes": "bytes",
    "epoch_bytes": "bytes/\nepoch",
    "epoch_seconds": "s/\nepoch",
    "break_even_peer": "K,\npeer",
    "break_even_server": "K,\nserver",
    "leakage": "leak-\nage",
}
SHARES = {"parameters": "parameter_share", "flops": "flop_share"}
WHOLE = {"_target_": "splitlearn.layout.whole"}
SEQUENTIAL = {"_target_": "splitlearn.schedules.schedule.Schedule"}
IID = {"_target_": "splitlearn.data.partition.iid", "_partial_": True}
FULL = ("None", "32", "32-true")  # precisions in which every number has 4 bytes
OWN_COLUMNS = ("vertical", "extended_vanilla")  # layouts in which all Alices take one turn


class Facts(NamedTuple):
    """What there is to cut: the blocks, some rows [N, ...] of data, real or not, the number of rows of each Alice."""

    blocks: nn.Sequential
    x: Tensor
    is_real: bool
    shards: list[int]


def advise(cfg: DictConfig) -> list[Cut]:
    """Compare the cuts, print them, leave `advice.csv` and `advice.png`. Raises InputError for what does not fit."""
    with as_input_error():
        OmegaConf.resolve(cfg)
        for key, value in cfg.schedule.get("sets", {}).items():
            cfg[key] = value  # as the scheme brings it to a run
        schedule = _schedule(cfg)
        facts = _find(cfg.copy())
        terms = _terms(cfg, schedule, facts.shards)
        blocks = measure(facts.blocks, facts.x, facts.is_real)
        cuts = compare(blocks, terms)
    kind = _name(cfg.layout)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write(cuts, folder / "advice.csv")
    drawn = _draw(cuts, folder / "advice.png")
    console = Console()
    console.print(_table(cuts, f"{_name(cfg.data.source)}: {sum(facts.shards):,} rows, {_alices(len(facts.shards))}"))
    has_link, precision = terms.seconds is not None, cfg.trainer.precision
    carries = terms.transfers > 0 and getattr(schedule.alice, "optimizer_state", "") == "carry" and _has_state(cfg)
    tied = [block.name for block in blocks if block.tied]
    notes = {
        "K: from so many Alices on, FedAvg sends more than handing weights on, peer to peer or by the server": True,
        "s: of transfer, one message after the other; in a run's link/seconds Alices side by side overlap": has_link,
        f"bytes: in 32 bit; what `trainer.precision` (={precision}) changes is left out": str(precision) not in FULL,
        "bytes/epoch: without the optimizer's state, which `schedule.alice.optimizer_state` (=carry) sends": carries,
        f"No data in {cfg.data.get('root')}, so by their shape alone: rows dealt evenly, no leakage": not facts.is_real,
        f"Each line is one cut between two parties, whatever `layout` (={kind}) says": kind != "two_party",
        f"No cut behind {', '.join(tied)}: later blocks share their weights, so one party has both": bool(tied),
        "No advice.png: matplotlib is not installed": not drawn,
        f"output: {folder}": True,
    }
    for note in (note for note, applies in notes.items() if applies):
        console.print(note, soft_wrap=True, highlight=False)
    return cuts


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> None:
    quieten()
    try:
        advise(cfg)
    except InputError as error:
        sys.exit(f"splitlearn: {one_line(error)}")


def _schedule(cfg: DictConfig) -> Schedule:
    """The schedule of the run itself, which checks what it is given."""
    takers = whole([]).takers(cfg.num_alices)
    own = OmegaConf.masked_copy(cfg.schedule, [str(key) for key in cfg.schedule if key != "sets"])
    return make(own, takers[:1] if _name(cfg.layout) in OWN_COLUMNS else takers, seed=cfg.seed)


def _terms(cfg: DictConfig, schedule: Schedule, shards: Sequence[int]) -> Terms:
    kind = type(schedule.alice).__name__
    transfers = TRANSFERS.get(kind, 0) * (2 if getattr(schedule.alice, "handoff", "peer") == "server" else 1)
    if kind == "Handoff" and cfg.num_alices == 1:
        transfers = 0  # there is nobody to hand on to
    link = make(cfg.link) if "link" in cfg else None
    seconds = link.seconds if link is not None else None
    labels = _name(cfg.layout) in ("two_party", "multi_hop") and cfg.layout.labels == "alice"
    share = schedule.num_participants / len(schedule.takers)
    size, turn = cfg.data.batch_size, schedule.turn
    return Terms(shards, size, turn, transfers, labels, seconds, schedule.local_epochs, share)


def _has_state(cfg: DictConfig) -> bool:
    """Whether Alice's optimizer keeps more than her weights."""
    own = cfg.optimizers.get("alice", {})
    optimizer = own if "_target_" in own else {**cfg.optimizer, **own}
    return _name(optimizer) != "SGD" or bool(optimizer.get("momentum", 0))


def _find(cfg: DictConfig) -> Facts:
    """Build the run uncut, which suits every model and cuts nothing twice; or with what its data's known shape says."""
    if _name(cfg.layout) in OWN_COLUMNS and _name(cfg.partition) == "all_rows":
        cfg.partition = IID  # uncut, nobody owns columns
    cfg.layout, cfg.schedule, cfg.logger, cfg.callbacks = WHOLE, SEQUENTIAL, {}, {}
    cfg.optimizers = {}  # of roles that the uncut run may not have
    cfg.init, cfg.init_fresh = None, []  # which cost nothing
    cfg.freeze = [name for name in cfg.freeze if name not in CHAIN and not is_alice(name)]  # theirs is up to the cut
    cfg.data.columns = None
    if "download" in cfg.data.source:
        cfg.data.source.download = False
    is_real = True
    try:
        run = build(cfg)
    except InstantiationException as error:
        if not isinstance(error.__cause__, FileNotFoundError) or _name(cfg.data.source) not in KNOWN:
            raise
        is_real = False
        known = dict(zip(("shape", "num_classes", "num_rows"), KNOWN[_name(cfg.data.source)], strict=True))
        cfg.data.source = {"_target_": "splitlearn.advise.unseen", **known}
        cfg.data.in_memory, cfg.data.num_workers, cfg.data.standardise, cfg.partition = False, 0, False, IID
        run = build(cfg)
    ids = torch.cat(list(run.data.shards.values()))
    ids = ids[torch.linspace(0, len(ids) - 1, min(NUM_ROWS if is_real else 2, len(ids))).long()]
    x = next(iter(run.data.rows.stream([ids], torch.device("cpu"))))["x"]
    ((_, blocks),) = run.learner.network.program
    return Facts(blocks, x, is_real, [len(ids) for ids in run.data.shards.values()])


def unseen(shape: Sequence[int], num_classes: int, num_rows: int) -> Source:
    """Data of which no more is known than this: black pictures, which take no memory."""
    x = torch.zeros(1, *shape, dtype=torch.uint8).expand(num_rows, *shape)
    rows = TensorDataset(x, torch.zeros(num_rows, dtype=torch.int64))
    return Source(rows, rows, num_classes)


def _alices(number: int) -> str:
    return "one Alice" if number == 1 else f"{number:,} Alices"


def _name(cfg: Mapping) -> str:
    """The class or function that a configuration makes, without its module."""
    return str(cfg.get("_target_")).rpartition(".")[2]


def _table(cuts: Sequence[Cut], title: str) -> Table:
    """Every column but the first is a cost, of which the least has a star."""
    table = Table(title=title, caption="* the least", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("cut behind", overflow="fold")
    fields = [field for field in TITLES if getattr(cuts[0], field) is not None]
    for field in fields:
        table.add_column(TITLES[field].replace("\n", " \n") + " ", justify="right", no_wrap=True)
    columns = {field: [getattr(cut, field) for cut in cuts] for field in fields}
    least = {field: min((v for v in values if not math.isnan(v)), default=0.0) for field, values in columns.items()}
    for cut in cuts:
        table.add_row(cut.name, *(_shown(cut, field, least[field]) for field in fields))
    return table


def _shown(cut: Cut, field: str, least: float) -> str:
    value = getattr(cut, field)
    text = _short(value)
    if field in SHARES:
        share = getattr(cut, SHARES[field])
        text += f" {share:.0%}" if share >= 0.1 else f" {share:.1%}"
    return f"[bold]{text}*[/]" if value == least else f"{text} "


def _short(number: float) -> str:
    """Three digits and a power of a thousand."""
    if math.isnan(number):
        return "-"
    if number == math.inf:
        return "never"
    power = next((i for i in (4, 3, 2, 1) if number >= 999.5 * 1000 ** (i - 1)), 0)
    return f"{number / 1000**power:.3g}{' kMGT'[power].strip()}"


def _write(cuts: Sequence[Cut], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Cut._fields)
        writer.writerows(cuts)


def _draw(cuts: Sequence[Cut], path: Path) -> bool:
    """Bars for each cut: what Alice computes, what crosses, what can be seen. False where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # no dependency of ours, and slow to import

    panels = {"Alice's share of FLOPs": "flop_share", "bytes per epoch": "epoch_bytes", "leakage": "leakage"}
    panels = {title: field for title, field in panels.items() if getattr(cuts[0], field) is not None}
    figure = Figure(figsize=(max(5.0, 1.5 + 0.3 * len(cuts)), 2 + 1.8 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True)
    for axis, (title, field) in zip(axes, panels.items(), strict=True):
        axis.bar([cut.name for cut in cuts], [getattr(cut, field) for cut in cuts])
        axis.set_ylabel(title)
    axes[-1].tick_params(axis="x", rotation=90)
    axes[-1].set_xlabel("cut behind")
    figure.savefig(path, dpi=120)
    return True


if __name__ == "__main__":
    main()

"""Where to cut: `python -m splitlearn.advise +experiment=mnist_2party`, with the configuration of a training run.

Every cut is taken as that of two parties. Nothing is trained and nothing fetched: where the data are not there, their
known shape will do, and the leakage is left out.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
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

from splitlearn.cuts import Cut, Terms, compare, measure
from splitlearn.errors import InputError
from splitlearn.layout import whole
from splitlearn.network import SplitNetwork, check_blocks
from splitlearn.train import CONF, as_input_error, build, make, one_line, quieten
from splitlearn.wire import Wire

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
SEQUENTIAL = {"_target_": "splitlearn.schedule.Schedule"}


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
        facts = _find(cfg.copy())
        terms = _terms(cfg, facts.shards)
        cuts = compare(measure(facts.blocks, facts.x, facts.is_real), terms)
    kind = _name(cfg.layout)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write(cuts, folder / "advice.csv")
    drawn = _draw(cuts, folder / "advice.png")
    console = Console()
    console.print(_table(cuts, f"{_name(cfg.data.source)}: {sum(facts.shards):,} rows, {_alices(len(facts.shards))}"))
    notes = {
        "K: from so many Alices on, FedAvg sends more than handing weights on, peer to peer or by the server": True,
        "s: of transfer, one message after the other": terms.seconds is not None,
        f"No data in {cfg.data.get('root')}, so by their shape alone: rows dealt evenly, no leakage": not facts.is_real,
        f"Each line is one cut between two parties, whatever `layout` (={kind}) says": kind != "two_party",
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


def _terms(cfg: DictConfig, shards: Sequence[int]) -> Terms:
    sharing = cfg.schedule.get("alice", {})
    transfers = TRANSFERS.get(_name(sharing), 0) * (2 if sharing.get("handoff") == "server" else 1)
    if _name(sharing) == "Handoff" and cfg.num_alices == 1:
        transfers = 0  # there is nobody to hand on to
    link = make(cfg.link) if "link" in cfg else None
    labels = _name(cfg.layout) in ("two_party", "multi_hop") and cfg.layout.labels == "alice"
    seconds = link.seconds if link is not None else None
    return Terms(shards, cfg.data.batch_size, cfg.schedule.get("turn", "epoch"), transfers, labels, seconds)


def _find(cfg: DictConfig) -> Facts:
    """Build the run uncut, which suits every model and cuts nothing twice; or what its data's known shape allows."""
    cfg.layout, cfg.schedule, cfg.logger, cfg.callbacks = WHOLE, SEQUENTIAL, {}, {}
    cfg.data.columns = None
    if "download" in cfg.data.source:
        cfg.data.source.download = False
    try:
        run = build(cfg)
    except InstantiationException as error:
        if not isinstance(error.__cause__, FileNotFoundError) or _name(cfg.data.source) not in KNOWN:
            raise
        return _from_shape(cfg, *KNOWN[_name(cfg.data.source)])
    ids = torch.cat(list(run.data.shards.values()))
    ids = ids[torch.linspace(0, len(ids) - 1, min(NUM_ROWS, len(ids))).long()]
    x = next(iter(run.data.rows.stream([ids], torch.device("cpu"))))["x"]
    return Facts(_blocks(run.learner.network), x, True, [len(ids) for ids in run.data.shards.values()])


def _from_shape(cfg: DictConfig, shape: Sequence[int], num_classes: int, num_rows: int) -> Facts:
    model = make(cfg.model, num_classes=num_classes)
    sample = {"x": torch.zeros(2, *shape), "y": torch.zeros(2, dtype=torch.int64)}
    network = SplitNetwork(model, whole(list(check_blocks(model))), Wire(), sample, cfg.seed)
    shards = torch.arange(num_rows - round(num_rows * cfg.data.val_fraction)).tensor_split(cfg.num_alices)
    return Facts(_blocks(network), sample["x"], False, [len(shard) for shard in shards])


def _blocks(network: SplitNetwork) -> nn.Sequential:
    ((_, segment),) = network.program
    return segment


def _alices(number: int) -> str:
    return "one Alice" if number == 1 else f"{number:,} Alices"


def _name(cfg: DictConfig) -> str:
    """The class or function that a configuration makes, without its module."""
    return str(cfg.get("_target_")).rpartition(".")[2]


def _table(cuts: Sequence[Cut], title: str) -> Table:
    """Every column but the first is a cost, of which the least has a star."""
    table = Table(title=title, caption="* the least", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("cut behind", overflow="fold")
    fields = [field for field in TITLES if getattr(cuts[0], field) is not None]
    for field in fields:
        table.add_column(TITLES[field].replace("\n", " \n") + " ", justify="right", no_wrap=True)
    least = {field: min(getattr(cut, field) for cut in cuts) for field in fields}
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

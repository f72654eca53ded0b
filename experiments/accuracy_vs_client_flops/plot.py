"""Draw accuracy against its costs: `python plot.py FOLDER NAME`, of runs in FOLDER/PARTITION/SCHEDULE/LR.

Of the learning rates that a scheme has tried, the one counts whose last validation was best.
Leaves results/NAME_PARTITION.png, and of all partitions results/NAME.csv (the runs that count), results/NAME.md (their
table) and results/NAME_rates.md (what all learning rates came to).
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, StrMethodFormatter

RESULTS = Path(__file__).parent / "results"
# Colours that the colour-blind tell apart (Okabe and Ito 2008); of two schemes that must agree, one is dashed.
STYLES = {
    "centralised": ("black", ":"),
    "sequential": ("#E69F00", "-"),
    "splitfed_v1": ("#0072B2", "-"),
    "fedavg": ("#56B4E9", "--"),
    "splitfed_v2": ("#009E73", "-"),
    "large_batch": ("#D55E00", "-"),
}
COSTS = {
    "client_flops": ("client GFLOPs so far, all Alices together", 1e9),
    "round": ("rounds", 1),
    "bytes": ("MB sent so far, by all", 1e6),
}
ENOUGH = 0.9  # the accuracy whose price is told
KEPT = ("epoch", "step", "client_flops", "client_flops_max", "bytes", "train/loss", "val/loss", "val/accuracy")
Runs = dict[str, dict[str, Any]]  # results.json of each scheme


def main(folder: str, name: str) -> None:
    partitions = {path.name: read(path) for path in sorted(Path(folder).iterdir()) if path.is_dir()}
    RESULTS.mkdir(exist_ok=True)
    keep(partitions, name)
    for partition, runs in partitions.items():
        draw(runs, RESULTS / f"{name}_{partition}.png")
    tables = "\n".join(f"{partition}:\n\n{tabulate(runs)}" for partition, runs in partitions.items())
    (RESULTS / f"{name}.md").write_text(tables)
    rates = "\n".join(f"{partition}:\n\n{tabulate_rates(Path(folder, partition))}" for partition in partitions)
    (RESULTS / f"{name}_rates.md").write_text(rates)
    print(tables, rates, sep="\n")


def read(folder: Path) -> Runs:
    return {scheme: best(folder / scheme) for scheme in STYLES}


def tried(folder: Path) -> list[dict[str, Any]]:
    """A scheme's runs, by learning rate."""
    runs = [{"lr": path.parent.name, **json.loads(path.read_text())} for path in folder.glob("*/results.json")]
    return sorted(runs, key=lambda run: float(run["lr"]))


def best(folder: Path) -> dict[str, Any]:
    """Of the runs that came to their end."""
    run = max((run for run in tried(folder) if run["test"]), key=lambda run: run["epochs"][-1]["val/accuracy"])
    return {**run, "epochs": [{**epoch, "round": epoch["epoch"] + 1} for epoch in run["epochs"]]}


def keep(partitions: dict[str, Runs], name: str) -> None:
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("partition", "schedule", "lr", *KEPT))
        for partition, runs in partitions.items():
            for scheme, run in runs.items():
                names = (partition, scheme, run["lr"])
                lines.writerows([*names, *(epoch[column] for column in KEPT)] for epoch in run["epochs"])


def draw(runs: Runs, path: Path) -> None:
    plt.rcParams.update({"font.size": 11})
    figure, row = plt.subplots(1, len(COSTS), figsize=(14, 4.2), sharey=True, layout="constrained")
    for axes, (cost, (label, _)) in zip(row, COSTS.items(), strict=True):
        for scheme, run in runs.items():
            draw_run(axes, cost, scheme, run["epochs"])
        axes.set(xlabel=label)
        if cost != "round":
            axes.set(xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set(ylabel="validation accuracy", ylim=(0, 1.02))
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100)


def draw_run(axes: Axes, cost: str, scheme: str, epochs: list[dict[str, float]]) -> None:
    colour, line = STYLES[scheme]
    accuracy = [epoch["val/accuracy"] for epoch in epochs]
    if not epochs[-1][cost]:  # nothing crosses: no place on a logarithmic axis
        axes.axhline(accuracy[-1], color=colour, linestyle=line)
        style = {"size": 9, "ha": "right", "va": "top", "transform": axes.get_yaxis_transform()}
        axes.text(0.98, accuracy[-1] - 0.015, f"{scheme} sends nothing", style)
        return
    spent = [epoch[cost] / COSTS[cost][1] for epoch in epochs]
    axes.plot(spent, accuracy, color=colour, linestyle=line, marker="o", markersize=3, linewidth=2, label=scheme)


def tabulate(runs: Runs) -> str:
    """One line a scheme: the costs of a round, what `ENOUGH` had cost, and the accuracies after the last round."""
    lines = [
        "| scheme | learning rate | steps a round | client GFLOPs a round | MB a round "
        f"| rounds to {ENOUGH:.0%} | client GFLOPs to {ENOUGH:.0%} | MB to {ENOUGH:.0%} | validation | test |",
        f"|{'---|' * 10}",
    ]
    for scheme, run in runs.items():
        last, num = run["epochs"][-1], len(run["epochs"])
        costs = [
            f"{last['step'] / num:,.0f}",
            amount(last["client_flops"] / num / 1e9),
            amount(last["bytes"] / num / 1e6),
        ]
        accuracies = [f"{last['val/accuracy']:.3f}", f"{run['test']['test/accuracy']:.3f}"]
        lines.append(f"| {' | '.join([scheme, run['lr'], *costs, *price(run['epochs']), *accuracies])} |")
    return "\n".join(lines) + "\n"


def price(epochs: list[dict[str, float]]) -> list[str]:
    """Rounds, client GFLOPs and MB at the first validation that was good enough."""
    enough = next((epoch for epoch in epochs if epoch["val/accuracy"] >= ENOUGH), None)
    if enough is None:
        return ["not reached", "", ""]
    return [str(enough["round"]), amount(enough["client_flops"] / 1e9), amount(enough["bytes"] / 1e6)]


def tabulate_rates(folder: Path) -> str:
    """The accuracies after the last round, validation and test, of each scheme and learning rate."""
    runs = {scheme: {run["lr"]: run for run in tried(folder / scheme)} for scheme in STYLES}
    rates = sorted({lr for of_scheme in runs.values() for lr in of_scheme}, key=float)
    lines = [f"| scheme | {' | '.join(rates)} |", f"|{'---|' * (1 + len(rates))}"]
    for scheme, of_scheme in runs.items():
        lines.append(f"| {' | '.join([scheme, *(outcome(of_scheme.get(lr)) for lr in rates)])} |")
    return "\n".join(lines) + "\n"


def outcome(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    if not run["test"]:
        return f"stopped in round {len(run['epochs']) + 1}"  # the loss was not a number
    return f"{run['epochs'][-1]['val/accuracy']:.3f}, {run['test']['test/accuracy']:.3f}"


def amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    main(*sys.argv[1:])

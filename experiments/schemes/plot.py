"""Draw results/schemes.png and keep its numbers: `python plot.py FOLDER`, of runs in FOLDER/PARTITION/SCHEDULE."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
PARTITIONS = {"iid": "iid", "label_shards": "two classes each"}
# Colours that the colour-blind tell apart (Okabe and Ito 2008); of two schemes that must agree, one is dashed.
STYLES = {
    "centralised": ("black", ":"),
    "sequential": ("#E69F00", "-"),
    "splitfed_v1": ("#0072B2", "-"),
    "fedavg": ("#56B4E9", "--"),
    "splitfed_v2": ("#009E73", "-"),
    "splitfed_v3": ("#CC79A7", "-"),
    "parallel": ("#D55E00", "-"),
    "large_batch": ("#666666", "--"),
}
COLUMNS = {"round": "round", "bytes": "bytes sent so far (logarithmic)", "seconds": "seconds so far, on one machine"}
ENOUGH = 0.9  # the accuracy whose price in bytes is told
KEPT = ("epoch", "step", "bytes", "seconds", "train/loss", "val/loss", "val/accuracy")
Runs = dict[tuple[str, str], dict[str, Any]]


def main(folder: str) -> None:
    runs = {
        (partition, scheme): json.loads(Path(folder, partition, scheme, "results.json").read_text())
        for partition in PARTITIONS
        for scheme in STYLES
    }
    keep(runs)
    draw(runs)
    table = tabulate(runs)
    (RESULTS / "table.md").write_text(table)
    print(table)


def keep(runs: Runs) -> None:
    with (RESULTS / "schemes.csv").open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("partition", "schedule", *KEPT))
        for names, run in runs.items():
            lines.writerows([*names, *(epoch[column] for column in KEPT)] for epoch in run["epochs"])


def draw(runs: Runs) -> None:
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12})
    figure, grid = plt.subplots(2, 3, figsize=(14, 7.6), sharey=True, sharex="col", layout="constrained")
    for row, (partition, title) in zip(grid, PARTITIONS.items(), strict=True):
        for axes, column in zip(row, COLUMNS, strict=True):
            for scheme in STYLES:
                draw_run(axes, column, scheme, runs[partition, scheme]["epochs"])
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set(ylabel=f"{title}\nvalidation accuracy", ylim=(0, 1))
    for axes, (column, label) in zip(grid[1], COLUMNS.items(), strict=True):
        axes.set(xlabel=label, xscale="log" if column == "bytes" else "linear")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(RESULTS / "schemes.png", dpi=100)


def draw_run(axes: Axes, column: str, scheme: str, epochs: list[dict[str, float]]) -> None:
    colour, line = STYLES[scheme]
    accuracy = [epoch["val/accuracy"] for epoch in epochs]
    if column == "bytes" and not epochs[-1]["bytes"]:  # nothing crosses: no place on a logarithmic axis
        axes.axhline(accuracy[-1], color=colour, linestyle=line)
        return
    spent = [epoch["epoch"] + 1 if column == "round" else epoch[column] for epoch in epochs]
    axes.plot(spent, accuracy, color=colour, linestyle=line, marker="o", markersize=3, linewidth=2, label=scheme)


def tabulate(runs: Runs) -> str:
    """One line a scheme. Steps, bytes and seconds are of a round of the iid run; accuracies are of the last round."""
    lines = [
        f"| scheme | steps | MB | seconds | iid, validation | iid, test | MB to {ENOUGH:.0%} "
        "| two classes each, validation | two classes each, test |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scheme in STYLES:
        iid, skewed = (runs[partition, scheme] for partition in PARTITIONS)
        epochs, num = iid["epochs"], len(iid["epochs"])
        price = next((f"{e['bytes'] / 1e6:,.0f}" for e in epochs if e["val/accuracy"] >= ENOUGH), "not reached")
        cost = [f"{epochs[-1][key] / num:,.{digits}f}" for key, digits in (("step", 0), ("seconds", 1))]
        shown = [f"{value:.3f}" for run in (iid, skewed) for value in (last(run), run["test"]["test/accuracy"])]
        cells = [scheme, cost[0], f"{epochs[-1]['bytes'] / num / 1e6:,.1f}", cost[1], *shown[:2], price, *shown[2:]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def last(run: dict[str, Any]) -> float:
    return run["epochs"][-1]["val/accuracy"]


if __name__ == "__main__":
    main(sys.argv[1])

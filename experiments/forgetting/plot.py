"""Draw results/forgetting.png and keep its numbers: `python plot.py FOLDER`, of runs in FOLDER/SCHEDULE/ORDER/TURN."""

import csv
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from splitlearn.schedules.schedule import Schedule

RESULTS = Path(__file__).parent / "results"
SCHEDULES = ("sequential", "splitfed_v2")
COLOURS = {"fixed": "#D55E00", "random": "#0072B2", "cyclic": "#009E73"}  # Okabe and Ito 2008
TURNS = {"epoch": "all her batches", "5": "5 batches", "1": "1 batch"}
LINES = {"epoch": "-", "5": "--", "1": ":"}
KEPT = ("epoch", "step", "bytes", "seconds", "val/accuracy", "val/accuracy_worst", "val/performance_gap")
ALICES = [f"alice{i}" for i in range(10)]
SEED = 0  # of the runs, by which a random order was drawn
Runs = dict[tuple[str, str, str], dict[str, Any]]


def main(folder: str) -> None:
    runs = {
        names: json.loads(Path(folder, *names, "results.json").read_text())
        for names in product(SCHEDULES, COLOURS, TURNS)
    }
    keep(runs)
    draw(runs)
    table = tabulate(runs)
    (RESULTS / "table.md").write_text(table)
    print(table)


def after(order: str, epoch: dict[str, float]) -> dict[str, float]:
    """The network's accuracy on all validation rows as each Alice ends her last turn, in the order of the turns.

    With turns of a few batches, who has fewer batches than others has her last turn a round of turns before theirs.
    """
    alices = Schedule(ALICES, order=order, seed=SEED).participants(int(epoch["epoch"]))
    return {alice: epoch[f"val/accuracy_after/{alice}"] for alice in alices}


def keep(runs: Runs) -> None:
    with (RESULTS / "forgetting.csv").open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("schedule", "order", "turn", *KEPT, "accuracy after each turn"))
        for (schedule, order, turn), run in runs.items():
            for epoch in run["epochs"]:
                turns = " ".join(f"{alice}={accuracy:.4f}" for alice, accuracy in after(order, epoch).items())
                lines.writerow((schedule, order, turn, *(epoch[column] for column in KEPT), turns))


def draw(runs: Runs) -> None:
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12})
    figure, grid = plt.subplots(2, 4, figsize=(15, 7), sharex=True, sharey=True, layout="constrained")
    for row, schedule in zip(grid, SCHEDULES, strict=True):
        for axes, turn in zip(row, TURNS, strict=False):
            for order in COLOURS:
                draw_turns(axes, order, turn, runs[schedule, order, turn]["epochs"])
        for order, turn in product(COLOURS, TURNS):
            gaps = [epoch["val/performance_gap"] for epoch in runs[schedule, order, turn]["epochs"]]
            row[3].plot(range(1, len(gaps) + 1), gaps, COLOURS[order], linestyle=LINES[turn], linewidth=2)
        row[0].set(ylabel=f"{schedule}\naccuracy, or performance gap", ylim=(0, 1))
    for axes, length in zip(grid[0], TURNS.values(), strict=False):
        axes.set_title(f"A turn is {length}")
    grid[0, 3].set_title("Performance gap")
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[1]:
        axes.set(xlabel="epoch", xlim=(0, None))
    legend(figure)
    figure.savefig(RESULTS / "forgetting.png", dpi=100)


def draw_turns(axes: Axes, order: str, turn: str, epochs: list[dict[str, float]]) -> None:
    """A saw's tooth for each Alice, at the time of her last turn, and a dot for what all agree on behind the epoch."""
    for number, epoch in enumerate(epochs, start=1):
        teeth = list(after(order, epoch).values())
        steps = epochs[-1]["step"] / len(epochs)
        width = 1.0 if turn == "epoch" else int(turn) * len(teeth) / steps  # of the last round of turns, in epochs
        times = [number - width * (1 - (i + 1) / len(teeth)) for i in range(len(teeth))]
        axes.plot(times, teeth, COLOURS[order], linewidth=1.3, alpha=0.75)
    ends = range(1, len(epochs) + 1)
    line = "" if turn == "epoch" else ":"  # where the teeth leave the way between the dots untold
    axes.plot(ends, [epoch["val/accuracy"] for epoch in epochs], "o", color=COLOURS[order], linestyle=line)


def legend(figure: plt.Figure) -> None:
    handles = [Line2D([], [], color=colour, linewidth=2, label=f"order {order}") for order, colour in COLOURS.items()]
    handles += [
        Line2D([], [], color="grey", linewidth=1, label="as each Alice ends her\nlast turn of the epoch"),
        Line2D([], [], color="grey", marker="o", linestyle="", label="end of the epoch"),
    ]
    handles += [
        Line2D([], [], color="grey", linewidth=2, linestyle=LINES[turn], label=f"gap, {length}")
        for turn, length in TURNS.items()
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def tabulate(runs: Runs) -> str:
    """One line a run, about its last epoch; MB are of an epoch."""
    lines = [
        "| scheme | a turn | order | validation | test | worst Alice | lowest after a turn | performance gap | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for schedule, turn, order in product(SCHEDULES, TURNS, COLOURS):
        run = runs[schedule, order, turn]
        end = run["epochs"][-1]
        values = (
            end["val/accuracy"],
            run["test"]["test/accuracy"],
            end["val/accuracy_worst"],
            min(after(order, end).values()),
            end["val/performance_gap"],
        )
        shown = " | ".join(f"{value:.3f}" for value in values)
        price = end["bytes"] / len(run["epochs"]) / 1e6
        lines.append(f"| {schedule} | {TURNS[turn]} | {order} | {shown} | {price:,.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1])

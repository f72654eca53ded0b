"""Draw results/break_even.png, the bytes of a client over the number of clients, of results/traffic.json."""

import json

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from table import HANDOFFS, RESULTS, Traffic

TITLES = {
    "ResNet-50": "ResNet-50 on CIFAR-100, cut behind the stem",
    "784-128-640-10": "784-128-640-10 on MNIST, cut before the head",
}
# Colours that the colour-blind tell apart (Okabe and Ito 2008).
STYLES = {"peer": ("#0072B2", "-"), "server": ("#E69F00", "--")}


def main() -> None:
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12})
    figure, row = plt.subplots(1, 2, figsize=(13, 5), sharex=True, layout="constrained")
    networks = json.loads((RESULTS / "traffic.json").read_text())
    for axes, (name, traffic) in zip(row, networks.items(), strict=True):
        draw(axes, Traffic(**traffic))
        axes.set(title=TITLES[name], xlabel="clients K (logarithmic)")
    row[0].set(ylabel="MB per client and epoch (logarithmic)")
    figure.savefig(RESULTS / "break_even.png", dpi=100)


def draw(axes: Axes, traffic: Traffic) -> None:
    clients = [round(10 ** (i / 20)) for i in range(20 * 4 + 1)]
    axes.axhline(traffic.of_round / 1e6, color="black", linewidth=2, label="federated learning, a round an epoch")
    for handoff in HANDOFFS:
        colour, line = STYLES[handoff]
        spent = [traffic.split(num_clients, handoff) / 1e6 for num_clients in clients]
        label = f"split learning, handoff: {handoff}"
        axes.plot(clients, spent, color=colour, linestyle=line, linewidth=2, label=label)
        least = traffic.break_even(handoff)
        there = (least, traffic.split(least, handoff) / 1e6)
        axes.plot(*there, "o", color=colour)
        axes.annotate(f"K = {least:,}", there, (-4, -18), textcoords="offset points", ha="right")
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()

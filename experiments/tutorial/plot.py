"""Draw results/tutorial.png from the two runs' losses and Lightning's checkpoint: `python plot.py CHECKPOINT`."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from by_hand import load, split
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
EACH = 2  # pictures of every digit, so that the eye can compare like with like


def main(checkpoint: str) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(13, 4.6))
    left, right = figure.subfigures(1, 2, width_ratios=(4.2, 8.8))
    draw_losses(left.subplots())
    left.subplots_adjust(left=0.14, right=0.96, top=0.86, bottom=0.13)
    draw_crossing(right, *look(checkpoint))
    figure.savefig(RESULTS / "tutorial.png", dpi=110)


def draw_losses(axes: Axes) -> None:
    for name, label, style in (("lightning", "through Lightning", "C0-"), ("by_hand", "by hand", "C1o")):
        losses = [epoch["train/loss"] for epoch in json.loads((RESULTS / f"{name}.json").read_text())["epochs"]]
        axes.plot(range(len(losses)), losses, style, label=label, markersize=4)
    axes.set(
        xlabel="epoch", ylabel="mean training loss (nats per image)", ylim=0, title="Both runs, the same to the bit"
    )
    axes.legend(frameon=False)


def look(checkpoint: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return test images [N, 28, 28], their labels [N] and what the trained network sends of them [N, 640]."""
    data = load("mnist")
    network = split(data)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
    fields = data.test_rows.fields
    rows = torch.cat([(fields["y"] == digit).nonzero()[:EACH, 0] for digit in range(10)])
    chosen = {name: field[rows] for name, field in fields.items()}
    tape, _ = network.look(chosen)
    return chosen["x"][:, 0], chosen["y"], tape[0].received


def draw_crossing(figure: SubFigure, images: Tensor, labels: Tensor, sent: Tensor) -> None:
    axes = figure.subplots(4, 10, height_ratios=(1, 1.6) * 2)
    for i, (image, activation) in enumerate(zip(images, sent, strict=True)):
        top, below = axes[2 * (i % EACH) : 2 * (i % EACH) + 2, i // EACH]
        top.imshow(image, cmap="gray_r")
        drawn = below.imshow(activation.view(32, 20), cmap="magma", vmin=0, vmax=float(sent.max()))
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes, label="activation", fraction=0.02, pad=0.015)
    figure.suptitle("Test images, and below each the 640 numbers that cross to Bob")


if __name__ == "__main__":
    main(sys.argv[1])

"""Draw results/tutorial.png from the losses of both runs and Lightning's checkpoint: `python plot.py CHECKPOINT`."""

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
EACH = 2  # images of every digit, so that the eye can compare like with like


def main(checkpoint: str) -> None:
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "figure.titlesize": 12})
    figure = plt.figure(figsize=(15, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(4, 11), wspace=0.03)
    draw_losses(left.subplots())
    draw_crossing(right, *look(checkpoint))
    figure.savefig(RESULTS / "tutorial.png", dpi=100)


def draw_losses(axes: Axes) -> None:
    for name, label, style in (("lightning", "through Lightning", "C0-"), ("by_hand", "by hand", "C1o")):
        losses = [epoch["train/loss"] for epoch in json.loads((RESULTS / f"{name}.json").read_text())["epochs"]]
        axes.plot(range(len(losses)), losses, style, label=label, markersize=5)
    axes.set(xlabel="epoch", ylabel="mean training loss (nats per image)", title="The loss, in both runs")
    axes.set(xticks=range(0, len(losses), 2), ylim=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def look(checkpoint: str) -> tuple[Tensor, Tensor]:
    """Return test images [10 * EACH, 28, 28], digit by digit, and what crosses for each [10 * EACH, 640]."""
    data = load("mnist")
    network = split(data)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    fields = data.test_rows.fields
    rows_of = [(fields["y"] == digit).nonzero()[:, 0] for digit in range(10)]
    tape, _ = network.look(fields)
    sent = tape[0].received
    # Hidden units have no order of their own. In this one a digit's units lie together.
    favourite = torch.stack([sent[rows].mean(0) for rows in rows_of]).argmax(0)
    chosen = torch.cat([rows[:EACH] for rows in rows_of])
    return fields["x"][chosen, 0], sent[chosen][:, favourite.argsort(stable=True)]


def draw_crossing(figure: SubFigure, images: Tensor, sent: Tensor) -> None:
    axes = figure.subplots(2 * EACH, 10, height_ratios=(1, 1.6) * EACH)
    brightest = float(sent.quantile(0.99))  # a few outliers would leave the rest in the dark
    for i, (image, activation) in enumerate(zip(images, sent, strict=True)):
        digit, row = i // EACH, 2 * (i % EACH)
        axes[row, digit].imshow(image, cmap="gray_r")
        drawn = axes[row + 1, digit].imshow(activation.view(32, 20), cmap="magma", vmin=0, vmax=brightest)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=axes, label="activation (no unit)", extend="max", aspect=40, pad=0.01)
    figure.suptitle(
        "Test images, and below each what crosses to Bob for it: 640 activations,\n"
        "drawn in rows of 20, those units first that answer most to 0, then to 1, and so on to 9"
    )


if __name__ == "__main__":
    main(sys.argv[1])

"""Split learning by hand: PySyft's tutorial "Introduction to SplitNN", its training loop in its ten numbered steps.

One network learns to read digits. Alice has the images and the bottom of the network, Bob the labels and the top:

    alice0   images -> hidden1 hidden2   --- activation -->   head <- labels   bob
                                         <--- gradient ----

Neither images nor labels cross: only the activation at the cut goes to Bob, and only its gradient comes back.
`--data digits` trains on scikit-learn's small digits, which need no download.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from splitlearn.data import SplitData
from splitlearn.data.loader import TurnLoader
from splitlearn.data.sources import digits, mnist
from splitlearn.layout import two_party
from splitlearn.models import mlp
from splitlearn.network import SplitNetwork
from splitlearn.schedules.schedule import Schedule


def train(network: SplitNetwork, data: SplitData, epochs: int) -> list[float]:
    """Return the mean training loss of each epoch."""
    alice, bob = network.segments["bottom"], network.segments["top"]
    cut, wire = network.cut, network.wire
    optimizers = [torch.optim.SGD(segment.parameters(), lr=0.03) for segment in (alice, bob)]
    criterion, losses = nn.NLLLoss(), []
    for epoch in range(epochs):
        running_loss = 0.0
        for images, labels in batches(data, epoch):  # of the same rows: images at Alice, labels at Bob
            # (1) Erase the previous gradients of both optimizers
            for optimizer in optimizers:
                optimizer.zero_grad()
            # (2) Predict with Alice's segment
            activation = alice(images)
            # (3) Break the link of the computation graph and send the activation signal to Bob
            hop = cut(activation, "alice0", "bob")
            # (4) Predict with Bob's segment, from the signal that he received
            prediction = bob(hop.received)
            # (5) How much did we miss?
            loss = criterion(prediction, labels)
            # (6) Which weights caused it? Bob asks backwards, as far as the signal that he received
            loss.backward()
            # (7) Send the gradient of the received signal to Alice
            gradient = wire.carry(hop.received.grad, "bob", "alice0", "gradient")
            # (8) Backpropagate in Alice's segment, given this gradient
            hop.sent.backward(gradient)
            # (9) Both optimizers change their weights
            for optimizer in optimizers:
                optimizer.step()
            # (10) Report the loss
            running_loss += loss.item() * len(labels)
        losses.append(running_loss / len(data.shards["alice0"]))
        print(f"Epoch {epoch} - Training loss: {losses[-1]}", flush=True)
    return losses


def split(data: SplitData) -> SplitNetwork:
    """Cut the tutorial's network behind its second hidden layer; the initial weights follow from the seed."""
    layout = two_party(["hidden1", "hidden2", "head"], cut=2)
    return SplitNetwork(mlp(data.num_classes, hidden_sizes=[128, 640]), layout, data, seed=0)


def batches(data: SplitData, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels of each mini-batch, in the order in which Lightning has them."""
    loader = TurnLoader(data.rows, data.shards, Schedule(["alice0"]), pace=None, batch_size=data.batch_size)
    for fields in data.rows.stream((step.batches["alice0"] for step in loader.steps(epoch)), torch.device("cpu")):
        yield fields["x"], fields["y"]


def load(name: str) -> SplitData:
    if name == "digits":
        return SplitData(digits(), val_fraction=0.0)
    source = mnist(os.environ.get("SPLITLEARN_DATA", "data"), download=True)
    return SplitData(source, val_fraction=0.0, mean=[0.5], std=[0.5])


def main() -> None:
    parser = argparse.ArgumentParser(description="Split learning by hand, in the tutorial's ten steps.")
    parser.add_argument("--data", choices=["mnist", "digits"], default="mnist")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--results", type=Path, help="file for losses and bytes, as in results.json")
    options = parser.parse_args()
    try:
        data = load(options.data)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"by_hand: {error}")
    network = split(data)
    epochs = [{"epoch": i, "train/loss": loss} for i, loss in enumerate(train(network, data, options.epochs))]
    if options.results:
        results = {"epochs": epochs, "bytes": network.wire.ledger.table()}
        options.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

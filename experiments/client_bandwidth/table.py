"""Print the bandwidth table of Vepakomma et al. 2018 (arXiv 1812.00564) by the byte meter: `python table.py`.

The networks have shapes and no values (torch's meta device); the wire counts the bytes that would cross all the same.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from splitlearn.layout import Layout, two_party, whole
from splitlearn.models import mlp, resnet50
from splitlearn.network import Batch, SplitNetwork
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.rounds import Rounds
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Handoff, Sharing

RESULTS = Path(__file__).parent / "results"
CLIENTS, NUM_EPOCHS = (100, 500), 100
PUBLISHED = {"Large-batch SGD": ("13", "14"), "Federated learning": ("3", "2.4"), "SplitNN": ("6", "1.2")}
HANDOFFS, GIB = ("peer", "server"), 2**30


class Traffic(NamedTuple):
    """What crosses for one network, in bytes.

    `of_row` goes there and back for each row in each epoch, `of_turn` are the bottom's weights that go with each turn,
    by the way of handing on; `of_round` and `of_step` are the whole network's weights in a round of federated learning
    and its gradients in a step of large-batch SGD, there and back. Batch norm's statistics are among them.
    """

    num_rows: int
    of_row: int
    of_turn: dict[str, int]
    of_round: int
    of_step: int

    def split(self, num_clients: int, handoff: str) -> float:
        """Bytes of an epoch of split learning per client: all that crosses, divided among the clients."""
        return self.of_row * self.num_rows / num_clients + self.of_turn[handoff]

    def break_even(self, handoff: str) -> int:
        """The least number of clients with whom an epoch of split learning takes fewer bytes than a federated round."""
        return self.of_row * self.num_rows // (self.of_round - self.of_turn[handoff]) + 1


def main() -> None:
    networks = {"ResNet-50": on_cifar100(), "784-128-640-10": on_mnist()}
    resnet = networks["ResNet-50"]
    tables = "\n".join([splitnn_table(resnet), baselines_table(resnet), break_even_table(networks)])
    (RESULTS / "table.md").write_text(tables)
    traffic = {name: traffic._asdict() for name, traffic in networks.items()}
    (RESULTS / "traffic.json").write_text(json.dumps(traffic, indent=2) + "\n")
    print(tables)


def on_cifar100() -> Traffic:
    """ResNet-50 with the stem of ImageNet on 32x32 pixels, cut behind it, before the pooling: 64x16x16 floats."""
    with torch.device("meta"):
        model = resnet50(num_classes=100, stem=224)
    return measure(model, "stem", (3, 32, 32), num_rows=50_000)


def on_mnist() -> Traffic:
    """The tutorial's network, cut behind its second hidden layer: 640 floats."""
    with torch.device("meta"):
        model = mlp(num_classes=10, hidden_sizes=(128, 640))
    return measure(model, 2, (1, 28, 28), num_rows=60_000)


def measure(model: nn.Sequential, cut: int | str, shape: tuple[int, ...], num_rows: int) -> Traffic:
    blocks = [name for name, _ in model.named_children()]
    split, unsplit = (make_network(model, layout, shape) for layout in (two_party(blocks, cut), whole(blocks)))
    run_pass(unsplit)  # so that there are gradients
    return Traffic(
        num_rows,
        of_row=bytes_of_row(split),
        of_turn={handoff: bytes_of_turn(split, alice=Handoff("reset", handoff)) for handoff in HANDOFFS},
        of_round=bytes_of_turn(unsplit, alice=Average("reset")),
        of_step=bytes_of_turn(unsplit, alice=MeanGradient(), turn="step"),
    )


def make_network(model: nn.Sequential, layout: Layout, shape: tuple[int, ...]) -> SplitNetwork:
    sample = {"x": torch.empty(2, *shape, device="meta"), "y": torch.empty(2, dtype=torch.int64, device="meta")}
    return SplitNetwork(model, layout, sample)


def bytes_of_row(network: SplitNetwork) -> int:
    """One training pass of two rows over the wire, halved."""
    run_pass(network)
    return sum(network.wire.ledger.num_bytes.values()) // 2


def bytes_of_turn(network: SplitNetwork, **schedule: Sharing | str) -> int:
    """The weights or gradients of a round of two Alices over the wire, halved."""
    rounds = Rounds(Schedule(("alice0", "alice1"), **schedule), network)
    for _ in range(2):  # in the first round nobody hands the first Alice anything: the second is what counts
        network.wire.ledger.num_bytes.clear()
        for alice in ("alice0", "alice1"):
            rounds.begin_turn(alice)
            rounds.num_rows = 1
        rounds.end()
    return sum(network.wire.ledger.num_bytes.values()) // 2


def run_pass(network: SplitNetwork) -> None:
    output, labels, tape = network(Batch(torch.arange(2), network.sample, (0, 0)), network.layout.cast("alice0"))
    network.backward(nn.functional.cross_entropy(output, labels), tape)


def splitnn_table(traffic: Traffic) -> str:
    lines = [
        f"SplitNN: {traffic.of_row:,} bytes per image, there and back; {NUM_EPOCHS} epochs of {traffic.num_rows:,} "
        "images. GiB of one client; in brackets with the weights that she hands on.",
        "",
        "| clients | published | meter | |",
        "|---|---|---|---|",
    ]
    for num_clients, figure in zip(CLIENTS, PUBLISHED["SplitNN"], strict=True):
        crosses = NUM_EPOCHS * traffic.of_row * traffic.num_rows / num_clients / GIB
        handed = NUM_EPOCHS * traffic.split(num_clients, "peer") / GIB
        rounded = f"{crosses:.{len(figure.partition('.')[2])}f}"
        lines.append(f"| {num_clients} | {figure} | {rounded} | {crosses:.4f} ({handed:.4f}) |")
    return "\n".join(lines) + "\n"


def baselines_table(traffic: Traffic) -> str:
    """How often the weights must have crossed for the published figures, which the paper does not say."""
    lines = [
        "The baselines: all weights, or their gradients, there and back. The published GiB are so many of these:",
        "",
        "| method | bytes, meter | 100 clients, published | that is | 500 clients, published | that is |",
        "|---|---|---|---|---|---|",
    ]
    units = {"Federated learning": ("rounds", traffic.of_round), "Large-batch SGD": ("steps", traffic.of_step)}
    for method, (unit, num_bytes) in units.items():
        cells = [
            cell for figure in PUBLISHED[method] for cell in (figure, f"{float(figure) * GIB / num_bytes:.1f} {unit}")
        ]
        lines.append(f"| {method} | {num_bytes:,} | {' | '.join(cells)} |")
    equal = NUM_EPOCHS * traffic.of_round / GIB
    return "\n".join(lines) + f"\n\n{NUM_EPOCHS} rounds, one for each epoch of SplitNN, are {equal:.1f} GiB.\n"


def break_even_table(networks: dict[str, Traffic]) -> str:
    lines = [
        "From so many clients on, an epoch of split learning takes fewer bytes than a federated round of one epoch:",
        "",
        "| network | bytes per row | per turn, peer | per turn, server | per round | clients, peer | clients, server |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, traffic in networks.items():
        numbers = [traffic.of_row, *traffic.of_turn.values(), traffic.of_round, *map(traffic.break_even, HANDOFFS)]
        lines.append(f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

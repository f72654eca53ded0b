"""Print the compute table of Vepakomma et al. 2018 (arXiv 1812.00564) by the FLOP meter: `python table.py`.

The network has shapes and no values (torch's meta device), so that nothing is trained and nothing takes memory.
"""

from pathlib import Path

import torch
from torch import nn

from splitlearn.costs.flops import Cost, Meter
from splitlearn.layout import two_party
from splitlearn.models import vgg16
from splitlearn.network import SplitNetwork

RESULTS = Path(__file__).parent / "results"
CLIENTS, NUM_IMAGES = (100, 500), 50_000
NUM_PASSES = 175  # over the images, of SplitNN in the paper's figure, and of all three in its table
BASELINE_PASSES = 6.4  # of the two baselines in the figure
PUBLISHED = {  # TFLOPs of one client
    "Large-batch SGD": ("29.4", "5.89"),
    "Federated learning": ("29.4", "5.89"),
    "SplitNN": ("0.1548", "0.03"),
}


def main() -> None:
    network = make_network()
    tables = [published_rule(network), true_cost(network), what_crosses(network)]
    (RESULTS / "table.md").write_text("\n".join(tables))
    print("\n".join(tables))


def make_network() -> SplitNetwork:
    """VGG-16 for 32x32 with the head of ImageNet, and no batch norm. Alice has the first convolution, without its ReLU.

    So that the cut can fall there, each layer is a block.
    """
    with torch.device("meta"):
        model = vgg16(num_classes=1000, hidden_sizes=(4096, 4096), batch_norm=False)
        sample = {"x": torch.empty(1, 3, 32, 32), "y": torch.empty(1, dtype=torch.int64)}
    layers = nn.Sequential(*(layer for block in model for layer in block))
    layout = two_party([name for name, _ in layers.named_children()], cut=1)
    return SplitNetwork(layers, layout, sample)


def cost_of_image(network: SplitNetwork) -> tuple[Cost, Cost]:
    """What one image costs a client with the first convolution, and one with the whole network."""
    bottom, top = Meter(network, network.wire.ledger).of_pass(1).values()
    return bottom, Cost(bottom.forward + top.forward, bottom.backward + top.backward)


def count_relus(network: SplitNetwork) -> int:
    """How often a ReLU is applied to an element, for one image."""
    x, num_elements = network.sample["x"], 0
    for _, segment in network.program:
        for layer in segment:
            x = layer(x)
            num_elements += x.numel() if isinstance(layer, nn.ReLU) else 0
    return num_elements


def tera(of_image: int, num_clients: int, num_passes: float = NUM_PASSES) -> float:
    """Tera-operations of one client, who has an equal share of the images."""
    return of_image * num_passes * NUM_IMAGES / num_clients / 1e12


def published_rule(network: SplitNetwork) -> str:
    """Forward only; a multiply-add is one operation, a ReLU too."""
    bottom, whole = (cost.forward // 2 for cost in cost_of_image(network))
    lines = [
        f"The paper's rule: {NUM_PASSES} passes, forward only, one operation for each multiply-add and each ReLU; "
        "tera-operations of one client.",
        "",
        "| method | operations per image | 100 clients, published | meter | 500 clients, published | meter |",
        "|---|---|---|---|---|---|",
    ]
    for method, published in PUBLISHED.items():
        operations = bottom if method == "SplitNN" else whole + count_relus(network)
        cells = [method, f"{operations:,}"]
        for num_clients, figure in zip(CLIENTS, published, strict=True):
            cells += [figure, f"{tera(operations, num_clients):.{len(figure.partition('.')[2])}f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def true_cost(network: SplitNetwork) -> str:
    bottom, whole = cost_of_image(network)
    rows = {
        "Large-batch SGD, federated learning": (whole, NUM_PASSES),
        "SplitNN": (bottom, NUM_PASSES),
        "the two baselines as far as the figure shows them": (whole, BASELINE_PASSES),
    }
    lines = [
        "What training costs: forward and backward, two FLOPs for each multiply-add; TFLOPs of one client.",
        "",
        "| method | passes | FLOPs per image, forward | backward | 100 clients | 500 clients |",
        "|---|---|---|---|---|---|",
    ]
    for method, (cost, num_passes) in rows.items():
        spent = [f"{tera(cost.total, num_clients, num_passes):.4g}" for num_clients in CLIENTS]
        lines.append(f"| {method} | {num_passes} | {cost.forward:,} | {cost.backward:,} | {' | '.join(spent)} |")
    return "\n".join(lines) + "\n"


def what_crosses(network: SplitNetwork) -> str:
    """The price of so early a cut: the activation of an image, and its gradient of the same size."""
    tape, _ = network.look(network.sample)
    num_bytes = 2 * tape[0].received.nbytes
    gib = [num_bytes * NUM_PASSES * NUM_IMAGES / num_clients / 2**30 for num_clients in CLIENTS]
    return (
        f"What crosses this cut, both ways: {num_bytes:,} bytes per image, in {NUM_PASSES} passes "
        f"{gib[0]:.1f} GiB per client of {CLIENTS[0]} and {gib[1]:.1f} GiB per client of {CLIENTS[1]}.\n"
    )


if __name__ == "__main__":
    main()

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision import models

from splitlearn.layout import two_party
from splitlearn.models.zoo import cut_up, torchvision
from splitlearn.network import Batch, SplitNetwork
from splitlearn.seeds import derive
from splitlearn.train import build, train
from splitlearn.wire import Wire

# Small ones, each with something of its own: skips, hard-swish in place, concatenation, tuples, attention, no pooling.
MODELS = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "alexnet"]
SIZES = {"squeezenet1_1": 48, "alexnet": 64}  # pixels; what is smaller leaves nothing to pool


def images(name: str) -> Tensor:
    size = SIZES.get(name, 32)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def whole_and_blocks(name: str) -> tuple[nn.Module, nn.Sequential]:
    """torchvision's own model, and the blocks with the same weights."""
    torch.manual_seed(1)
    whole = models.get_model(name, weights=None, num_classes=5)
    torch.manual_seed(1)
    return whole, torchvision(5, name)


def trained_on(whole: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output in training, with what dropout draws from seed 2, and the gradients of its sum of squares."""
    torch.manual_seed(2)
    out = whole.train()(x)
    out.square().sum().backward()
    return out, [p.grad for p in whole.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_cut_at_every_point_at_once_it_equals_torchvisions_own(name):
    x = images(name)
    whole, blocks = whole_and_blocks(name)
    expected, grads = trained_on(whole, x)

    tape, sent = [], x
    torch.manual_seed(2)
    for block in blocks.train():
        received = sent.detach().requires_grad_()  # a leaf: an in-place layer behind the cut would raise
        sent = block(received)
        tape.append((received, sent))
    sent.square().sum().backward()
    for (received, _), (_, before) in zip(tape[:0:-1], tape[-2::-1], strict=True):
        before.backward(received.grad)

    assert torch.equal(sent, expected)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(blocks.parameters(), grads, strict=True))
    assert len(list(blocks.buffers())) == len(list(whole.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(blocks.buffers(), whole.buffers(), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_cut_at_any_one_point_a_split_network_gives_the_same(name):
    x = images(name)
    whole, blocks = whole_and_blocks(name)
    names = [block for block, _ in blocks.named_children()]
    outputs, drawing = [], []
    for cut in names[:-1]:
        layout = two_party(names, cut)
        fields = {"x": x, "y": torch.tensor([0, 1])}
        network = SplitNetwork(copy.deepcopy(blocks), layout, Wire(), fields, seed=3).train()
        batch = Batch(torch.arange(2), fields, (4, 5))
        outputs.append(network(batch, layout.cast("alice0"))[0])
        drawing.append({block for _, segment in network.program for block in segment.drawing})

    dropouts = {"resnet18": set(), "squeezenet1_1": {"features_12_squeeze_activation"}}
    assert all(drawn == dropouts[name] or name == "squeezenet1_1" for drawn in drawing)
    assert all(torch.equal(output, outputs[0]) for output in outputs)

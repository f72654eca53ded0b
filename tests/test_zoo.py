import copy
import re
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from splitlearn.build import build
from splitlearn.layout import two_party
from splitlearn.models.zoo import cut_up, torchvision
from splitlearn.network import Batch, SplitNetwork
from splitlearn.seeds import derive
from splitlearn.train import train

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


@pytest.mark.parametrize("cut", ["features_2", "features_12_squeeze_activation", "classifier_0"])
def test_in_a_split_network_dropout_draws_what_torchvisions_own_draws_from_the_same_seed(cut):
    x = images("squeezenet1_1")
    whole, blocks = whole_and_blocks("squeezenet1_1")
    torch.manual_seed(derive(3, "draw", "classifier_0", 4, 5))  # its only dropout ends this block
    expected = whole.train()(x)

    layout = two_party([name for name, _ in blocks.named_children()], cut)
    fields = {"x": x, "y": torch.tensor([0, 1])}
    network = SplitNetwork(blocks, layout, fields, seed=3).train()
    output, _, tape = network(Batch(torch.arange(2), fields, (4, 5)), layout.cast("alice0"))
    assert len(tape) == 1
    assert torch.equal(output, expected)


def test_resnet18_is_cut_between_its_units_and_never_inside_one():
    units = [f"layer{i}_{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert names_of(torchvision(5, "resnet18")) == ["conv1", "maxpool", *units[:-1], "avgpool", "fc"]


def test_a_transformer_is_cut_between_its_residual_sums():
    blocks = torchvision(5, "vit_b_16", image_size=32, attention_dropout=0.1)
    sums = [f"encoder_layers_encoder_layer_{i}{part}" for i in range(12) for part in ("_dropout", "")]
    assert names_of(blocks) == ["conv_proj", "cat", "encoder_dropout", *sums, "encoder", "heads_head"]


def test_blocks_can_be_copied_and_kept_as_weights(tmp_path):
    torch.manual_seed(0)
    blocks, other = torchvision(5, "resnet18").eval(), torchvision(5, "resnet18").eval()
    torch.save(blocks.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    twin, expected = copy.deepcopy(blocks), blocks(images("resnet18"))
    with torch.no_grad():
        for p in blocks.parameters():
            p.zero_()
    assert torch.equal(other(images("resnet18")), expected)
    assert torch.equal(twin(images("resnet18")), expected)


def test_pretrained_weights_are_loaded_but_for_the_classes(monkeypatch):
    torch.manual_seed(7)
    trained = models.resnet18().state_dict()  # 1,000 classes
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", lambda self, **_: trained)
    blocks = torchvision(5, "resnet18", weights="IMAGENET1K_V1")
    assert torch.equal(blocks.conv1.conv1.weight, trained["conv1.weight"])
    assert torch.equal(blocks.maxpool.bn1.running_var, trained["bn1.running_var"])
    assert blocks.fc.fc.weight.shape == (5, 512)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As DenseNets were published: torchvision's own builder knows the old names."""
    kept = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", name): value for name, value in kept.items()}


@pytest.mark.parametrize(
    ("name", "published", "kwargs"),
    [("densenet121", renamed, {}), ("inception_v3", dict, {"aux_logits": False}), ("resnet18", dict, {})],
)
def test_a_pretrained_model_is_the_one_that_torchvision_makes(name, published, kwargs, monkeypatch):
    """Inception, when pretrained, transforms its input as well."""
    torch.manual_seed(7)
    quick = {"init_weights": False} if name == "inception_v3" else {}
    state = published(models.get_model(name, weights=None, **quick).state_dict())
    monkeypatch.setattr(models.get_model_weights(name), "get_state_dict", lambda self, **_: dict(state))
    whole = models.get_model(name, weights="DEFAULT").eval()
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(torchvision(1000, name, weights="DEFAULT", **kwargs).eval()(x), whole(x))


class Net(nn.Module):
    """Two linear layers, and whatever happens to what is between them and behind."""

    def __init__(self, between=lambda x: x, behind=lambda x: x) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.between, self.behind = between, behind

    def forward(self, x):
        return self.behind(self.second(self.between(self.first(x))))


class WrittenAndRead(Net):
    """The sum reads what ReLU wrote in place: behind ReLU one tensor is alive."""

    def forward(self, x):
        x = self.first(x)
        return self.second(self.relu(x) * 2) + x


class Attribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x):
        return self.second(self.first(x)) * self.scale


class Skip(Net):
    def forward(self, x):
        return self.second(self.first(x)) + x


class Twice(Net):
    """The first layer's weights are used again at the end."""

    def forward(self, x):
        return self.first(self.second(self.first(x)))


def sum_of_halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.cat([a + b, a], dim=1)


def scaled_in_place(x: Tensor) -> Tensor:
    x.mul_(3)  # the result is thrown away, what was written is not
    return x


def added_in_place(x: Tensor) -> Tensor:
    x += 1
    return x


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Net(), ["first", "second"]),
        (Net(lambda x: F.relu(x, inplace=True)), ["first", "second"]),
        (Net(scaled_in_place, scaled_in_place), ["first", "second"]),
        (Net(added_in_place, added_in_place), ["first", "second"]),
        (Net(torch.relu_, torch.relu_), ["first", "second"]),
        (Net(sum_of_halves), ["first", "second"]),
        (Net(behind=lambda x: x.flatten(1)), ["first", "second"]),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), ["2", "3"]),
        (WrittenAndRead(), ["relu", "second"]),
        (Attribute(), ["first", "second", "mul"]),
    ],
)
def test_whatever_is_written_in_place_the_blocks_equal_the_whole(model, names):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(model)
    expected = model(x)
    blocks = cut_up(model, "net")
    assert names_of(blocks) == names
    for block in blocks:
        received = x.detach().requires_grad_()
        kept = received.clone()
        x = block(received)
        assert torch.equal(received, kept)
    assert torch.equal(x, expected)


def test_two_modules_of_nearly_one_name_are_two_blocks():
    inner = nn.Sequential(OrderedDict(b=nn.Linear(4, 4)))
    model = nn.Sequential(OrderedDict(a=inner, a_b=nn.Linear(4, 4)))
    assert names_of(cut_up(model, "net")) == ["a_b", "a_b_1"]


class Branches(Net):
    def forward(self, x):
        return self.first(x) if x.sum() > 0 else self.second(x)


class Auxiliary(Net):
    def forward(self, x):
        y = self.first(x)
        return (self.second(y), y) if self.training else self.second(y)


class Pair(Net):
    def forward(self, x):
        y = self.first(x)
        return self.second(y), y


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Branches(), "cannot be traced by torch.fx .*model=custom"),
        (Auxiliary(), "does something else in training .*aux_logits=false"),
        (Pair(), "must return one tensor"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU()), "has no cut"),
        (Skip(), "has no cut: nowhere between two of its layers is just one tensor alive"),
        (Twice(), "has no cut"),
    ],
)
def test_a_model_without_a_cut_says_why(model, words):
    with pytest.raises(ValueError, match=rf"`model.name` \(=net\) {words}"):
        cut_up(model, "net")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet81"}, r"`model.name` \(=resnet81\) is no classification model .*: .*resnet18"),
        ({"name": "fasterrcnn_resnet50_fpn"}, "is no classification model"),
        ({"name": "resnet18", "weights": "BEST"}, r"`model.weights` \(=BEST\) of resnet18 .*DEFAULT, IMAGENET1K_V1"),
        ({"name": "resnet18", "num_classes": 1}, r"`num_classes` \(=1\) must be at least 2"),
    ],
)
def test_an_unknown_name_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        torchvision(**{"num_classes": 5, **settings})


@pytest.mark.usefixtures("few_cifar")
def test_a_torchvision_model_trains_split_from_the_command_line(configure):
    tiny = (
        "data.batch_size=4",
        "data.eval_batch_size=4",
        "trainer.limit_val_batches=1",
        "trainer.limit_test_batches=1",
    )
    few = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "logger=none", "trainer.enable_checkpointing=false")
    cfg = configure(
        "data=cifar10", "model=torchvision", "model.name=squeezenet1_1", "layout.cut=features_5", *tiny, *few
    )
    assert 0 <= train(cfg) <= 1


def test_one_channel_is_refused_with_the_block_and_the_shape(configure):
    with pytest.raises(ValueError, match=r"block `conv1` does not fit its input of shape 1x8x8 .*3 channels"):
        build(configure("model=torchvision"))


def names_of(blocks: nn.Sequential) -> list[str]:
    return [name for name, _ in blocks.named_children()]

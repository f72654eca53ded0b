import math
import re
import warnings
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.flop_counter import FlopCounterMode

from splitlearn.models import lenet, mlp, resnet18, resnet50, vgg11, vgg16
from splitlearn.models.layers import HeConv2d

# name: (model, shape of one sample, names of the blocks)
FC = ["fc1", "fc2", "head"]
LAYERS = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
MODELS = {
    "mlp": (mlp, (1, 28, 28), ["hidden1", "hidden2", "head"]),
    "lenet": (lenet, (1, 8, 8), ["conv1", "conv2", *FC]),
    "vgg11": (vgg11, (3, 32, 32), [f"conv{i}" for i in range(1, 9)] + FC),
    "vgg16": (vgg16, (3, 32, 32), [f"conv{i}" for i in range(1, 14)] + FC),
    "resnet18": (resnet18, (3, 8, 8), LAYERS),
    "resnet18-224": (partial(resnet18, stem=224), (3, 32, 32), LAYERS),
    "resnet50": (resnet50, (3, 8, 8), LAYERS),
}
every_model = pytest.mark.parametrize(("model", "shape", "names"), MODELS.values(), ids=MODELS)
# One model for each kind of block: the forward passes are what takes the time here.
KINDS = ["mlp", "lenet", "vgg11", "resnet18-224", "resnet50"]
every_kind = pytest.mark.parametrize(("model", "shape"), [MODELS[name][:2] for name in KINDS], ids=KINDS)


def materialised(model: nn.Sequential, shape: tuple[int, ...], device: str = "cpu") -> nn.Sequential:
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape, device=device))
    return model


def on_meta(model, shape: tuple[int, ...], **knobs) -> nn.Sequential:
    with torch.device("meta"):
        return materialised(model(**knobs), shape, "meta")


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device="meta"))
    return counter.get_total_flops() // 2  # it counts a multiplication and an addition as two


@every_model
def test_the_blocks_have_these_names(model, shape, names):
    assert [name for name, _ in model(10).named_children()] == names


def test_an_mlp_has_a_block_for_each_hidden_size():
    assert [name for name, _ in mlp(10, hidden_sizes=(3, 4, 5)).named_children()] == [
        "hidden1",
        "hidden2",
        "hidden3",
        "head",
    ]
    softmax_regression = materialised(mlp(10, hidden_sizes=()), (1, 8, 8))
    assert [name for name, _ in softmax_regression.named_children()] == ["head"]
    assert num_parameters(softmax_regression) == 64 * 10 + 10


def test_the_mlp_is_that_of_the_tutorial():
    layers = [type(module) for module in materialised(mlp(10), (1, 28, 28)).modules()][1:]
    block = [nn.Sequential, nn.Linear, nn.ReLU]
    assert layers == [nn.Sequential, nn.Flatten, nn.Linear, nn.ReLU, *block, nn.Sequential, nn.Linear, nn.LogSoftmax]
    assert num_parameters(on_meta(mlp, (1, 28, 28), num_classes=10)) == 785 * 128 + 129 * 640 + 641 * 10


def test_an_mlp_gives_log_probabilities():
    torch.manual_seed(0)
    log_probabilities = materialised(mlp(10), (1, 8, 8))(torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(log_probabilities.exp().sum(dim=1), torch.ones(4))


def test_dropout_follows_each_hidden_layer_or_is_absent():
    dropped = [name for name, module in mlp(10, dropout=0.2).named_modules() if isinstance(module, nn.Dropout)]
    assert dropped == ["hidden1.3", "hidden2.2"]
    assert not any(isinstance(module, nn.Dropout) for module in mlp(10).modules())


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (mlp, (1, 28, 28)),
        (mlp, (17,)),
        *[(lenet, shape) for shape in [(1, 8, 8), (1, 28, 28), (3, 32, 32)]],
        *[(vgg, shape) for vgg in (vgg11, vgg16) for shape in [(3, 32, 32), (3, 224, 224)]],
        *[(resnet, shape) for resnet in (resnet18, resnet50) for shape in [(1, 8, 8), (3, 32, 32)]],
        *[(partial(resnet, stem=224), (3, 224, 224)) for resnet in (resnet18, resnet50)],
    ],
)
def test_the_output_has_a_score_for_each_class(model, shape):
    network = on_meta(model, shape, num_classes=7)
    assert network(torch.zeros(2, *shape, device="meta")).shape == (2, 7)


@every_kind
def test_at_every_cut_the_halves_equal_the_whole(model, shape):
    torch.manual_seed(0)
    whole = materialised(model(10), shape)
    x = torch.randn(2, *shape)
    expected = whole(x)
    assert expected.isfinite().all()
    for cut in range(1, len(whole)):
        sent = whole[:cut](x)
        received = sent.detach().requires_grad_()  # a leaf: an in-place layer behind the cut would raise
        assert torch.equal(whole[cut:](received), expected)


@every_model
def test_no_layer_works_in_place(model, shape, names):
    assert not any(getattr(module, "inplace", False) for module in model(10).modules())


@every_kind
def test_the_weights_of_a_block_do_not_depend_on_the_other_blocks(model, shape):
    x = torch.zeros(1, *shape)
    with torch.no_grad():
        for seed, block in enumerate(model(10).eval()):
            torch.manual_seed(seed)
            y = block(x)
            alone = model(10).eval()[seed]
            torch.manual_seed(seed)
            alone(torch.ones_like(x))
            assert all(map(torch.equal, block.state_dict().values(), alone.state_dict().values()))
            x = y


def test_building_draws_no_random_numbers():
    before = torch.get_rng_state()
    for model, _, _ in MODELS.values():
        model(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_does_not_warn(monkeypatch):
    def init_of_older_torch(module, *args, **kwargs):
        init(module, *args, **kwargs)
        warnings.warn("Lazy modules are a new feature under heavy development", stacklevel=2)

    init = LazyModuleMixin.__init__
    monkeypatch.setattr(LazyModuleMixin, "__init__", init_of_older_torch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, _, _ in MODELS.values():
            model(10)
        with pytest.raises(UserWarning):
            nn.LazyLinear(10)


def test_a_convolution_is_an_ordinary_one_with_the_init_of_he():
    torch.manual_seed(0)
    conv = HeConv2d(64, 3)
    conv(torch.zeros(1, 32, 8, 8))
    assert type(conv) is nn.Conv2d
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert not conv.bias.any()


def test_vgg_without_batch_norm_still_tells_images_apart():
    torch.manual_seed(0)
    network = materialised(vgg16(10, batch_norm=False), (3, 32, 32))
    features = network[:13](torch.randn(2, 3, 32, 32)).flatten(start_dim=1)
    # How far two images are apart after the last convolution: 5e-3 here, 4e-7 with torch's default init.
    assert features.std(dim=0).mean() > 1e-3


def test_vgg16_has_the_macs_of_the_2018_tables():
    network = on_meta(vgg16, (3, 32, 32), num_classes=1000, hidden_sizes=(4096, 4096), batch_norm=False)
    assert macs(network, (3, 32, 32)) == 336_166_912
    assert macs(network.conv1, (3, 32, 32)) == 1_769_472


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("vgg", [vgg11, vgg16])
def test_at_224_vgg_has_the_weights_of_torchvision(vgg, batch_norm):
    ours = on_meta(vgg, (3, 224, 224), num_classes=1000, hidden_sizes=(4096, 4096), batch_norm=batch_norm)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, vgg.__name__ + "_bn" * batch_norm)()
    assert [w.shape for w in ours.state_dict().values()] == [w.shape for w in theirs.state_dict().values()]


def test_resnet50_has_the_weights_and_the_cut_of_the_2018_tables():
    network = on_meta(resnet50, (3, 32, 32), num_classes=100, stem=224)
    assert num_parameters(network) == 23_712_932
    assert network.stem(torch.zeros(1, 3, 32, 32, device="meta")).shape == (1, 64, 16, 16)


@pytest.mark.parametrize("resnet", [resnet18, resnet50])
def test_at_224_resnet_has_the_weights_of_torchvision(resnet):
    ours = on_meta(resnet, (3, 224, 224), num_classes=1000, stem=224)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, resnet.__name__)()
    assert num_parameters(ours) == num_parameters(theirs)


def test_resnet18_equals_that_of_torchvision():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    ours = materialised(resnet18(10, stem=224), (3, 64, 64))
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(resnet18, 10, stem=64), "`stem` (=64) must be 32 (3x3, stride 1) or 224 (7x7, stride 2 and pooling)"),
        (partial(mlp, 10, hidden_sizes=(8, 0)), "`hidden_sizes` (=[8, 0]) must all be at least 1"),
        (partial(vgg16, 10, dropout=1.0), "`dropout` (=1.0) must be in [0, 1)"),
        (partial(mlp, 10, dropout=-0.1), "`dropout` (=-0.1) must be in [0, 1)"),
        *[(partial(model, 1), "`num_classes` (=1) must be at least 2") for model, _, _ in MODELS.values()],
    ],
)
def test_a_wrong_knob_is_refused_with_the_rule(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()

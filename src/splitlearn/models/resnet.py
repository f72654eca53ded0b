"""ResNet.

He et al., "Deep Residual Learning for Image Recognition", 2015. As in torchvision, the bottleneck has its stride in
the 3x3 convolution, where the paper has it in the first 1x1.

(N, C, H, W) in, (N, num_classes) logits out. Blocks `stem`, `layer1` to `layer4`, `head`. `stem` is the image size
that the stem is made for: 32 is a 3x3 convolution (CIFAR), 224 is 7x7 with stride 2 and a pooling (ImageNet). The
pooling opens `layer1`, so that a cut after `stem` lies before it: 64x16x16 of a 32x32 image.
"""

from collections.abc import Callable

from torch import Tensor, nn

from splitlearn.models.layers import HeConv2d, check_num_classes, in_order, lazily


def resnet18(num_classes: int, stem: int = 32) -> nn.Sequential:
    """Layers of 2, 2, 2, 2 basic units. ValueError if `num_classes` is below 2 or `stem` is not 32 or 224."""
    return _resnet(num_classes, stem, (2, 2, 2, 2), _basic, expansion=1)


def resnet50(num_classes: int, stem: int = 32) -> nn.Sequential:
    """Layers of 3, 4, 6, 3 bottleneck units. ValueError if `num_classes` is below 2 or `stem` is not 32 or 224."""
    return _resnet(num_classes, stem, (3, 4, 6, 3), _bottleneck, expansion=4)


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), for x of shape (N, C, H, W)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


Body = Callable[[int, int], nn.Sequential]  # (width, stride) -> what a unit adds to its shortcut


@lazily()
def _resnet(num_classes: int, stem: int, num_units: tuple[int, ...], body: Body, expansion: int) -> nn.Sequential:
    check_num_classes(num_classes)
    if stem not in (32, 224):
        raise ValueError(f"`stem` (={stem}) must be 32 (3x3, stride 1) or 224 (7x7, stride 2 and pooling)")
    first = _conv_bn(64, 3) if stem == 32 else _conv_bn(64, 7, stride=2)
    blocks = {"stem": nn.Sequential(*first, nn.ReLU())}
    for i, units in enumerate(num_units):
        blocks[f"layer{i + 1}"] = _layer(body, 64 * 2**i, units, stride=2 if i > 0 else 1, expansion=expansion)
    if stem == 224:
        blocks["layer1"].insert(0, nn.MaxPool2d(3, stride=2, padding=1))
    blocks["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes))
    return in_order(blocks)


def _layer(body: Body, width: int, units: int, stride: int, expansion: int) -> nn.Sequential:
    """The first unit alone changes the shape; where it does, its shortcut is a projection."""
    changes = stride > 1 or expansion > 1
    shortcut = nn.Sequential(*_conv_bn(width * expansion, 1, stride)) if changes else nn.Identity()
    rest = [Residual(body(width, 1), nn.Identity()) for _ in range(units - 1)]
    return nn.Sequential(Residual(body(width, stride), shortcut), *rest)


def _basic(width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_conv_bn(width, 3, stride), nn.ReLU(), *_conv_bn(width, 3))


def _bottleneck(width: int, stride: int) -> nn.Sequential:
    squeeze = _conv_bn(width, 1)
    return nn.Sequential(*squeeze, nn.ReLU(), *_conv_bn(width, 3, stride), nn.ReLU(), *_conv_bn(4 * width, 1))


def _conv_bn(width: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return HeConv2d(width, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(width)

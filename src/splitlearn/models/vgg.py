"""VGG.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014, configurations A
and D. The first linear layer takes what the last pooling leaves, 512x1x1 of a 32x32 image and 512x7x7 of a 224x224
one, so there is no pooling to 7x7, which at 32x32 would only repeat one pixel.

(N, C, H, W) in, H and W at least 32; (N, num_classes) logits out.
"""

from collections.abc import Sequence

from torch import nn

from splitlearn.models.layers import HeConv2d, dense_blocks, in_order, lazily

# Widths of the convolutions, in the groups that end in a pooling.
Plan = tuple[tuple[int, ...], ...]
VGG11: Plan = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16: Plan = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg11(
    num_classes: int, hidden_sizes: Sequence[int] = (512, 512), batch_norm: bool = True, dropout: float = 0.5
) -> nn.Sequential:
    """Blocks `conv1` to `conv8`, `fc1`, `fc2`, ..., `head`; the rest as `vgg16`."""
    return _vgg(VGG11, num_classes, hidden_sizes, batch_norm, dropout)


def vgg16(
    num_classes: int, hidden_sizes: Sequence[int] = (512, 512), batch_norm: bool = True, dropout: float = 0.5
) -> nn.Sequential:
    """Blocks `conv1` to `conv13`, `fc1`, `fc2`, ..., `head`; a pooling belongs to the convolution before it.

    The defaults are for CIFAR, as it is usually done: of a 32x32 image 512 features are left, so the linear layers
    are 512 wide (with the paper's 4096 they would outweigh all convolutions), and the convolutions have batch
    normalisation. The paper's own network is `hidden_sizes=(4096, 4096), batch_norm=False`.

    ValueError if `num_classes` is below 2, a size is below 1, or `dropout` is not in [0, 1).
    """
    return _vgg(VGG16, num_classes, hidden_sizes, batch_norm, dropout)


@lazily()
def _vgg(plan: Plan, num_classes: int, hidden_sizes: Sequence[int], batch_norm: bool, dropout: float) -> nn.Sequential:
    convs: dict[str, nn.Sequential] = {}
    for group in plan:
        for width in group:
            name = f"conv{len(convs) + 1}"
            convs[name] = _conv(width, batch_norm)
        convs[name].append(nn.MaxPool2d(2))
    return in_order(convs | dense_blocks("fc", hidden_sizes, num_classes, dropout))


def _conv(width: int, batch_norm: bool) -> nn.Sequential:
    norm = [nn.BatchNorm2d(width)] if batch_norm else []
    return nn.Sequential(HeConv2d(width, 3, padding=1), *norm, nn.ReLU())

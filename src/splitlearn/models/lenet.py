"""LeNet-5."""

from torch import nn

from splitlearn.models.layers import HeConv2d, dense_blocks, in_order, lazily


@lazily()
def lenet(num_classes: int) -> nn.Sequential:
    """LeNet-5: blocks `conv1`, `conv2`, `fc1`, `fc2`, `head`.

    LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998, in today's form: ReLU and max
    pooling, `conv2` sees every map of `conv1`, and both pad, so that even digits of 8x8 pixels fit.
    (N, C, H, W) in, (N, num_classes) logits out. ValueError if `num_classes` is below 2.
    """
    convs = {"conv1": _conv(6), "conv2": _conv(16)}
    return in_order(convs | dense_blocks("fc", (120, 84), num_classes))


def _conv(width: int) -> nn.Sequential:
    return nn.Sequential(HeConv2d(width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))

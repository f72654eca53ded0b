"""The network of PySyft's tutorial."""

from collections.abc import Sequence

from torch import nn

from splitlearn.models.layers import dense_blocks, in_order, lazily


@lazily()
def mlp(num_classes: int, hidden_sizes: Sequence[int] = (128, 640), dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU: blocks `hidden1`, `hidden2`, ..., `head`.

    The defaults are those of PySyft's "Introduction to SplitNN". (N, ...) in, (N, num_classes) log-probabilities out:
    it ends in LogSoftmax, as there, and pairs with NLLLoss. ValueError if `num_classes` is below 2, a size is
    below 1, or `dropout` is not in [0, 1).
    """
    blocks = dense_blocks("hidden", hidden_sizes, num_classes, dropout)
    blocks["head"].append(nn.LogSoftmax(dim=1))
    return in_order(blocks)

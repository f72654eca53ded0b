"""What the models are made of, and what each of them is checked for.

Every layer that has a size to infer is one of torch's lazy modules: it takes its input size, and draws its weights,
at its first forward pass. So a block needs to know nothing of its neighbours, and materialised under a seed of its own
it has the same weights wherever the network is cut. Materialise in eval mode: BatchNorm would take the dummy batch
into its statistics.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn


class HeConv2d(nn.LazyConv2d):
    """A convolution with He's normal init by fan-out and zero biases; `nn.Conv2d` once it is materialised.

    Kaiming He et al., "Delving Deep into Rectifiers", 2015. With torch's default init VGG without batch normalisation
    does not train.
    """

    def reset_parameters(self) -> None:
        if self.in_channels == 0:  # called by the constructor, before there is anything to draw
            return
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@contextmanager
def lazily() -> Iterator[None]:
    """Build without the warning of older torch that lazy modules are new; also a decorator."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature", UserWarning)
        yield


def in_order(blocks: Mapping[str, nn.Module]) -> nn.Sequential:
    """The model of these named blocks."""
    return nn.Sequential(OrderedDict[str, nn.Module](blocks))


def dense_blocks(
    prefix: str, hidden_sizes: Sequence[int], num_classes: int, dropout: float = 0.0
) -> dict[str, nn.Sequential]:
    """Blocks `{prefix}1`, `{prefix}2`, ... with ReLU, and a linear `head`; the first of them flattens its input.

    (N, ...) in, (N, num_classes) logits out. ValueError if `num_classes` is below 2, a size is below
    1, or `dropout` is not in [0, 1).
    """
    _check(hidden_sizes, num_classes, dropout)
    blocks = {}
    flatten: list[nn.Module] = [nn.Flatten()]
    for number, size in enumerate(hidden_sizes, start=1):
        block = nn.Sequential(*flatten, nn.LazyLinear(size), nn.ReLU())
        blocks[f"{prefix}{number}"] = block.append(nn.Dropout(dropout)) if dropout else block
        flatten = []
    blocks["head"] = nn.Sequential(*flatten, nn.LazyLinear(num_classes))
    return blocks


def _check(hidden_sizes: Sequence[int], num_classes: int, dropout: float) -> None:
    check_num_classes(num_classes)
    if any(size < 1 for size in hidden_sizes):
        raise ValueError(f"`hidden_sizes` (={list(hidden_sizes)}) must all be at least 1; leave out a size to drop it")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` (={dropout}) must be in [0, 1), the fraction that is dropped; 0 turns it off")


def check_num_classes(num_classes: int) -> None:
    """ValueError if there are fewer than two classes."""
    if num_classes < 2:
        raise ValueError(f"`num_classes` (={num_classes}) must be at least 2; for yes or no take two classes")

"""What each cut of a model would cost, and what it would let out: Alice has the data and the blocks before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from splitlearn.blocks import fresh, memory_of
from splitlearn.costs.flops import cost_of
from splitlearn.costs.leakage import distance_correlation
from splitlearn.segment import evaluating

LABEL = 8  # bytes: an int64


class Terms(NamedTuple):
    """How a run is arranged, as far as it costs.

    `shards` has the number of training rows of each Alice, `turn` is that of the schedule, `transfers` how often the
    bottom's weights cross for a turn; `labels`: whether they cross; `local_epochs` are the passes of an Alice over her
    rows in an epoch, `share` is that of the Alices who take part in it; `seconds` tells how long so many bytes take.
    """

    shards: Sequence[int]
    batch_size: int
    turn: int | str = "epoch"
    transfers: int = 0
    labels: bool = False
    seconds: Callable[[int], float] | None = None
    local_epochs: int = 1
    share: float = 1.0

    def each_way(self, sample_bytes: int, returns: bool) -> tuple[int, int]:
        """Bytes of a sample that go up, and that come back where its gradient `returns`."""
        return sample_bytes + LABEL * self.labels, sample_bytes * returns

    def messages(self, sample_bytes: int, bottom_bytes: int, returns: bool = True) -> Iterator[tuple[int, int]]:
        """(how many, of so many bytes each), in an epoch in which every Alice takes part.

        Labels go with what is sent up: `splitlearn.costs.timeline` takes for one message what a party sends in a row.
        """
        most = math.ceil(max(self.shards) / self.batch_size) * self.local_epochs
        for num_rows in self.shards:
            num_batches = math.ceil(num_rows / self.batch_size)
            last = num_rows - (num_batches - 1) * self.batch_size
            for count, size in ((num_batches - 1, self.batch_size), (1, last)):
                for num_bytes in filter(None, self.each_way(sample_bytes, returns)):
                    yield count * self.local_epochs, size * num_bytes
            num_batches *= self.local_epochs
            turn = int({"epoch": num_batches, "step": 1}.get(str(self.turn), self.turn))
            yield self.transfers * math.ceil(num_batches / turn), bottom_bytes
            # Who has fewer mini-batches misses the last steps, and is sent the weights when she next takes part.
            if self.turn == "step" and self.transfers and num_batches < most:
                yield 1, bottom_bytes


class Block(NamedTuple):
    """What a block adds to Alice's side, weights with buffers, FLOPs a sample; and what crosses behind it a sample.

    `returns`: whether a gradient comes back, which nobody wants unless something up to here is trained. `tied`: whether
    a weight up to here is used behind, too, so that no cut may fall here. Its first place counts it.
    """

    name: str
    parameters: int
    weight_bytes: int
    flops: int
    elements: int
    sample_bytes: int
    leakage: float | None
    returns: bool
    tied: bool = False


class Cut(NamedTuple):
    """A cut behind the block `name`.

    Parameters and FLOPs (of a sample, forward and backward) are Alice's, shares are of the whole model's; elements and
    bytes those of a sample, one way; an epoch's are those expected where not all take part. `break_even_...` is the
    least number of Alices for whom an epoch of split learning with weights handed on peer to peer, or by way of the
    server, takes fewer bytes than a round of FedAvg.
    """

    name: str
    parameters: int
    parameter_share: float
    flops: int
    flop_share: float
    elements: int
    sample_bytes: int
    epoch_bytes: int
    epoch_seconds: float | None
    break_even_peer: float
    break_even_server: float
    leakage: float | None


def measure(blocks: nn.Sequential, x: Tensor, is_real: bool = True) -> list[Block]:
    """Run the rows x [N, ...] through named blocks, in evaluation mode. Of real ones, the leakage is taken."""
    measured, inputs, wants, seen = list[Block](), x, False, set[int]()
    held = [[*block.parameters(), *block.buffers()] for block in blocks]
    with torch.no_grad(), evaluating(blocks):
        for i, (name, block) in enumerate(blocks._modules.items()):
            flops = cost_of(block, [x[:2]], wants).total // 2  # of two rows: batch norm cannot train on one
            wants = wants or any(p.requires_grad for p in block.parameters())
            x = block(x)
            new = fresh(held[i], seen)
            parameters = sum(value.numel() for value in new if isinstance(value, nn.Parameter))
            weight_bytes = sum(value.nbytes for value in new)
            tied = any(memory_of(value) in seen for behind in held[i + 1 :] for value in behind)
            leakage = distance_correlation(inputs, x) if is_real else None
            measured.append(
                Block(name, parameters, weight_bytes, flops, x[0].numel(), x[0].nbytes, leakage, wants, tied)
            )
    return measured


def compare(blocks: Sequence[Block], terms: Terms) -> list[Cut]:
    """A line for each cut that may be. Raises ValueError where there is none."""
    if len(blocks) < 2:
        raise ValueError(
            f"`model` has one block ({blocks[0].name}) and nothing to cut, since a cut falls between two: return an "
            "nn.Sequential of several named blocks"
        )
    cuts = [_cut(blocks[: i + 1], blocks, terms) for i in range(len(blocks) - 1) if not blocks[i].tied]
    if not cuts:
        raise ValueError("`model` has weights that are tied across every cut: untie them (a clone for each block)")
    return cuts


def break_even(crossing: int, bottom_bytes: int, model_bytes: int, transfers: int) -> float:
    """The least whole K with crossing + transfers K bottom < 2 K model, all in bytes; infinite where there is none.

    Thapa et al. 2022 (arXiv 2004.12088), Table 1, with 2 transfers of a bottom an epoch; Singh et al. 2019
    (arXiv 1909.09145) with 1.
    """
    saved = 2 * model_bytes - transfers * bottom_bytes
    return crossing // saved + 1 if saved > 0 else math.inf


def _cut(bottom: Sequence[Block], blocks: Sequence[Block], terms: Terms) -> Cut:
    last = bottom[-1]
    parameters, flops, weight_bytes = _add_up(bottom)
    all_parameters, all_flops, model_bytes = _add_up(blocks)
    messages = list(terms.messages(last.sample_bytes, weight_bytes, last.returns))
    # Who takes no part saves both sides of the break-even as much, so the share falls out of it.
    crossing = sum(terms.shards) * terms.local_epochs * sum(terms.each_way(last.sample_bytes, last.returns))
    return Cut(
        last.name,
        parameters,
        parameters / max(all_parameters, 1),
        flops,
        flops / max(all_flops, 1),
        last.elements,
        last.sample_bytes,
        round(terms.share * sum(count * size for count, size in messages)),
        terms.share * sum(count * terms.seconds(size) for count, size in messages) if terms.seconds else None,
        break_even(crossing, weight_bytes, model_bytes, transfers=1),
        break_even(crossing, weight_bytes, model_bytes, transfers=2),
        last.leakage,
    )


def _add_up(blocks: Sequence[Block]) -> tuple[int, int, int]:
    """Parameters, FLOPs and bytes of weights."""
    return sum(b.parameters for b in blocks), sum(b.flops for b in blocks), sum(b.weight_bytes for b in blocks)

"""Who gets which samples: pure functions of (labels, number of parties, seed)."""

from __future__ import annotations

import torch
from torch import Tensor

from splitlearn.seeds import derive


def iid(labels: Tensor, num_shards: int, seed: int) -> list[Tensor]:
    """Deal the rows of `labels` [N] at random into `num_shards` shards whose sizes differ by at most one.

    Returns sample indices, int64. Raises ValueError when a shard would be empty.
    """
    if not 1 <= num_shards <= len(labels):
        raise ValueError(
            f"`num_alices` (={num_shards}) must lie between 1 and the number of training samples (={len(labels)}): "
            "no shard may be empty"
        )
    generator = torch.Generator().manual_seed(derive(seed, "partition"))
    return list(torch.randperm(len(labels), generator=generator).tensor_split(num_shards))

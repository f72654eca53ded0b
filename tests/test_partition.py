"""Every row goes to exactly one party."""

import re

import pytest
import torch

from splitlearn.partition import iid


@pytest.mark.parametrize(("num_rows", "num_shards", "sizes"), [(10, 3, [4, 3, 3]), (5, 5, [1] * 5), (4, 1, [4])])
def test_shards_cover_every_row_once_and_differ_by_at_most_one(num_rows, num_shards, sizes):
    shards = iid(torch.zeros(num_rows), num_shards, seed=0)
    assert [len(shard) for shard in shards] == sizes
    assert sorted(torch.cat(shards).tolist()) == list(range(num_rows))


def test_the_seed_decides():
    first, again, other = (torch.cat(iid(torch.zeros(50), 5, seed)).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert first != sorted(first)


@pytest.mark.parametrize("num_shards", [0, -1, 4])
def test_no_shard_may_be_empty(num_shards):
    rule = "must lie between 1 and the number of training samples (=3): no shard may be empty"
    with pytest.raises(ValueError, match="^" + re.escape(f"`num_alices` (={num_shards}) {rule}") + "$"):
        iid(torch.zeros(3), num_shards, seed=0)

"""Random crops and flips of whole batches, against a loop over samples with the same draws."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from splitlearn.data.augment import crop_and_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_by_one(x: Tensor, draws: torch.Generator, padding: int) -> Tensor:
    n, _, h, w = x.shape
    top, left = (torch.randint(2 * padding + 1, (n,), generator=draws).tolist() for _ in range(2))
    flip = torch.randint(2, (n,), generator=draws).tolist()
    rows = []
    for i in range(n):
        crop = F.pad(x[i], (padding,) * 4)[:, top[i] : top[i] + h, left[i] : left[i] + w]
        rows.append(crop.flip(2) if flip[i] else crop)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_equals_a_loop_over_samples_to_the_bit(dtype, padding):
    x = torch.randint(256, (37, 3, 6, 9), generator=generator(1)).to(dtype)
    out = crop_and_flip(x, generator(), padding)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert torch.equal(out, one_by_one(x, generator(), padding))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_changes_no_bit():
    x = torch.rand(16, 3, 8, 8, generator=generator(1))
    assert torch.equal(crop_and_flip(x.cuda(), generator()).cpu(), crop_and_flip(x, generator()))


def test_same_seed_same_bits_and_another_seed_others():
    x = torch.rand(16, 3, 8, 8, generator=generator(1))
    assert torch.equal(crop_and_flip(x, generator(7)), crop_and_flip(x, generator(7)))
    assert not torch.equal(crop_and_flip(x, generator(7)), crop_and_flip(x, generator(8)))


def test_the_next_batch_draws_anew():
    x, draws = torch.rand(16, 3, 8, 8, generator=generator(1)), generator()
    assert not torch.equal(crop_and_flip(x, draws), crop_and_flip(x, draws))


def test_without_padding_it_only_flips():
    x = torch.rand(200, 1, 3, 3, generator=generator(1))
    out = crop_and_flip(x, generator(), padding=0)
    flipped = (out == x.flip(3)).flatten(1).all(1)
    assert torch.equal(out[~flipped], x[~flipped])
    assert 60 < flipped.sum() < 140


def test_every_offset_and_flip_comes_up():
    padding, side = 2, 5
    x = torch.zeros(2000, 1, side, side, dtype=torch.uint8)
    x[:, :, padding, padding], x[:, :, padding, padding + 1] = 1, 2  # no crop loses the 1, in the middle
    where = crop_and_flip(x, generator(), padding).flatten(1)
    counts = torch.bincount((where == 1).int().argmax(1), minlength=side**2)
    assert len(counts) == (2 * padding + 1) ** 2
    assert counts.min() > 40  # 80 expected


def test_the_input_stays_and_no_sample_will_do():
    x = torch.ones(4, 1, 3, 3)
    crop_and_flip(x, generator())
    assert torch.equal(x, torch.ones(4, 1, 3, 3))
    assert crop_and_flip(x[:0], generator()).shape == (0, 1, 3, 3)


def test_refuses_what_is_no_batch_of_pictures():
    with pytest.raises(ValueError, match=r"`x` must have four dimensions \[N, C, H, W\], not 3 \(shape \(1, 8, 8\)\)"):
        crop_and_flip(torch.zeros(1, 8, 8), generator())


def test_refuses_a_negative_padding():
    with pytest.raises(ValueError, match=r"`padding` \(=-1\) must be at least 0 pixels; 0 flips only"):
        crop_and_flip(torch.zeros(1, 1, 8, 8), generator(), padding=-1)

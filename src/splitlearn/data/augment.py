"""Augmentation of whole batches, on whatever device they are."""

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Crop each picture at random from itself with a zero border, and mirror half of them left to right.

    x: [N, C, H, W] of any dtype on any device; the result is alike. padding: width of the border, in pixels.
    `generator` is a CPU generator, so that the draws do not depend on the device. It draws three vectors of length N:
    rows and columns of the crops' top left corners, 0..2 * padding, then 1 for the crops to flip.
    """
    if x.ndim != 4:
        raise ValueError(f"`x` must have four dimensions [N, C, H, W], not {x.ndim} (shape {tuple(x.shape)})")
    if padding < 0:
        raise ValueError(f"`padding` (={padding}) must be at least 0 pixels; 0 flips only")
    n, c, h, w = x.shape
    top, left = (torch.randint(2 * padding + 1, (n, 1), generator=generator) for _ in range(2))
    flip = torch.randint(2, (n, 1), generator=generator) == 1
    rows, cols = top + torch.arange(h), left + torch.arange(w)  # [N, H], [N, W]
    cols = torch.where(flip, cols.flip(1), cols)
    sample, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(c).view(1, c, 1, 1)
    index = (sample, channel, rows.view(n, 1, h, 1), cols.view(n, 1, 1, w))
    return F.pad(x, (padding,) * 4)[tuple(part.to(x.device) for part in index)]

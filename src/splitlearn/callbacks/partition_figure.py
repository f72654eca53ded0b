"""The partition as a picture: who has how many rows of which class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

MANY_ALICES, MANY_CLASSES = 20, 20  # beyond these no numbers are drawn
MARGIN, CELL, LINE = 50, 44, 18  # pixels: beside the cells for names, and a cell's width and height around a number
NARROW, HEIGHT = 8, 400  # pixels: a cell's width without numbers, and the height that many thin lines share
INK, PAPER = (20, 60, 120), (255, 255, 255)


def who_has_what(labels: Tensor, shards: Sequence[Tensor], num_classes: int) -> Tensor:
    """Draw the Alices down and the classes across, the darker the more rows; the last column is the Alice's total.

                  0     1    all
        alice0    3     0     3      numbers wherever they can be read: up to 20 Alices and 20 classes
        alice1    1     4     5

    Arguments: `labels` [N] int64, -1 where they are not known, which leaves the totals; `shards`, the row indices of
    each Alice. Returns pixels [3, H, W] uint8; of a thousand Alices each is a line of one pixel.
    """
    totals = torch.tensor([[len(shard)] for shard in shards])
    known = len(labels) > 0 and int(labels.min()) >= 0
    classes = [torch.bincount(labels[shard], minlength=num_classes) for shard in shards] if known else []
    counts = torch.cat([torch.stack(classes), totals], dim=1) if known else totals
    shades = torch.cat([_shade(counts[:, :-1]), _shade(totals)], dim=1)
    legible = len(shards) <= MANY_ALICES and counts.shape[1] <= MANY_CLASSES + 1
    width, height = (CELL, LINE) if legible else (NARROW, max(1, HEIGHT // len(shards)))
    cells = shades.repeat_interleave(height, dim=0).repeat_interleave(width, dim=1)
    return _write(cells, counts, shades) if legible else cells.permute(2, 0, 1)


def _shade(counts: Tensor) -> Tensor:
    """A pixel for each number of [A, C], paper for none and ink for the most: [A, C, 3] uint8."""
    darkness = counts / counts.max() if counts.numel() else counts.float()  # every Alice has a row
    paper, ink = torch.tensor(PAPER), torch.tensor(INK)
    return (paper + darkness.unsqueeze(-1) * (ink - paper)).round().to(torch.uint8)


def _write(cells: Tensor, counts: Tensor, shades: Tensor) -> Tensor:
    """Put the numbers into the cells [H, W, 3], the names of Alices and classes beside and above them."""
    picture = Image.new("RGB", (MARGIN + cells.shape[1], LINE + cells.shape[0]), PAPER)
    picture.paste(Image.fromarray(cells.numpy()), (MARGIN, LINE))
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate([*range(counts.shape[1] - 1), "all"]):
        draw.text((MARGIN + CELL * (column + 0.5), LINE / 2), str(name), INK, anchor="mm")
    for line, numbers in enumerate(counts.tolist()):
        y = LINE * (line + 1.5)
        draw.text((MARGIN / 2, y), f"alice{line}", INK, anchor="mm")
        for column, number in enumerate(numbers):
            is_dark = int(shades[line, column, 1]) < 128
            draw.text((MARGIN + CELL * (column + 0.5), y), str(number), PAPER if is_dark else INK, anchor="mm")
    return pil_to_tensor(picture)

"""The picture shows who has how much of what, and stays small."""

import pytest
import torch

from splitlearn.callbacks.partition_figure import CELL, INK, LINE, MARGIN, PAPER, who_has_what


def corner(picture, line, column):
    """The colour of a cell beside its number."""
    return tuple(picture[:, LINE * (line + 1) + 1, MARGIN + CELL * column + 1].tolist())


def test_the_darker_the_more():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    picture = who_has_what(labels, [torch.tensor([0, 1, 2, 3]), torch.tensor([5, 4, 6])], 3)
    assert (picture.shape, picture.dtype) == ((3, LINE * 3, MARGIN + CELL * 4), torch.uint8)
    half, quarter = (tuple(round(p + part * (i - p)) for p, i in zip(PAPER, INK, strict=True)) for part in (0.5, 0.25))
    assert [corner(picture, 0, c) for c in range(3)] == [INK, PAPER, PAPER]
    assert [corner(picture, 1, c) for c in range(3)] == [PAPER, half, quarter]
    assert corner(picture, 0, 3) == INK  # totals have a scale of their own
    assert corner(picture, 1, 3)[0] == round(255 - 0.75 * (255 - INK[0]))


def test_numbers_are_written_where_they_can_be_read():
    """Two pictures that differ in a count by as little as shades cannot show."""
    labels = torch.cat([torch.zeros(9999, dtype=torch.int64), torch.ones(3, dtype=torch.int64)])
    few, more = (who_has_what(labels, [torch.arange(9999), torch.arange(9999, 9999 + n)], 2) for n in (2, 3))
    cell = (slice(None), slice(LINE * 2, LINE * 3), slice(MARGIN + CELL, MARGIN + CELL * 2))
    assert corner(few, 1, 1) == corner(more, 1, 1) == PAPER
    assert not torch.equal(few[cell], more[cell])


@pytest.mark.parametrize(
    ("num_shards", "num_classes", "shape"),
    [
        (20, 20, (18 * 21, 50 + 44 * 21)),
        (21, 10, (21 * 19, 8 * 11)),
        (3, 21, (3 * 133, 8 * 22)),
        (1000, 10, (1000, 88)),
    ],
)
def test_many_alices_and_classes_are_small_cells_without_numbers(num_shards, num_classes, shape):
    labels = torch.arange(num_shards) % num_classes
    picture = who_has_what(labels, list(torch.arange(num_shards).split(1)), num_classes)
    assert picture.shape == (3, *shape)
    assert tuple(picture[:, 0, -1].tolist()) == (tuple(INK) if num_shards > 20 or num_classes > 20 else PAPER)


def test_without_labels_only_totals_are_shown():
    picture = who_has_what(torch.full((3,), -1), [torch.tensor([0]), torch.tensor([1, 2])], 10)
    assert picture.shape == (3, LINE * 3, MARGIN + CELL)
    assert corner(picture, 1, 0) == INK

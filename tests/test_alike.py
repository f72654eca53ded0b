"""What tells two data sets apart: other rows, other labels, another order, other names."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.utils import save_image

from splitlearn.data import Source, SplitData
from splitlearn.data.alike import digests, look
from splitlearn.data.sources import image_folder
from splitlearn.data.table import table

X, Y = torch.arange(24.0).view(12, 2), torch.arange(12) % 3
LABELS, ROWS, ORDER = "labels", "rows", "order of rows"


def told(dataset: Dataset) -> dict[str, str]:
    return digests(dataset, look(dataset))


def changed(x: Tensor, y: Tensor) -> set[str]:
    ours, theirs = told(TensorDataset(X, Y)), told(TensorDataset(x, y))
    return {what for what in ours if ours[what] != theirs[what]}


def test_tensors_are_told_apart_by_every_value():
    assert changed(X.clone(), Y.clone()) == set()
    other = X.clone()
    other[7, 1] += 1e-5
    assert changed(other, Y) == {ROWS, ORDER}
    assert changed(X, Y.flip(0)) == {LABELS}
    assert changed(X.flip(0), Y.flip(0)) == {LABELS, ORDER}  # the same rows in another order
    assert changed(X.flip(0), Y) == {ORDER}
    assert changed(X.double(), Y) == {ROWS, ORDER}


class Reads(Dataset):
    """Rows that are read one by one; the `noise` makes them others each time."""

    def __init__(self, x: Tensor, noise: float = 0.0) -> None:
        self.x, self.noise = x, noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i] + (self.noise * torch.rand(2) if self.noise else 0), int(Y[i])


def test_of_what_is_read_row_by_row_some_rows_count():
    assert told(Reads(X)) == told(Reads(X.clone())) != told(Reads(X.flip(0)))
    assert told(Reads(X, noise=1.0)) == {}  # an augmentation of its own: nothing that could be compared


def pictures(folder: Path, *classes: str, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(3):
            save_image(torch.rand(3, 4, 4, generator=generator), folder / name / f"{i}.png")
    return folder


def alike(source: Source) -> dict[str, str]:
    return SplitData(source, val_fraction=0.2).alike


def test_pictures_are_told_apart_by_classes_files_and_bytes(tmp_path):
    cats = alike(image_folder(pictures(tmp_path / "a", "cat", "dog", "zebra")))
    assert cats == alike(image_folder(pictures(tmp_path / "b", "cat", "dog", "zebra")))
    ships = alike(image_folder(pictures(tmp_path / "c", "cat", "dog", "ship")))
    assert (cats["classes"], ships["classes"]) == ("cat, dog, zebra", "cat, dog, ship")
    others = alike(image_folder(pictures(tmp_path / "d", "cat", "dog", "zebra", seed=1)))
    assert {what for what in cats if cats[what] != others[what]} == {ROWS, ORDER}


def test_tables_are_told_apart_by_columns_and_classes(tmp_path):
    def read(header: str, *lines: str) -> dict[str, str]:
        path = tmp_path / "table.csv"
        path.write_text("\n".join([header, *lines]))
        return alike(table(path, "diagnosis"))

    rows = [f"{i},{2 * i},{('ill', 'well')[i % 2]}" for i in range(10)]
    first = read("age,weight,diagnosis", *rows)
    assert list(first) == ["classes", "columns", "number of rows", LABELS, ROWS, ORDER]
    assert (first["classes"], first["columns"]) == ("ill, well", "age, weight")
    shuffled = read("age,weight,diagnosis", *rows[::-1])
    assert {what for what in first if first[what] != shuffled[what]} == {LABELS, ORDER}


@pytest.mark.parametrize("x", [X + 1, X.flip(0)])
def test_a_checkpoint_is_of_other_data_where_they_are_as_long(x):
    ours, theirs = (SplitData(Source(TensorDataset(rows, Y), None, 3)) for rows in (X, x))
    assert ours.kind != theirs.kind
    assert {key for key, value in ours.settings.items() if value != theirs.settings[key]} == {"data.rows"}

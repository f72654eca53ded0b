"""A CSV of numbers and labels becomes rows; what is not one is refused by file and line."""

import re

import pytest
import torch

from splitlearn.data import SplitData
from splitlearn.data.table import table

PATIENTS = "age,diagnosis,pressure\n63,well,145.5\n41, ill ,1e2\n\n7,well,-3\n"


def write(folder, text, name="patients.csv"):
    path = folder / name
    path.write_text(text)
    return path


def refuses(message, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(message)}")


def test_columns_are_numbers_and_labels_are_numbered_as_they_sort(tmp_path):
    source = table(write(tmp_path, PATIENTS), "diagnosis")
    x, y = source.train.tensors
    assert torch.equal(x, torch.tensor([[63, 145.5], [41, 100], [7, -3]]))
    assert y.tolist() == [1, 0, 1]  # ill, well
    assert source[1:] == (None, 2, ["age", "pressure"], ["ill", "well"])


def test_a_test_file_takes_the_classes_of_the_training_file(tmp_path):
    test = write(tmp_path, "age,diagnosis,pressure\n50,well,120\n", "test.csv")
    source = table(str(write(tmp_path, PATIENTS)), "diagnosis", str(test))
    assert [part.tolist() for part in source.test.tensors] == [[[50, 120]], [1]]


def test_owners_of_named_columns_get_theirs(tmp_path):
    source = table(write(tmp_path, PATIENTS), "diagnosis")
    split = {"val_fraction": 0.0, "test_fraction": 0.4}
    fields = SplitData(source, ("alices",), 2, columns=[["pressure"], ["age"]], **split).rows.fields
    assert fields["x0"].tolist() == [[145.5], [100], [-3]]
    assert fields["x1"].tolist() == [[63], [41], [7]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE, line 1: the header () must name two columns or more, all different"),
        ("a,a,diagnosis\n", "FILE, line 1: the header (a,a,diagnosis) must name two columns or more, all different"),
        ("age,illness\n1,ill\n", "`data.label` (=diagnosis) must be a column of FILE: age, illness"),
        ("age,diagnosis\n", "FILE has no line below its header: it must have at least one row"),
        ("age,diagnosis\n\n1,ill,2\n", "FILE, line 3: 3 fields, but the header has 2; mend the line"),
        (
            "age,diagnosis\n1,ill\nold,well\n",
            "FILE, line 3: `old` is not a number of float32; fill it in, or remove its line",
        ),
        ("age,diagnosis\n,ill\n", "FILE, line 2: `` is not a number"),
        ("age,diagnosis\nnan,ill\n", "FILE, line 2: `nan` is not a number"),
        ("age,diagnosis\n1e60,ill\n", "FILE, line 2: `1e60` is not a number of float32"),
        ("age,diagnosis\n1,ill\n2,ill\n", "FILE: column diagnosis must hold two labels or more, not only ill"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, message):
    path = write(tmp_path, text)
    with refuses(message.replace("FILE", str(path))):
        table(path, "diagnosis")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pressure,diagnosis,age\n1,ill,2\n", "TEST must have the columns of FILE, age, pressure, in the same order"),
        ("age,diagnosis,pressure\n1,dead,2\n", "TEST has labels that FILE has not, dead: add them there"),
    ],
)
def test_a_test_file_that_does_not_fit_is_refused(tmp_path, text, message):
    path, test = write(tmp_path, PATIENTS), write(tmp_path, text, "test.csv")
    with refuses(message.replace("FILE", str(path)).replace("TEST", str(test))):
        table(path, "diagnosis", test)


def test_a_missing_file_is_named(tmp_path):
    with refuses(f"`data.root` (={tmp_path / 'no.csv'}) is not a file: name a CSV with a header", FileNotFoundError):
        table(tmp_path / "no.csv", "diagnosis")

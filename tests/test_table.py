"""A CSV of numbers and labels becomes rows; what is not one is refused by file and line."""

import re
import warnings

import numpy as np
import pytest
import torch

from splitlearn.data import SplitData
from splitlearn.data.own_table import own_table
from splitlearn.data.table import table
from splitlearn.layout import vertical

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


@pytest.mark.parametrize(
    "labels", [range(12), range(-3, 9), [f"{i}.0" for i in range(12)], [f"c{i}" for i in range(12)]]
)
def test_whole_numbers_are_classes_in_the_order_that_numpy_gives_and_texts_as_they_sort(tmp_path, labels):
    text = "age,diagnosis\n" + "".join(f"1,{labels[i * 7 % 12]}\n" for i in range(48))
    source = table(write(tmp_path, text), "diagnosis")
    numbers = np.array([labels[i * 7 % 12] for i in range(48)])
    names, places = np.unique(numbers if str(labels[0])[0] == "c" else numbers.astype(float), return_inverse=True)
    assert source.train.tensors[1].tolist() == places.tolist()
    assert [type(names[0])(name) for name in source.classes] == names.tolist()


@pytest.mark.parametrize("label", ["NA", "n/a", "N/A", "nan", "NaN", "null", "NULL", "None", "<NA>", ' "NA"'])
def test_a_label_that_programs_write_for_none_is_refused(tmp_path, label):
    path = write(tmp_path, f"age,diagnosis\n1,ill\n2,{label}\n3,well\n")
    rule = f"column diagnosis has no label, but `{label.strip()}`; fill it in, or remove the line, or call the class"
    with refuses(f"{path}, line 3: {rule} otherwise"):
        table(path, "diagnosis")
    table(write(tmp_path, "age,diagnosis\n1,nano\n2,nil\n3,nan-like\n"), "diagnosis")


SPELLINGS = [
    ("0", "00", "00", "0"),
    ("1", "1.0", "1.0", "1"),
    ("-1.50", "-1.5", "-1.5", "-1.50"),
    ("+1e1", "10", "10", "+1e1"),
    ("caf\u00e9", "cafe\u0301", "cafe\\u0301", "caf\\xe9"),
    ("x", ' "x"', '"x"', "x"),
    ("' 1.0 '", "1", "1", "' 1.0 '"),
    ("not ill", "not  ill", "not  ill", "not ill"),
    ("not ill", "not\u00a0ill", "not\\xa0ill", "not ill"),
    ("ill", "\u200bill", "\\u200bill", "ill"),
    ("ill", "ill \u200b", "ill \\u200b", "ill"),
]


@pytest.mark.parametrize(("first", "second", "shown", "other"), SPELLINGS)
def test_one_label_in_two_spellings_is_refused_with_both(tmp_path, first, second, shown, other):
    def said(where, other_where):
        rule = f"label `{shown}` is `{other}` of {other_where} in another spelling"
        return f"{where}: {rule}: write them alike, or call one otherwise if they are two"

    path = write(tmp_path, f"age,diagnosis\n1,{first}\n2,well\n\n3,{second}\n")
    with refuses(said(f"{path}, line 5", f"{path}, line 2")):
        table(path, "diagnosis")
    path = write(tmp_path, f"age,diagnosis\n1,{first}\n2,well\n")
    test = write(tmp_path, f"age,diagnosis\n1,well\n2,{second}\n", "test.csv")
    with refuses(said(f"{test}, line 3", f"{path}, line 2")):
        table(path, "diagnosis", test)


def test_labels_that_are_two_stay_two(tmp_path):
    labels = ["1", "2", "1.5", "A'", "A", '5"', "e\u0301", "e", "12345678901234567890", "12345678901234567891"]
    text = "age,diagnosis\n" + "".join(f"1,{label}\n" for label in labels)
    assert table(write(tmp_path, text), "diagnosis").classes == sorted(labels)


def test_labels_that_differ_in_case_alone_are_two_and_warned_of(tmp_path):
    path = write(tmp_path, "age,diagnosis\n1,ill\n2,well\n3,Ill\n")
    said = f"{path}, line 4: label `Ill` differs from `ill` of {path}, line 2 in upper and lower case alone: write them"
    with pytest.warns(UserWarning, match=f"^{re.escape(said)}"):
        assert table(path, "diagnosis").classes == ["Ill", "ill", "well"]


def test_a_test_file_takes_the_classes_of_the_training_file(tmp_path):
    test = write(tmp_path, "age,diagnosis,pressure\n50,well,120\n", "test.csv")
    source = table(str(write(tmp_path, PATIENTS)), "diagnosis", str(test))
    assert [part.tolist() for part in source.test.tensors] == [[[50, 120]], [1]]


def test_owners_of_named_columns_get_theirs(tmp_path):
    source = table(write(tmp_path, PATIENTS), "diagnosis")
    split = {"val_fraction": 0.0, "test_fraction": 0.4}
    fields = SplitData(source, vertical(("a", "b"), 1, 2), columns=[["pressure"], ["age"]], **split).rows.fields
    assert fields["x0"].tolist() == [[145.5], [100], [-3]]
    assert fields["x1"].tolist() == [[63], [41], [7]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE, line 1: the header () must name two columns or more"),
        ("a,a,diagnosis\n", "FILE, line 1: column a comes twice in the header; each must have a name of its own"),
        (
            ",age,diagnosis\n0,1,ill\n",
            "FILE, line 1: column 1 of 3 in the header has no name; name it, or leave it out",
        ),
        ("age,diagnosis,\n1,ill,\n", "FILE, line 1: column 3 of 3 in the header has no name"),
        (
            'age,diagnosis\n"1,5",ill\n',
            "FILE, line 2: `1,5` is not a number of float32, in column age: numbers are written with a point; mend it",
        ),
        ("age,diagnosis\n1,kr\ufffdnk\n", "FILE, line 2: U+FFFD, which stands for a lost character, is no text"),
        (
            "age,diagnosis\n" + "".join(f"{i},{i % 24 / 10}\n" for i in range(96)),
            "FILE: column diagnosis has 24 different values in 96 rows, which are no classes: name another",
        ),
        ("age,illness\n1,ill\n", "`data.label` (=diagnosis) must be a column of FILE: age, illness"),
        ("age,diagnosis\n", "FILE has no line below its header: it must have at least one row"),
        ("age,diagnosis\n\n1,ill,2\n", "FILE, line 3: 3 fields, but the header has 2; mend the line"),
        (
            "age,diagnosis\n1,ill\nold,well\n",
            "FILE, line 3: `old` is not a number of float32, in column age; mend it, or remove its line",
        ),
        ("age,diagnosis\n,ill\n", "FILE, line 2: column age has no value; fill it in, or remove its line or column"),
        ("age,diagnosis\n1,\n", "FILE, line 2: column diagnosis has no label; fill it in, or remove the line"),
        ('age,diagnosis\n1, "" \n', 'FILE, line 2: column diagnosis has no label, but `""`; fill it in, or remove'),
        ("age,diagnosis\n1_000,ill\n", "FILE, line 2: `1_000` is not a number of float32, in column age"),
        ("age,diagnosis\n\u0661\u0662,ill\n", "FILE, line 2: `\u0661\u0662` is not a number"),
        ("age,diagnosis\ninf,ill\n", "FILE, line 2: `inf` is not a number"),
        ("age,diagnosis\n1,i\0ll\n", "FILE, line 2: a NUL is no text; mend it"),
        ('age,diagnosis\n1,"ill\n2,well\n', "FILE, line 3: unexpected end of data; mend or remove the line"),
        (
            "age;diagnosis\n1;ill\n",
            "FILE, line 1: the header (age;diagnosis) must name two columns or more; it seems to be "
            "separated by ';': say 'data.delimiter=\";\"'",
        ),
        ("age|diagnosis\n1|ill\n", "FILE, line 1: the header (age|diagnosis) must name two columns or more; it seems"),
        ("age\tdiagnosis\n1\till\n", "FILE, line 1: the header (age\tdiagnosis) must name two columns or more"),
        (
            "age,diagnosis\n" + "".join(f"1,{i / 3}\n" for i in range(30)),
            "FILE: column diagnosis has 30 different values in 30 rows, which are no classes: name another",
        ),
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
    with refuses(f"`data.source.test_path` (={tmp_path / 'no.csv'}) is not a file", FileNotFoundError):
        table(write(tmp_path, PATIENTS), "diagnosis", tmp_path / "no.csv")


def test_text_of_another_encoding_is_refused_and_read_when_named(tmp_path):
    path = tmp_path / "patients.csv"
    text = "age,diagnosis\n1,kränk\n2,krönk\n3,gesund\n"  # with replacement characters two classes, not three
    path.write_bytes(text.encode("cp1252"))
    with refuses(f"{path}, line 2: byte 0xe4 is not utf-8; save the file as UTF-8, or name its own in `data.encoding`"):
        table(path, "diagnosis")
    with refuses("`data.encoding` (=latin-nonsense): unknown encoding"):
        table(path, "diagnosis", encoding="latin-nonsense")
    named = table(path, "diagnosis", encoding="cp1252").classes
    for encoding, name in (("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-8-sig", "U8"), ("utf-16", "utf-16")):
        path.write_bytes(text.encode(encoding))
        assert table(path, "diagnosis", encoding=name).classes == named == ["gesund", "kränk", "krönk"]


def test_other_delimiters_and_columns_called_by_numbers(tmp_path):
    path = write(tmp_path, "1;2;3\n5;ill;7\n6;well;8\n")
    expected = table(write(tmp_path, "1,2,3\n5,ill,7\n6,well,8\n", "commas.csv"), "2")
    found = table(path, 2, delimiter=";")
    assert found[3:] == expected[3:] == (["1", "3"], ["ill", "well"])
    assert torch.equal(found.train.tensors[0], expected.train.tensors[0])
    tabs = write(tmp_path, "1\t2\t3\n5\till\t7\n6\twell\t8\n", "tabs.csv")
    assert all(table(tabs, 2, delimiter=tab)[3:] == expected[3:] for tab in ("\t", "\\t"))
    with refuses(
        f"{tabs}, line 1: the header (1\t2\t3) must name two columns or more; it seems to be separated by '\\t'"
    ):
        table(tabs, 2, delimiter=";")
    with refuses("`data.delimiter` (=';;') must be one character"):
        table(path, 2, delimiter=";;")


@pytest.mark.parametrize("chosen", [{"features": ["3"]}, {"features": [3]}, {"drop": [1, "name"]}])
def test_chosen_columns_equal_a_file_that_has_only_them(tmp_path, chosen):
    path = write(tmp_path, "1,name,2,3\n5,ann,ill,7\n6,bob,well,8\n")
    only = table(write(tmp_path, "2,3\nill,7\nwell,8\n", "only.csv"), "2")
    found = table(path, "2", **chosen)
    assert (found.columns, found.train.tensors[0].tolist()) == (only.columns, only.train.tensors[0].tolist())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"features": ["height"]},
            "`data.features` has `height`, which is no column of numbers of FILE: age, pressure",
        ),
        ({"drop": ["diagnosis"]}, "`data.drop` has `diagnosis`, which is no column of numbers of FILE: age, pressure"),
        ({"drop": "age"}, "`data.drop` (=age) must be a list: data.drop=[age]"),
        ({"features": ["age", "age"]}, "`data.features` (=['age', 'age']) must name columns, each once"),
        ({"features": ["age"], "drop": ["pressure"]}, "`data.features` (=['age']) must name columns, each once, and"),
        ({"drop": ["age", "pressure"]}, "`data.drop` (=['age', 'pressure']) leaves no column of FILE: keep one"),
    ],
)
def test_columns_that_cannot_be_chosen_are_refused(tmp_path, chosen, message):
    path = write(tmp_path, PATIENTS)
    with refuses(message.replace("FILE", str(path))):
        table(path, "diagnosis", **chosen)


def test_a_running_id_is_warned_of_by_name(tmp_path):
    path = write(tmp_path, "no,age,diagnosis\n" + "".join(f"{i},{i % 9},{i % 2}\n" for i in range(30)))
    said = "column no has whole numbers, all different, as an id has, .*: leave it out by `data.drop` if it is one"
    with pytest.warns(UserWarning, match=said):
        table(path, "diagnosis")
    table(path, "diagnosis", drop=["no"])


BEYOND = 2**24 + 1  # the least whole number that float32 has not


def patients(path):
    return table(path, "diagnosis", drop=["id"])


def own(path):
    return own_table(path, ["no", "lacking"], "diagnosis", ["well", "ill"])


@pytest.mark.parametrize(("read", "key"), [(patients, "data.drop"), (own, "data.source.features")])
def test_whole_numbers_that_float32_rounds_are_warned_of_by_column_and_value(tmp_path, read, key):
    def column(*values):
        lines = [f"p{i},{value},{label}" for i, (value, label) in enumerate(zip(values, ("ill", "well"), strict=True))]
        return read(write(tmp_path, "\n".join(["id,no,diagnosis", *lines]))).train.tensors[0][:, 0].tolist()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kept in ([2**24, -(2**24)], [2**25, 1], [BEYOND + 0.5, 1]):  # the last are measured, and never exact
            column(*kept)
    said = f"column no has -{BEYOND + 2}, which as float32 is -{BEYOND + 3}, whatever .* by `{key}`"
    with pytest.warns(UserWarning, match=said):
        assert column(BEYOND, -(BEYOND + 2)) == [2**24, -(BEYOND + 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert column(BEYOND - 2**24, BEYOND + 2 - 2**24) == [1, 3]  # the cure


def test_those_of_a_test_file_are_warned_of_too(tmp_path):
    test = write(tmp_path, f"age,diagnosis,pressure\n{BEYOND},well,120\n", "test.csv")
    with pytest.warns(
        UserWarning, match=f"^{re.escape(str(test))}: column age has {BEYOND}, which as float32 is {2**24}"
    ):
        table(write(tmp_path, PATIENTS), "diagnosis", test)


def test_a_column_far_from_mean_0_and_deviation_1_is_warned_of(tmp_path, recwarn):
    rows = [f"{i % 3},{100 + i},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["small,large,y", *rows]))
    source = table(tmp_path / "t.csv", "y")
    recwarn.clear()
    SplitData(source, standardise=True)
    assert recwarn.list == []
    with pytest.warns(
        UserWarning, match=r"^column large has values around 12\d, far from mean 0 .* data\.standardise=true$"
    ):
        SplitData(source)

"""Every row, and every column, goes to exactly one party."""

import re
from functools import partial

import pytest
import torch

from splitlearn.data.partition import by_file, columns, dirichlet, iid, label_shards, quantity


def refuses(message: str, error: type[Exception] = ValueError):
    return pytest.raises(error, match=f"^{re.escape(message)}")


def count(labels, shards, num_classes):
    """How many rows of each class each shard has."""
    return [torch.bincount(labels[shard], minlength=num_classes).tolist() for shard in shards]


def name(deal):
    return f"{deal.func.__name__} {deal.keywords}" if isinstance(deal, partial) else deal.__name__


TEN_CLASSES = torch.arange(200) % 10
DEALERS = [
    iid,
    dirichlet,
    partial(dirichlet, alpha=0.01),
    label_shards,
    partial(label_shards, num_classes=7),
    quantity,
    partial(quantity, alpha=0.01),
]


@pytest.mark.parametrize("deal", DEALERS, ids=name)
@pytest.mark.parametrize("num_shards", [5, 10, 17])
def test_every_row_has_exactly_one_owner_and_every_alice_a_row(deal, num_shards):
    shards = deal(TEN_CLASSES, num_shards, seed=0)
    assert len(shards) == num_shards
    assert min(len(shard) for shard in shards) >= 1
    assert torch.cat(shards).dtype == torch.int64
    assert sorted(torch.cat(shards).tolist()) == list(range(200))


@pytest.mark.parametrize("deal", DEALERS, ids=name)
def test_the_seed_decides_and_nothing_else(deal):
    def dealt(seed):
        return [shard.tolist() for shard in deal(TEN_CLASSES, 5, seed)]

    first = dealt(1)
    torch.manual_seed(5)
    assert first == dealt(1) != dealt(2)
    assert first != [sorted(shard) for shard in first]


@pytest.mark.parametrize("deal", [iid, dirichlet, partial(label_shards, num_classes=1), quantity], ids=name)
def test_as_many_rows_as_alices_are_a_row_each(deal):
    assert sorted(shard.tolist() for shard in deal(torch.tensor([0, 1, 0, 1]), 4, seed=0)) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("deal", [*DEALERS, partial(by_file, path="no.csv")], ids=name)
@pytest.mark.parametrize("num_shards", [0, -1, 4])
def test_no_shard_may_be_empty(deal, num_shards):
    rule = "must lie between 1 and the number of training samples (=3): no shard may be empty"
    with refuses(f"`num_alices` (={num_shards}) {rule}"):
        deal(torch.zeros(3, dtype=torch.int64), num_shards, seed=0)


@pytest.mark.parametrize(("num_rows", "num_shards", "sizes"), [(10, 3, [4, 3, 3]), (5, 5, [1] * 5), (4, 1, [4])])
def test_iid_shards_differ_by_at_most_one(num_rows, num_shards, sizes):
    assert [len(shard) for shard in iid(torch.zeros(num_rows), num_shards, seed=0)] == sizes


@pytest.mark.parametrize("deal", [iid, quantity])
def test_rows_of_unknown_labels_can_be_dealt_without_them(deal):
    unknown = torch.full((20,), -1)
    assert [s.tolist() for s in deal(unknown, 3, 0)] == [s.tolist() for s in deal(torch.arange(20) % 2, 3, 0)]


@pytest.mark.parametrize("deal", [dirichlet, label_shards])
def test_rows_of_unknown_labels_cannot_be_dealt_by_them(deal):
    said = "deals rows by their labels, which are not known before training: give the data set a `targets` attribute, "
    with refuses(f"`partition` (={deal.__name__}) {said}or hold its rows in memory with data.in_memory=true"):
        deal(torch.full((20,), -1), 3, 0)


# dirichlet and quantity


def test_a_large_alpha_is_nearly_iid_and_a_small_one_nearly_a_class_an_owner():
    labels = torch.arange(1000) % 4
    even = count(labels, dirichlet(labels, 5, 0, alpha=1e6), 4)
    assert all(49 <= number <= 51 for numbers in even for number in numbers)
    uneven = count(labels, dirichlet(labels, 5, 0, alpha=1e-6), 4)
    assert sorted(number for numbers in uneven for number in numbers if number > 1) in (
        [248, 250, 250, 250],
        [249, 249, 250, 250],
    )


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_the_shares_of_a_class_are_spread_as_dirichlet_says(alpha):
    """A share of Dirichlet(a, ..., a) over K has variance (K - 1) / (K^2 (K a + 1)): 300 classes are 300 draws."""
    labels = torch.arange(300).repeat_interleave(100)
    shares = torch.tensor(count(labels, dirichlet(labels, 4, 0, alpha), 300)) / 100
    assert float(shares.mean()) == pytest.approx(1 / 4)
    assert float(shares.var()) == pytest.approx(3 / (16 * (4 * alpha + 1)), rel=0.15)


def test_quantity_skews_sizes_and_leaves_the_labels_alone():
    labels = torch.arange(20_000) % 2
    shards = quantity(labels, 4, 0, alpha=1.0)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) > 2 * min(sizes)
    assert all(abs(len(shard) / 2 - int(labels[shard].sum())) < 3 * len(shard) ** 0.5 for shard in shards)
    even = [len(shard) for shard in quantity(labels, 4, 0, alpha=1e6)]
    assert all(4900 < size < 5100 for size in even)


@pytest.mark.parametrize("deal", [dirichlet, quantity])
def test_who_would_be_empty_takes_a_row_from_the_largest(deal):
    """With next to no alpha one owner draws all rows of the one class."""
    sizes = sorted(len(shard) for shard in deal(torch.zeros(30, dtype=torch.int64), 5, 0, alpha=1e-6))
    assert sizes == [1, 1, 1, 1, 26]


@pytest.mark.parametrize("deal", [dirichlet, quantity])
@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_above_zero(deal, alpha):
    with refuses(f"`partition.alpha` (={alpha}) must be above 0 and at most 1e+06"):
        deal(TEN_CLASSES, 5, 0, alpha=alpha)


# label_shards


@pytest.mark.parametrize(("num_shards", "num_classes"), [(5, 2), (10, 2), (7, 3), (1, 10), (20, 1), (3, 4)])
def test_each_alice_has_so_many_classes_and_each_class_about_as_many_alices(num_shards, num_classes):
    table = count(TEN_CLASSES, label_shards(TEN_CLASSES, num_shards, 0, num_classes), 10)
    assert [sum(number > 0 for number in numbers) for numbers in table] == [num_classes] * num_shards
    owners = [sum(number > 0 for number in numbers) for numbers in zip(*table, strict=True)]
    assert max(owners) - min(owners) <= 1


def test_the_rows_of_a_class_are_dealt_evenly():
    labels = torch.tensor([0] * 7 + [4] * 9)
    table = count(labels, label_shards(labels, 3, seed=0, num_classes=2), 5)
    assert sorted(numbers[0] for numbers in table) == [2, 2, 3]
    assert [numbers[4] for numbers in table] == [3, 3, 3]


@pytest.mark.parametrize(
    ("labels", "num_shards", "num_classes", "message"),
    [
        (
            TEN_CLASSES,
            5,
            11,
            "`partition.num_classes` (=11) must be a whole number from 1 to 10: the data have no more",
        ),
        (TEN_CLASSES, 5, 0, "`partition.num_classes` (=0) must be a whole number from 1 to 10"),
        (TEN_CLASSES, 5, 1.5, "`partition.num_classes` (=1.5) must be a whole number from 1 to 10"),
        (
            TEN_CLASSES,
            4,
            2,
            "`partition.num_classes` (=2) times `num_alices` (=4) must be at least 10, the classes of the data, or "
            "some would have no owner: take num_classes=3",
        ),
        (
            torch.tensor([0] * 9 + [1]),
            2,
            2,
            "`partition.num_classes` (=2) lets 2 Alices have class 1, which has 1 rows: take fewer",
        ),
    ],
)
def test_classes_that_cannot_be_dealt_are_refused(labels, num_shards, num_classes, message):
    with refuses(message):
        label_shards(labels, num_shards, seed=0, num_classes=num_classes)


# by_file


def test_rows_go_where_the_file_says(tmp_path):
    path = tmp_path / "parties.csv"
    path.write_text("id,party\n3,alice1\n0,alice0\n\n2,alice1\n1, alice2\n")
    assert [shard.tolist() for shard in by_file(torch.zeros(4), 3, 0, path)] == [[0], [2, 3], [1]]
    path.write_bytes(b'\xef\xbb\xbfid,party\r\n0,alice0\r\n"1",alice0\r\n')  # as a spreadsheet saves it
    assert [shard.tolist() for shard in by_file(torch.zeros(2), 1, 0, str(path))] == [[0, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE, line 1: the header must be id,party, not "),
        ("party,id\nalice0,0\n", "FILE, line 1: the header must be id,party, not party,id"),
        ("id,party\n0,alice0\n3,alice1\n", "FILE, line 3, id 3: not among the source's rows 0 to 2; remove the line"),
        ("id,party\n-1,alice0\n", "FILE, line 2, id -1: not among the source's rows 0 to 2"),
        ("id,party\none,alice0\n", "FILE, line 2, id one: not among the source's rows 0 to 2"),
        ("id,party\n0,alice0\n\n0,alice1\n", "FILE, line 4, id 0: line 2 deals it already, each row once"),
        ("id,party\n0,alice2\n", "FILE, line 2, id 0: `alice2` is not among alice0 to alice1; see `num_alices`"),
        ("id,party\n0,bob\n", "FILE, line 2, id 0: `bob` is not among alice0 to alice1"),
        ("id,party\n0,alice0\n1\n", "FILE, line 3: 1 fields, but the header has 2; mend the line"),
        ("id,party\n0,alice0,x\n", "FILE, line 2: 3 fields, but the header has 2; mend the line"),
        ("id,party\n0,alice0\n", "FILE has no line for 2 rows of the source, id 1, 2: give each row an owner"),
        ("id,party\n0,alice1\n1,alice1\n2,alice1\n", "FILE gives alice0 no row: give her one, or lower `num_alices`"),
        (f"id,party\n0,{'a' * 200_000}\n", "FILE, line 2: field larger than field limit (131072); mend or remove"),
    ],
)
def test_a_file_that_does_not_deal_every_row_once_is_refused(tmp_path, text, message):
    path = tmp_path / "parties.csv"
    path.write_text(text)
    with refuses(message.replace("FILE", str(path))):
        by_file(torch.zeros(3), 2, 0, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,party\n0,alice0\n10,alice0\n2,alice0\n1,alice0\n", "FILE, line 5, id 1: not among the rows' own ids; re"),
        ("id,party\n0,alice0\n10,alice0\n", "FILE has no line for 1 rows of the source, id 2: give each row an owner"),
        ("id,party\n0,alice0\n10.0,alice0\n", "FILE, line 3: id `10.0` is `10` of the source in another spelling"),
        ("id,party\n0,alice0\n2,alice0\n0,alice0\n", "FILE, line 4, id 0: line 2 deals it already, each row once"),
    ],
)
def test_ids_of_the_rows_own_are_never_places(tmp_path, text, message):
    path = tmp_path / "parties.csv"
    path.write_text(text)
    with refuses(message.replace("FILE", str(path))):
        by_file(torch.zeros(3), 1, 0, path, ids=["0", "10", "2"])


def test_many_missing_rows_are_named_in_short_and_a_missing_file_too(tmp_path):
    path = tmp_path / "parties.csv"
    with refuses(f"`partition.path` (={path}) is not a file: name a CSV with a header", FileNotFoundError):
        by_file(torch.zeros(3), 2, 0, path)
    path.write_text("id,party\n")
    with refuses(f"{path} has no line for 9 rows of the source, id 0, 1, 2, 3, 4, ...: give"):
        by_file(torch.zeros(9), 2, 0, path)


# columns

NAMES = ["age", "weight", "pressure"]


@pytest.mark.parametrize(("width", "num_shards"), [(5, 2), (28, 3), (4, 4), (6, 1)])
def test_equal_blocks_are_those_that_torch_splits(width, num_shards):
    blocks = columns(width, num_shards)
    assert [b.tolist() for b in blocks] == [b.tolist() for b in torch.arange(width).tensor_split(num_shards)]


@pytest.mark.parametrize("names", [3, NAMES])
def test_blocks_may_be_given_by_number(names):
    assert [block.tolist() for block in columns(names, 2, [[2, 0], [1]])] == [[2, 0], [1]]


def test_blocks_may_be_given_by_name():
    assert [block.tolist() for block in columns(NAMES, 2, [["pressure"], ["age", 1]])] == [[2], [0, 1]]


@pytest.mark.parametrize(
    ("names", "num_shards", "blocks", "message"),
    [
        (3, 4, None, "`num_alices` (=4) must not exceed the 3 columns of the input"),
        (3, 3, [[0], [1, 2]], "`data.columns` (=[[0], [1, 2]]) must have a list of at least one column for each of 3"),
        (3, 2, [[0, 1, 2], []], "`data.columns` (=[[0, 1, 2], []]) must have a list of at least one column for each"),
        (3, 3, [0, 1, 2], "`data.columns` (=[0, 1, 2]) must have a list of at least one column for each of 3 Alices"),
        (NAMES, 3, NAMES, "`data.columns` (=['age', 'weight', 'pressure']) must have a list of at least one column"),
        (3, 2, [[0, 1], [1, 2]], "`data.columns` lists column 1 2 times: each column must have exactly one owner"),
        (NAMES, 2, [["age"], ["weight"]], "`data.columns` lists `pressure` 0 times: each column must have exactly"),
        (3, 2, [[0, 1], [3]], "`data.columns` has column 3: columns are numbered 0 to 2"),
        (3, 2, [[0, 1], [-1]], "`data.columns` has column -1: columns are numbered 0 to 2"),
        (NAMES, 2, [["age", "weight"], ["size"]], "`data.columns` has `size`, which is not a column: the first of"),
        (3, 2, [[0, 1], ["age"]], "`data.columns` has `age`, but these columns have no names: number them from 0 on"),
    ],
)
def test_columns_without_exactly_one_owner_are_refused(names, num_shards, blocks, message):
    with refuses(message):
        columns(names, num_shards, blocks)


def test_a_file_of_another_encoding_is_refused_by_line_and_read_when_named(tmp_path):
    path = tmp_path / "who.csv"
    path.write_bytes("id,party\n0,alice0\n1,ålice1\n".encode("cp1252"))
    with refuses(f"{path}, line 3: byte 0xe5 is not utf-8; save the file as UTF-8, or name its own in `partition.enc"):
        by_file(torch.zeros(2), 2, 0, path)
    path.write_bytes("id,party\n0,alice0\n1,alice1\n".encode("utf-16"))
    assert [rows.tolist() for rows in by_file(torch.zeros(2), 2, 0, path, "utf-16")] == [[0], [1]]

"""Each party reads a CSV of its own: it trains as if one file had all columns, and what does not fit is refused."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from federated import TOLD, results_of, weights_of
from helpers import differences

from splitlearn.build import build
from splitlearn.data import SplitData
from splitlearn.data.own_table import own_table
from splitlearn.data.partition import all_rows, by_file
from splitlearn.data.table import table
from splitlearn.errors import InputError
from splitlearn.federation.greetings import answer_with, check_columns, check_greeting
from splitlearn.federation.launch import shared_by_all
from splitlearn.federation.remote_wire import RemoteWire
from splitlearn.federation.streams import DifferenceError
from splitlearn.layout import multi_hop, two_party, vertical, whole
from splitlearn.train import train

FEATURES, CLASSES = ["age", "weight", "pressure"], ["well", "ill"]
OWN = ["data=own_table", "data.label=diagnosis", "data.source.features=[age,weight,pressure]", "data.standardise=true"]
SMALL = ["model.hidden_sizes=[8]", "trainer.max_epochs=2", "data.batch_size=8", "logger=none", "metric=null"]
ASKED = [*OWN, "data.source.classes=[well,ill]", *SMALL]
BLOCKS = ("a", "b", "c")


def write(folder, name, *columns, first=0):
    """A file of 60 patients, in an order of its own, with these columns alone."""
    x = torch.randn(60 + first, 3, generator=torch.Generator().manual_seed(0)) * 20 + 80
    order = torch.randperm(60, generator=torch.Generator().manual_seed(sum(map(ord, name))))
    lines = [",".join(columns)]
    for i in (order + first).tolist():
        texts = {"id": f"p{i}", "diagnosis": CLASSES[int(x[i].sum() > 240)]}
        texts |= {name: str(value) for name, value in zip(FEATURES, x[i].tolist(), strict=True)}
        lines.append(",".join(texts[column] for column in columns))
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


def federated(configure, folder, roots, *asked):
    """Train with a process for each party, which has the file that `roots` names, in a folder of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    fixed = ["engine=processes", "engine.join_timeout=60", f"engine.address={address}"]
    own = [[f"engine.party={p}", f"data.root={root}", f"output_dir={folder}/{p}"] for p, root in roots.items()]
    runs = [configure(*ASKED, *asked, *fixed, *keys) for keys in own]
    with ThreadPoolExecutor(len(runs)) as threads:
        list(threads.map(train, runs))


@pytest.mark.parametrize(
    ("columns", "asked"),
    [
        pytest.param({"alice0": ["weight", "id", "pressure", "age"]}, [], marks=pytest.mark.slow, id="one Alice"),
        pytest.param(
            {"alice0": ["id", "weight", "age"], "alice1": ["pressure", "id"]},
            ["layout=vertical", "num_alices=2", "partition=columns", "data.columns=[[age,weight],[pressure]]"],
            id="two Alices",
        ),
    ],
)
def test_parties_with_files_of_their_own_equal_the_simulator_with_one(columns, asked, configure, tmp_path):
    joined = write(tmp_path, "joined.csv", "id", *FEATURES, "diagnosis")
    train(configure(*ASKED, *asked, f"data.root={joined}", f"output_dir={tmp_path}/simulated"))
    columns = {"bob": ["diagnosis", "id"], **columns}
    roots = {party: write(tmp_path, f"own_{party}.csv", *own) for party, own in columns.items()}
    federated(configure, tmp_path / "processes", roots, *asked)
    simulated = results_of(tmp_path / "simulated")
    assert [results_of(tmp_path / "processes" / party) for party in roots] == [simulated] * len(roots)
    left = weights_of(tmp_path / "processes", [f"{party}/{party}" for party in roots])
    assert differences(left, weights_of(tmp_path / "simulated")) == []


def greeting(configure, party, root, *asked):
    cfg = configure(*ASKED, *asked, "engine=processes", f"engine.party={party}", f"data.root={root}")
    run = build(cfg, RemoteWire(party))
    same = {"version": "1", "torch": "2", "resumes": False, "config": shared_by_all(cfg)}
    told = {**TOLD, "alike": run.data.alike, "file": run.data.own_file}
    return {"party": party, **same, **told, **run.learner.kind(run.data)}, run.data.names


def test_files_of_other_rows_or_classes_are_refused(configure, tmp_path):
    alice, bob = write(tmp_path, "alice.csv", "id", *FEATURES), write(tmp_path, "bob.csv", "id", "diagnosis")
    hub, names = greeting(configure, "bob", bob)
    check_greeting(hub, greeting(configure, "alice0", alice)[0], "bob", None, names)
    theirs, others = greeting(configure, "alice0", write(tmp_path, "other.csv", "id", *FEATURES, first=7))
    with pytest.raises(DifferenceError, match=r"^the ids of the rows differ \(60 at bob and 60 at alice0\)") as differs:
        check_greeting(hub, theirs, "bob", None, names)
    answer = answer_with(others)(differs.value.ask)
    told = differs.value.explain(answer)
    assert ": bob lacks 7 of those of alice0, who lacks 7 of those of bob: bring all files to the same ids" in told
    assert not {*answer} & {*answer_with(names)("1" * 32)}  # by another key nobody can compare
    for nonsense in (None, [1], "p1", {}):
        assert differs.value.explain(nonsense) == str(differs.value)
    with pytest.raises(InputError, match=r"`data.source.classes` is .* at bob and .* at alice0"):
        check_greeting(hub, greeting(configure, "alice0", alice, "data.source.classes=[ill,well]")[0], "bob")


@pytest.mark.slow
def test_how_many_rows_differ_is_told_at_both_ends_and_soon(configure, tmp_path):
    roots = {"bob": write(tmp_path, "bob.csv", "id", "diagnosis")}
    roots["alice0"] = write(tmp_path, "other.csv", "id", *FEATURES, first=7)
    with pytest.raises(InputError, match=r"bob lacks 7 of those of alice0, who lacks 7 .*bob waits no longer"):
        federated(configure, tmp_path, roots)


def test_ids_are_told_to_nobody_without_a_key_and_not_beyond_a_number(monkeypatch, configure, tmp_path):
    monkeypatch.setattr("splitlearn.federation.greetings.MOST_IDS", 59)
    hub, names = greeting(configure, "bob", write(tmp_path, "bob.csv", "id", "diagnosis"))
    theirs, _ = greeting(configure, "alice0", write(tmp_path, "other.csv", "id", *FEATURES, first=7))
    assert not any(name in repr(hub) + repr(theirs) for name in names)
    with pytest.raises(DifferenceError) as differs:
        check_greeting(hub, theirs, "bob", None, names)
    assert differs.value.ask is None
    for key in ("", "0" * 30, 7, None, ["0" * 32]):
        with pytest.raises(InputError, match=r"asks for ids by the key .*, which has no sense"):
            answer_with(names)(key)


def test_a_column_of_two_parties_is_refused_unless_they_have_one_file(configure, tmp_path):
    vertically = ["layout=vertical", "num_alices=2", "partition=columns", "data.columns=[[age,weight],[pressure]]"]
    columns = {"bob": ["id", "diagnosis"], "alice0": ["id", "age", "weight"], "alice1": ["id", "pressure"]}

    def greetings(**more):
        own = {p: write(tmp_path, f"{p}.csv", *names, *more.get(p, [])) for p, names in columns.items()}
        return {party: greeting(configure, party, root, *vertically)[0] for party, root in own.items()}

    check_columns(greetings())
    for party, first in (("alice1", "alice0"), ("bob", "bob")):
        pair = "alice0 and of alice1" if first == "alice0" else "bob and of alice0"
        with pytest.raises(InputError, match=f"column age stands in the files of {pair}, and may mean something else"):
            check_columns(greetings(**{party: ["age"]}))
    joined = write(tmp_path, "joined.csv", "id", *FEATURES, "diagnosis")
    check_columns({party: greeting(configure, party, joined, *vertically)[0] for party in columns})


def source(folder, text, features=FEATURES, label="diagnosis", classes=CLASSES, **more):
    path = folder / "own.csv"
    path.write_text(text)
    return own_table(path, features, label, classes, **more)


def test_rows_stand_in_the_order_of_their_ids(tmp_path):
    ours = source(tmp_path, "weight,id,diagnosis\n80,p2,ill\n70, p1 ,well\n", classes=["well", "ill"])
    x, y = ours.train.tensors
    assert x.isnan().tolist() == [[True, False, True]] * 2
    assert (x[:, 1].tolist(), y.tolist()) == ([70, 80], [0, 1])
    theirs = source(tmp_path, "key,age\np1,1\np2,2\n", id="key")
    assert theirs.train.tensors[1].tolist() == [0, 0]
    assert ours.train.ids == theirs.train.ids != source(tmp_path, "id,age\np1,1\np3,2\n").train.ids
    assert ours.columns == FEATURES


def test_whole_numbers_are_the_classes_that_a_table_makes_of_them(tmp_path):
    text = "id,age,diagnosis\n" + "".join(f"p{i:02},1,{i * 7 % 12}\n" for i in range(48))
    ours = source(tmp_path, text, ["age"], classes=list(range(12)))
    theirs = table(tmp_path / "own.csv", "diagnosis", drop=["id"])
    assert ours.classes == theirs.classes
    assert torch.equal(ours.train.tensors[1], theirs.train.tensors[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE, line 1: the header () must have a column id, by which rows are matched"),
        ("age,weight\n1,2\n", "FILE, line 1: the header (age,weight) must have a column id, by which rows are matched"),
        ("id,age,age\np1,2,3\n", "FILE, line 1: column age comes twice in the header"),
        ("id,age,\np1,2,\n", "FILE, line 1: column 3 of 3 in the header has no name"),
        ("id,height\np1,2\n", "FILE, line 1: column height is none of id, age, weight, pressure, diagnosis; remove it"),
        ("id,age\n", "FILE has no line below its header"),
        ("id,age\np1,2,3\n", "FILE, line 2: 3 fields, but the header has 2"),
        ("id,age\np1,2\n\np2,3\np1,4\n", "FILE, line 5: id `p1` is that of FILE, line 2 too; remove one"),
        ("id,age\np1,old\n", "FILE, line 2: `old` is not a number"),
        ("id,age\n,2\n", "FILE, line 2: the row has no id; fill it in, or remove the line"),
        ("id,age\np1,\n", "FILE, line 2: column age has no value; fill it in"),
        ("id,age\nNA,2\n", "FILE, line 2: the row has no id, but `NA`; fill it in, or remove the line"),
        ("id,age\n7,2\n8,3\n07,4\n", "FILE, line 4: id `07` is `7` of FILE, line 2 in another spelling: write them"),
        ("id,age\n7,2\n7.0,4\n", "FILE, line 3: id `7.0` is `7` of FILE, line 2 in another spelling"),
        ("id,age\np1,2\n\"'p1'\",4\n", "FILE, line 3: id `'p1'` is `p1` of FILE, line 2 in another spelling"),
        ("id,diagnosis\np1,ill\np2,\n", "FILE, line 3: column diagnosis has no label; fill it in, or remove the line"),
        ("id,diagnosis\np1,nan\n", "FILE, line 2: column diagnosis has no label, but `nan`; fill it in, or remove"),
        (
            'id,diagnosis\np1, "ill"\n',
            'FILE, line 2: label `"ill"` is `ill` of `data.source.classes` in another spelling: write them alike',
        ),
        ("id,age\np\x001,2\n", "FILE, line 2: a NUL is no text; mend it"),
        ("id,age\np1,1_000\n", "FILE, line 2: `1_000` is not a number of float32, in column age"),
        ("id,diagnosis\np1,ill\np2,ill\n", "FILE: column diagnosis must hold two labels or more, not only ill"),
        ("id,age\np1,nan\n", "FILE, line 2: `nan` is not a number"),
        (
            "id,diagnosis\np1,ill\np2,dead\n",
            "FILE, line 3: label `dead` must be one of `data.source.classes`, well, ill;",
        ),
    ],
)
def test_what_is_no_part_of_the_table_is_refused(tmp_path, text, message):
    pattern = re.escape(message).replace("FILE", re.escape(str(tmp_path / "own.csv"))).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=f"^{pattern}"):
        source(tmp_path, text)


def test_ids_that_are_two_stay_two_and_those_that_differ_in_case_alone_are_warned_of(tmp_path):
    ids = ["0e1", "0e2", "1.1", "1.10", "1e2", "100", "p1", "P1", "0E1"]
    said = "own.csv, line 9: id `P1` differs from `p1` of .*own.csv, line 8 in upper and lower case alone, as 1 more"
    with pytest.warns(UserWarning, match=said):
        assert source(tmp_path, "id\n" + "\n".join(ids)).train.names == sorted(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": "age"}, "`data.source.features` (=age) must be a list of 1 or more, all different"),
        ({"features": []}, "`data.source.features` (=[]) must be a list of 1"),
        ({"classes": ["ill", "ill"]}, "`data.source.classes` (=['ill', 'ill']) must be a list of 2"),
        ({"classes": ["ill", None]}, "`data.source.classes` (=['ill', None]) has `None`, which is no label: call the"),
        (
            {"classes": ["1", "1.0"]},
            "`data.source.classes`: label `1.0` is `1` of `data.source.classes` in another spelling: write them alike",
        ),
        (
            {"classes": [2, 10, 1]},
            "`data.source.classes` (=[2, 10, 1]) are whole numbers, and must stand in their order: "
            "data.source.classes=[1,2,10]",
        ),
        ({"label": "age"}, "`data.source.id` (=id), `data.label` (=age) and the features must be different"),
        ({"id": "diagnosis"}, "`data.source.id` (=diagnosis), `data.label` (=diagnosis) and the features"),
    ],
)
def test_what_all_have_together_must_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        source(tmp_path, "id\np1\n", **change)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"`data.root` (={tmp_path}/no.csv) is not a file")):
        own_table(tmp_path / "no.csv", FEATURES, "diagnosis", CLASSES)


def data_of(path, layout, **more):
    rows = own_table(path, FEATURES, "diagnosis", CLASSES)
    return SplitData(rows, layout, standardise=True, **more)


VERTICAL = vertical(BLOCKS, 1, num_alices=2)
COLUMNS = {"columns": [["age", "weight"], ["pressure"]], "partition": all_rows}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("layout", "party", "columns", "lacks"),
    [
        (two_party(BLOCKS, 1), "bob", ["diagnosis"], None),
        (two_party(BLOCKS, 1), "bob", FEATURES, "diagnosis, which bob owns: add it, or name bob's file in `data.root`"),
        (two_party(BLOCKS, 1), "alice0", FEATURES, None),
        (two_party(BLOCKS, 1), "alice0", ["age", "pressure", "diagnosis"], "weight, which alice owns"),
        (whole(BLOCKS), "alice0", FEATURES, "diagnosis, which alice owns"),
        (multi_hop(BLOCKS, [1, 2]), "bob", [], None),
        (VERTICAL, "alice0", ["weight", "age"], None),
        (VERTICAL, "alice1", ["weight", "age"], "pressure, which alice1 owns"),
        (VERTICAL, "bob", FEATURES, "diagnosis, which bob owns"),
    ],
)
def test_a_party_whose_file_lacks_what_it_owns_cannot_start(tmp_path, layout, party, columns, lacks, in_memory):
    path = write(tmp_path, "own.csv", "id", *columns)
    data = data_of(path, layout, in_memory=in_memory, **(COLUMNS if layout is VERTICAL else {}))
    if lacks is not None:
        with pytest.raises(InputError, match=re.escape(f"{path} has no column {lacks}")):
            data.keep(layout.owners, RemoteWire(party).plays)
    else:
        data.keep(layout.owners, RemoteWire(party).plays)
        assert not any(field.isnan().any() for field in data.sample(60).values())
        assert ("y" in data.sample()) == ("diagnosis" in columns)


@pytest.mark.parametrize("column", ["weight", "diagnosis"])
def test_the_file_of_the_simulator_has_all_columns(column, configure, tmp_path):
    path = write(tmp_path, "own.csv", "id", *({*FEATURES, "diagnosis"} - {column}))
    with pytest.raises(InputError, match=re.escape(f"{path} has no column {column}, which ")):
        train(configure(*ASKED, f"data.root={path}"))


@pytest.mark.parametrize("ids", [range(24), [f"p{i}" for i in range(24)]])
def test_rows_are_dealt_by_their_ids_as_a_file_says(ids, tmp_path):
    """Sorted as text 10 comes before 2, so a row's place is not its id, though each id is some row's place."""
    rows = "".join(f"{name},{i}.5,1,1,{CLASSES[i % 2]}\n" for i, name in enumerate(ids))
    joined = source(tmp_path, f"id,{','.join(FEATURES)},diagnosis\n{rows}")
    path = tmp_path / "who.csv"
    path.write_text("id,party\n" + "".join(f"{name},alice{i // 12}\n" for i, name in enumerate(ids)))
    data = SplitData(joined, num_alices=2, partition=partial(by_file, path=path))
    ages = joined.train.tensors[0][:, 0] - 0.5
    assert [sorted(ages[data.owners == i].tolist()) for i in (0, 1)] == [[*range(12)], [*range(12, 24)]]


def test_alices_who_take_turns_have_no_files_of_their_own(configure, tmp_path):
    path = write(tmp_path, "joined.csv", "id", *FEATURES, "diagnosis")
    data = SplitData(own_table(path, FEATURES, "diagnosis", CLASSES), num_alices=2)
    with pytest.raises(InputError, match=r"data=own_table has one Alice or a vertical layout, .*not alice0, alice1"):
        data.keep(two_party(BLOCKS, 1).owners, RemoteWire("bob").plays)
    train(configure(*ASKED, f"data.root={path}", "num_alices=2", "trainer.limit_train_batches=2"))

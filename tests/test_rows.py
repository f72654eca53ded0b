"""Rows: normalised as torchvision does it, split and dealt out, each once an epoch, in an order that changes."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from helpers import BLOCKS, SEED, differences, make_rows, train
from runs import make_learner, make_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from splitlearn.data import Source, SplitData
from splitlearn.data.alike import look
from splitlearn.data.loader import EvalLoader, TurnLoader
from splitlearn.data.partition import all_rows, by_file, columns, quantity
from splitlearn.data.rows import InMemory, Normalise, Streamed, load
from splitlearn.errors import DivergedError, InputError
from splitlearn.layout import two_party, vertical
from splitlearn.schedules.schedule import Schedule

VERTICAL = vertical(("a", "b"), 1, num_alices=2)

CPU = torch.device("cpu")


def refuses(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


# Normalise

HALF = ([0.5], [0.5])
CIFAR = ([0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261])


@pytest.mark.parametrize(("mean", "std"), [HALF, CIFAR, ([0.1307] * 3, [0.3081] * 3)])
def test_normalise_equals_torchvision_to_the_bit(mean, std):
    """All 256 shades in each channel."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 2, 1).view(1, 3, 16, 32)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = theirs(pixels[0].permute(1, 2, 0).numpy())
    assert torch.equal(Normalise(mean, std)(pixels)["x"][0], expected)


def test_pixels_become_fractions_and_fractions_stay():
    assert Normalise()(torch.tensor([[0, 51, 255]], dtype=torch.uint8))["x"].tolist() == [
        [0, torch.tensor(0.2).item(), 1]
    ]
    assert Normalise()(torch.tensor([[0.0, 7.0]]))["x"].tolist() == [[0, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_normalise_leaves_its_input_alone(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    assert Normalise([0.5], [0.25])(x)["x"].dtype == torch.float32
    assert torch.equal(x, torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize(("width", "num_shards"), [(5, 2), (6, 4)])
def test_equal_blocks_are_the_tensors_that_torch_splits(width, num_shards):
    x = torch.rand(3, 1, 2, width)
    fields = Normalise(columns=columns(width, num_shards))(x)
    expected = {f"x{i}": part for i, part in enumerate(x.tensor_split(num_shards, dim=-1))}
    assert differences(fields, expected) == []
    assert all(field.is_contiguous() for field in fields.values())


def test_columns_go_to_their_owners():
    fields = Normalise([1.0], [2.0], [torch.tensor([3, 0]), torch.tensor([1])])(torch.tensor([[1.0, 3, 5, 7]]))
    assert {name: field.tolist() for name, field in fields.items()} == {"x0": [[3, 0]], "x1": [[1]]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalise([0.5], None), "`mean` (=[0.5]) and `std` (=None) must be given together, `std` above 0"),
        (lambda: Normalise(None, [0.5]), "`mean` (=None) and `std` (=[0.5]) must be given together, `std` above 0"),
        (lambda: Normalise([0.5], [0.0]), "`mean` (=[0.5]) and `std` (=[0.0]) must be given together, `std` above 0"),
        (
            lambda: Normalise(*CIFAR)(torch.zeros(2, 1, 4, 4)),
            "3 values of `mean` or `std` do not fit inputs of shape [1, 4, 4]",
        ),
        (
            lambda: InMemory(torch.zeros(3, 1), torch.zeros(2), Normalise()),
            "3 inputs and 2 labels: every row must have both",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(make, message):
    with refuses(message):
        make()


# InMemory and Streamed


class OneByOne(Dataset):
    """A data set that is not held in tensors, with labels as plain numbers."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


def make_pixels(num_rows=9):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (num_rows, 3, 4, 6), generator=generator, dtype=torch.uint8)
    return x, torch.arange(num_rows) % 3


@pytest.mark.parametrize("owned", [None, [torch.tensor([0, 1, 2]), torch.tensor([5, 3])]])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_streamed_rows_are_those_in_memory_to_the_bit(owned, num_workers):
    x, y = make_pixels()
    prepare = Normalise(*CIFAR, owned)
    batches = [torch.tensor(rows) for rows in ([8, 0, 3], [1, 2, 4], [7])]
    streams = [
        rows.stream(batches, CPU) for rows in (InMemory(x, y, prepare), Streamed(OneByOne(x, y), prepare, num_workers))
    ]
    for ids, ours, theirs in zip(batches, *streams, strict=True):
        assert differences(ours, theirs) == []
        assert torch.equal(ours["y"], y[ids])
        assert ours["y"].dtype == theirs["y"].dtype == torch.int64
    assert len(InMemory(x, y, prepare)) == len(Streamed(OneByOne(x, y), prepare)) == 9


def test_training_on_streamed_rows_is_training_on_those_in_memory():
    held, streamed = (train(two_party(BLOCKS, 2), data={"in_memory": in_memory}) for in_memory in (True, False))
    assert isinstance(held.data.rows, InMemory)
    assert isinstance(streamed.data.rows, Streamed)
    assert differences(held.weights, streamed.weights) == []


def test_load_reads_tensors_at_once_and_others_one_by_one():
    x, y = make_pixels()
    assert load(TensorDataset(x, y))[0] is x
    for dataset in (TensorDataset(x, y.int()), OneByOne(x, y)):
        loaded = load(dataset)
        assert torch.equal(loaded[0], x)
        assert torch.equal(loaded[1], y)
        assert (loaded[0].dtype, loaded[1].dtype) == (torch.uint8, torch.int64)


class Shifted(TensorDataset):
    """The most usual way to give a TensorDataset a transform."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return 2 * x + 1, (y + 1) % 3


class Shorter(TensorDataset):
    def __len__(self):
        return 15


class Attribute(OneByOne):
    """Has `tensors` that are something else."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.tensors = (torch.full_like(x, float("nan")), y)


@pytest.mark.parametrize("kind", [Shifted, Shorter, Attribute])
def test_a_data_set_with_its_own_items_gives_what_a_data_loader_reads_of_it(kind):
    dataset = kind(*make_rows(20))
    data = SplitData(Source(dataset, dataset, 3))
    ((x, y),) = DataLoader(dataset, batch_size=20)
    for rows in (data.rows, data.test_rows):
        assert differences(rows.fields, {"x": x, "y": y}) == []
        assert len(rows) == len(y)
    with refuses("`data.standardise` (=True) cannot be, since these data are not held as tensors"):
        SplitData(Source(dataset, None, 3), standardise=True)


def test_of_a_data_set_with_its_own_items_these_are_compared_between_parties():
    """Another transform over the same tensors is another data set."""
    x, y = make_rows(20)

    def told(dataset):
        return SplitData(Source(dataset, None, 3)).alike["rows"]

    assert told(Shifted(x, y)) == told(OneByOne(2 * x + 1, (y + 1) % 3)) != told(OneByOne(x, y))


# TurnLoader and EvalLoader

SHARDS = {
    "alice0": torch.tensor([10, 11, 12, 13, 14, 15, 16]),
    "alice1": torch.tensor([20, 21, 22]),
    "alice2": torch.tensor([30]),
}


def make_loader(shards=SHARDS, batch_size=3, seed=0):
    pace = SimpleNamespace(trainer=SimpleNamespace(current_epoch=0))
    return TurnLoader(None, shards, Schedule(list(shards)), pace, batch_size, seed)


def order(loader, epoch):
    return [(taker, ids.tolist()) for step in loader.steps(epoch) for taker, ids in step.batches.items()]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_each_row_is_trained_on_once_an_epoch_by_its_owner(epoch):
    rows = {taker: [] for taker in SHARDS}
    for taker, ids in order(make_loader(), epoch):
        rows[taker] += ids
    assert {taker: sorted(ids) for taker, ids in rows.items()} == {taker: ids.tolist() for taker, ids in SHARDS.items()}


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(3, [3, 3, 1, 3, 1]), (7, [7, 3, 1]), (100, [7, 3, 1]), (1, [1] * 11)]
)
def test_the_last_mini_batch_of_a_turn_is_short(batch_size, sizes):
    loader = make_loader(batch_size=batch_size)
    assert [len(ids) for _, ids in order(loader, 0)] == sizes
    assert len(loader.steps(0)) == len(sizes)


def test_the_order_changes_with_the_epoch_and_the_seed_and_with_nothing_else():
    shards = {"alice0": torch.arange(20)}
    orders = {(seed, epoch): order(make_loader(shards, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len({str(each) for each in orders.values()}) == 6
    torch.rand(3)
    assert order(make_loader(shards), 2) == orders[0, 2]


def test_the_order_of_one_alice_does_not_depend_on_the_others():
    alone = make_loader({"alice1": torch.arange(20)})
    together = make_loader({"alice0": torch.arange(20), "alice1": torch.arange(20)})
    theirs = [(taker, ids) for taker, ids in order(together, 0) if taker == "alice1"]
    assert order(alone, 0) == theirs
    assert [ids for _, ids in theirs] != [ids for taker, ids in order(together, 0) if taker == "alice0"]


def test_evaluation_takes_the_rows_as_they_come():
    x, y = make_rows(9)
    loader = EvalLoader(InMemory(x, y, Normalise()), torch.tensor([5, 1, 8, 0, 2]), 2, CPU)
    batches = list(loader)
    assert [batch.ids.tolist() for batch in batches] == [[5, 1], [8, 0], [2]]
    assert len(loader) == 3
    assert all(torch.equal(b.fields["x"], x[b.ids]) and torch.equal(b.fields["y"], y[b.ids]) for b in batches)
    assert all(batch.owners is None for batch in batches)


def test_evaluation_says_whose_rows_it_takes():
    owners = torch.tensor([0, 0, 1, 1, 2, 2])
    loader = EvalLoader(InMemory(*make_rows(6), Normalise()), torch.tensor([5, 1, 2, 4]), 3, CPU, owners)
    assert [batch.owners.tolist() for batch in loader] == [[2, 0, 1], [2]]


def test_augmentation_draws_anew_in_every_mini_batch_and_the_same_in_every_run():
    def seeds():
        seen = []

        def negate(x, generator):
            seen.append(generator.initial_seed())
            return -x

        return seen, train(two_party(BLOCKS, 2), data={"augment": negate})

    (first, run), (again, _) = seeds(), seeds()
    assert len(set(first)) == len(first) == 10
    assert first == again
    x, y = make_rows(19)
    assert differences(run.weights, train(two_party(BLOCKS, 2), rows=(-x, y)).weights) == []


# SplitData


THREE = ("alice0", "alice1", "alice2")


def make_data(num_rows=20, num_tests=None, **settings):
    def rows(n):
        return TensorDataset(torch.arange(float(n)).view(n, 1), torch.arange(n) % 3)

    return SplitData(Source(rows(num_rows), None if num_tests is None else rows(num_tests), 3), **settings)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"val_fraction": 0.1, "test_fraction": 0.2}, (14, 2, 4)),
        ({"val_fraction": 0.0, "test_fraction": 0.5}, (10, 0, 10)),
        ({"val_fraction": 0.5, "test_fraction": 0.05}, (9, 10, 1)),
    ],
)
def test_rows_are_split_into_training_validation_and_test(settings, sizes):
    data = make_data(**settings)
    train_ids = torch.cat(list(data.shards.values()))
    assert (len(train_ids), len(data.val_ids), len(data.test_ids)) == sizes
    assert sorted(torch.cat([train_ids, data.val_ids, data.test_ids]).tolist()) == list(range(20))
    assert make_data(**settings).test_ids.tolist() == data.test_ids.tolist()
    if sizes[2] > 1:
        assert make_data(**settings, seed=1).test_ids.tolist() != data.test_ids.tolist()


def test_a_test_set_of_its_own_is_tested_on_and_leaves_all_rows_to_train():
    data = make_data(num_tests=7, val_fraction=0.0, num_alices=3)
    assert data.test_ids.tolist() == list(range(7))
    assert data.test_rows is not data.rows
    assert [len(shard) for shard in data.shards.values()] == [7, 7, 6]
    assert data.owners.bincount().tolist() == [7, 7, 6]
    assert sorted(torch.cat(list(data.shards.values())).tolist()) == list(range(20))


def by_label(labels, num_shards, seed):
    return [(labels == i).nonzero()[:, 0] for i in range(num_shards)]


def test_shards_are_of_training_rows_whatever_the_partition():
    data = make_data(num_alices=3, partition=by_label)
    assert [set((shard % 3).tolist()) for shard in data.shards.values()] == [{0}, {1}, {2}]
    train_ids = torch.cat(list(data.shards.values())).tolist()
    assert sorted([*data.val_ids.tolist(), *data.test_ids.tolist(), *train_ids]) == list(range(20))


def test_a_partition_deals_all_rows_and_those_held_out_keep_their_owners():
    seen = []

    def deal(labels, num_shards, seed):
        seen.extend(labels.tolist())
        return by_label(labels, num_shards, seed)

    data = make_data(num_alices=3, partition=deal)
    assert seen == [i % 3 for i in range(20)]
    assert data.owners.tolist() == data.labels.tolist() == [i % 3 for i in range(20)]


def test_which_rows_are_held_out_does_not_depend_on_the_partition():
    first, second, alone = make_data(num_alices=3), make_data(num_alices=3, partition=by_label), make_data()
    assert first.val_ids.tolist() == second.val_ids.tolist() == alone.val_ids.tolist()
    assert first.test_ids.tolist() == second.test_ids.tolist() == alone.test_ids.tolist()
    assert first.owners.tolist() != second.owners.tolist()


def test_the_rows_of_a_file_are_numbered_as_the_source_numbers_them(tmp_path):
    path = tmp_path / "parties.csv"
    path.write_text("id,party\n" + "".join(f"{i},alice{int(i < 15)}\n" for i in range(20)))
    data = make_data(num_tests=4, num_alices=2, partition=partial(by_file, path=path))
    assert set(data.shards["alice0"].tolist()) == set(range(15, 20)) - set(data.val_ids.tolist())
    assert set(data.shards["alice1"].tolist()) == set(range(15)) - set(data.val_ids.tolist())


def test_evaluation_knows_owners_unless_the_test_set_is_nobodys():
    def owners(loader):
        return [batch.owners for batch in loader]

    for num_tests in (None, 7):
        data = make_data(num_tests=num_tests, num_alices=3, partition=by_label, val_fraction=0.3)
        data.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        assert torch.equal(torch.cat(owners(data.val_dataloader())), data.val_ids % 3)
        tested = owners(data.test_dataloader())
        assert torch.equal(torch.cat(tested), data.test_ids % 3) if num_tests is None else tested == [None]


def test_labels_are_known_in_memory_and_where_the_data_set_tells_them():
    x, y = torch.zeros(20, 1), torch.arange(20) % 3
    told, silent = OneByOne(x, y), OneByOne(x, y)
    told.targets = y.tolist()

    def labels(dataset, in_memory):
        return SplitData(Source(dataset, None, 3), in_memory=in_memory).labels.tolist()

    assert labels(told, True) == labels(told, False) == labels(silent, True) == y.tolist()
    assert labels(silent, False) == [-1] * 20


class Merged(OneByOne):
    """What a `target_transform` does: these rows' labels are others than the `targets` when they are read."""

    def __init__(self, x, y, changed):
        super().__init__(x, y)
        self.targets, self.changed = y.tolist(), changed

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x, (y + 1) % 3 if i in self.changed else y


def misfit(told, row):
    return rf"^{told} must be those in `targets`, by which rows are dealt: row {row} has .* when it is read; take data"


def test_labels_that_are_read_are_those_that_are_dealt():
    """In memory they are those that a DataLoader reads; streamed rows are not read before they are dealt."""
    x, y = make_rows(20)
    train, test = Merged(x, y, range(20)), Merged(x[:3], y[:3], [1])
    ((_, read),) = DataLoader(train, batch_size=20)
    held = SplitData(Source(train, test, 3), num_alices=3, partition=by_label, in_memory=True, val_fraction=0.0)
    assert {len(read[shard].unique()) for shard in held.shards.values()} == {1}
    assert torch.equal(held.labels, read)
    with pytest.raises(InputError, match=misfit("labels", 0)):
        SplitData(Source(train, test, 3), in_memory=False)
    with pytest.raises(InputError, match=misfit("labels of the test rows", 1)):
        SplitData(Source(TensorDataset(x, y), test, 3), in_memory=False)


def test_a_label_that_is_not_read_at_the_start_is_compared_in_mid_run(tmp_path):
    x, y = make_rows(20)
    assert not set(look(OneByOne(x, y)).rows) & {1, 4}  # of the rows that are read at the start
    for training, testing, told, row in (
        (Merged(x, y, [1]), TensorDataset(x, y), "labels", 1),
        (TensorDataset(x, y), Merged(x, y, [4]), "labels of the test rows", 4),
    ):
        data = SplitData(Source(training, testing, 3), in_memory=False, val_fraction=0.0)
        trainer, learner = make_trainer(tmp_path), make_learner(data)
        with pytest.raises(InputError, match=misfit(told, row)):
            trainer.fit(learner, datamodule=data) if row == 1 else trainer.test(learner, datamodule=data)


def test_there_is_one_of_the_targets_for_each_row():
    rows = Merged(*make_rows(20), [])
    rows.targets.append(0)
    with pytest.raises(InputError, match=r"^21 `targets` and 20 rows: take data\."):
        SplitData(Source(rows, None, 3), in_memory=False)


def test_standardised_columns_have_mean_0_and_deviation_1_over_the_training_rows():
    x = torch.stack([torch.arange(20.0) * 3 + 100, torch.full((20,), 7.0)], dim=1)
    source = Source(TensorDataset(x, torch.arange(20) % 3), None, 3)
    data = SplitData(source, standardise=True)
    seen = data.rows.fields["x"][data.shards["alice0"]]
    assert seen[:, 0].mean().item() == pytest.approx(0, abs=1e-6)
    assert seen[:, 0].std(correction=0).item() == pytest.approx(1)
    assert seen[:, 1].tolist() == [0] * 14
    given = {"mean": x[data.shards["alice0"]].mean(0).tolist(), "std": x[data.shards["alice0"]].std(0, False).tolist()}
    given["std"][1] = 1.0
    assert torch.allclose(data.rows.fields["x"], SplitData(source, **given).rows.fields["x"])


def test_standardised_pixels_are_normalised_by_channel():
    x, y = make_pixels(20)
    train_ids = SplitData(Source(TensorDataset(x, y), None, 3)).shards["alice0"]
    seen = SplitData(Source(TensorDataset(x, y), None, 3), standardise=True).rows.fields["x"][train_ids]
    assert seen.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert seen.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("dataset", "settings", "why"),
    [
        (OneByOne(*make_pixels(20)), {}, "these data are not held as tensors"),
        (TensorDataset(*make_pixels(20)), {"mean": [0.5], "std": [0.5]}, "`data.mean` is given too"),
    ],
)
def test_what_cannot_be_standardised_is_refused(dataset, settings, why):
    with refuses(f"`data.standardise` (=True) cannot be, since {why}: give `data.mean` and `data.std` alone"):
        SplitData(Source(dataset, None, 3), standardise=True, **settings)


def test_columns_are_owned_as_the_source_names_them():
    x, y = torch.arange(60.0).view(20, 3), torch.arange(20) % 3
    source = Source(TensorDataset(x, y), None, 3, ["age", "weight", "pressure"])
    fields = SplitData(source, VERTICAL, columns=[["pressure"], ["age", 1]]).rows.fields
    assert torch.equal(fields["x0"], x[:, [2]])
    assert torch.equal(fields["x1"], x[:, [0, 1]])


def test_a_sample_is_of_training_rows_and_repeats_a_single_one():
    data = make_data(num_rows=5, num_tests=2, val_fraction=0.0, num_alices=5)
    only = data.shards["alice0"].item()
    assert data.sample(3)["x"].tolist() == [[only]] * 3
    assert data.sample(3)["y"].tolist() == [only % 3] * 3


HELD_OUT = int(torch.cat([make_data().val_ids, make_data().test_ids]).min())  # the first row that is not trained on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`data.batch_size` (=0) must be a whole number of at least 1"),
        ({"eval_batch_size": -1}, "`data.eval_batch_size` (=-1) must be a whole number of at least 1"),
        ({"val_fraction": 1.0}, "`data.val_fraction` (=1.0) must lie in [0, 1)"),
        ({"val_fraction": -0.1}, "`data.val_fraction` (=-0.1) must lie in [0, 1)"),
        ({"test_fraction": 0.0}, "`data.test_fraction` (=0.0) must lie in (0, 1)"),
        (
            {"num_rows": 3},
            "3 rows cannot be split into a test share of 0.2, a validation share of 0.1 and at least one row",
        ),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "20 rows cannot be split into a test share of 0.4, a validation"),
        (
            {"num_alices": 21},
            "`num_alices` (=21) must lie between 1 and the number of training",
        ),
        (
            {"num_alices": 20},
            "`data.val_fraction` holds out 2 rows, which Alices without others need: take fewer Alices",
        ),
        (
            {"num_alices": 2, "partition": lambda labels, n, seed: [torch.arange(20), torch.arange(0)]},
            "`partition` gives alice1 no row: take fewer Alices or another partition",
        ),
        (
            {"num_alices": 2, "partition": lambda labels, n, seed: [torch.arange(20), torch.arange(3)]},
            "`partition` deals 23 rows, 20 different ones: it must give each of the rows 0..19 to exactly one party",
        ),
        (
            {"partition": lambda labels, n, seed: [torch.arange(20) + 1]},
            "`partition` deals 20 rows, 20 different ones: it must give each of the rows 0..19 to exactly one party",
        ),
        (
            {"columns": [[0]]},
            "`data.columns` (=[[0]]) fits the layouts vertical and extended_vanilla, where each Alice owns some: take",
        ),
        ({"layout": VERTICAL}, "`num_alices` (=2) must not exceed the 1 columns of the input"),
        (
            {"augment": lambda x, generator: x, "layout": VERTICAL},
            "`data.augment` needs the whole input: owners of columns would each crop theirs differently",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with refuses(message):
        make_data(**settings)


def test_a_checkpoint_knows_whose_rows_and_columns_were_trained_on():
    """Two Alices who get a row of the other's, with all rows in the same order, are another run."""

    def cut(at):
        return lambda labels, n, seed: list(torch.arange(20).split([at, 20 - at]))

    def columns_of(*blocks):
        x, y = torch.zeros(20, 3), torch.arange(20) % 3
        return SplitData(Source(TensorDataset(x, y), None, 3), VERTICAL, columns=blocks).kind

    two = {"num_alices": 2, "num_tests": 1, "val_fraction": 0.0}
    kinds = [make_data(**two, partition=cut(at)).kind for at in (9, 10, 9)]
    kinds += [columns_of([0], [1, 2]), columns_of([0], [2, 1]), columns_of([0], [1, 2])]
    assert kinds[0] == kinds[2]
    assert kinds[3] == kinds[5]
    assert len(set(kinds)) == 4


@pytest.mark.parametrize(("labels", "low", "high"), [([0, 1, 3], 0, 3), ([-1, 0, 1], -1, 1)])
def test_labels_out_of_range_are_refused(labels, low, high):
    rows = TensorDataset(torch.zeros(3, 1), torch.tensor(labels))
    with refuses(
        f"labels run from {low} to {high}, outside 0..2: number classes from 0, or give the right `num_classes`"
    ):
        SplitData(Source(rows, rows, 3), val_fraction=0.0)


IGNORED = torch.tensor([0, -100, 2])  # which CrossEntropyLoss leaves out, and MeanLoss and accuracy would count


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (IGNORED, "run from -100 to 2, outside 0..2: number classes from 0, or give the right `num_classes`"),
        (torch.tensor([0, 1, 3]), "run from 0 to 3, outside 0..2: number classes from 0"),
        (torch.tensor([0.0, 1.0, 2.0]), "are torch.float32: they must be whole numbers"),
        (torch.zeros(3, 2, dtype=torch.int64), "have shape [3, 2]: they must be one whole number a row"),
    ],
)
def test_labels_of_test_rows_are_checked_as_those_of_training_rows_are(labels, message):
    x, good = torch.zeros(3, 1), torch.tensor([0, 1, 1])
    for source, told in (
        (Source(TensorDataset(x, labels), TensorDataset(x, good), 3), "labels"),
        (Source(TensorDataset(x, good), TensorDataset(x, labels), 3), "labels of the test rows"),
    ):
        with pytest.raises(InputError, match=f"^{re.escape(f'{told} {message}')}"):
            SplitData(source, val_fraction=0.0)


def test_labels_of_streamed_test_rows_are_checked_when_they_are_known(tmp_path):
    x, y = make_rows(20)
    told, silent = OneByOne(*make_rows(3)), OneByOne(*make_rows(3))
    told.y = told.targets = silent.y = IGNORED
    why = "^labels of the test rows run from -100 to 2, outside 0..2: "
    with pytest.raises(InputError, match=why):
        SplitData(Source(TensorDataset(x, y), told, 3), in_memory=False)
    data = SplitData(Source(TensorDataset(x, y), silent, 3), in_memory=False)
    with pytest.raises(InputError, match=why):
        make_trainer(tmp_path).test(make_learner(data), datamodule=data)


def test_a_class_may_occur_in_the_test_rows_alone(tmp_path):
    x, y = make_rows(20)
    data = SplitData(Source(TensorDataset(x, y % 2), TensorDataset(x[:3], torch.tensor([2, 0, 2])), 3))
    learner = make_learner(data)
    (tested,) = make_trainer(tmp_path).test(learner, datamodule=data, verbose=False)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(
            nn.Sequential(*learner.network.segments.values()).eval()(x[:3]), torch.tensor([2, 0, 2])
        )
    assert tested["test/loss"] == expected.item()


def test_owners_of_columns_train_on_all_rows_at_once():
    run = train(vertical(BLOCKS, 1, num_alices=2), epochs=1)
    assert [list(step.batches) for step in run.steps[0]] == [["alices"]] * 5
    assert sorted(torch.cat([step.batches["alices"] for step in run.steps[0]]).tolist()) == list(range(19))


def test_an_alice_all_of_whose_rows_would_be_held_out_keeps_one():
    """alice0 has fifteen of twenty rows; of the others' one row each, that which is held out is spared."""

    def deal(labels, num_shards, seed):
        return [torch.arange(5, 20), *torch.arange(5).split(1)]

    x, y = make_rows(20)
    source = Source(TensorDataset(x, y), None, 3)
    takers = [f"alice{i}" for i in range(6)]
    plain, dealt = SplitData(source, seed=SEED), SplitData(source, num_alices=len(takers), partition=deal, seed=SEED)
    held = {*plain.val_ids.tolist(), *plain.test_ids.tolist()}
    spared = held & set(range(5))
    assert spared  # or this seed shows nothing
    assert {*dealt.val_ids.tolist(), *dealt.test_ids.tolist()} == held - spared
    assert [dealt.shards[f"alice{i + 1}"].tolist() for i in range(5)] == [[i] for i in range(5)]


def test_owners_of_columns_are_dealt_no_rows():
    source = Source(TensorDataset(*make_rows(20)), None, 3)
    with pytest.raises(ValueError, match=r"^`partition` \(=quantity\) deals rows, and these Alices own columns: take"):
        SplitData(source, VERTICAL, partition=partial(quantity, alpha=1.0))
    with pytest.raises(ValueError, match=r"^`partition` \(=columns\) fits the layouts vertical and extended_vanilla"):
        SplitData(source, num_alices=2, partition=all_rows)
    assert len(SplitData(source, VERTICAL, partition=all_rows).shards["alices"]) == 14


@pytest.mark.parametrize("standardise", [False, True])
def test_a_value_that_is_not_finite_is_named_by_row_and_place(standardise):
    x, y = torch.rand(20, 1, 4, 6), torch.arange(20) % 3
    x[7, 0, 2, 5] = float("nan")
    good, bad = TensorDataset(torch.rand(20, 1, 4, 6), y), TensorDataset(x, y)
    with pytest.raises(InputError, match=r"^row 7, place \[0, 2, 5\] of the data is nan, which .*: mend it"):
        SplitData(Source(bad, None, 3), standardise=standardise)
    with pytest.raises(InputError, match=r"^row 7, place \[0, 2, 5\] of the test rows is nan, which .*: mend it"):
        SplitData(Source(good, bad, 3), standardise=standardise)


def test_of_rows_that_are_read_one_by_one_it_is_when_they_are(tmp_path):
    rows = OneByOne(torch.rand(20, 1, 4, 6), torch.arange(20) % 3)
    place = int(SplitData(Source(rows, None, 3), val_fraction=0.0).shards["alice0"][0])
    rows.x[place, 0, 2, 5] = float("nan")
    held, read = (SplitData(Source(rows, None, 3), in_memory=here, val_fraction=0.0) for here in (True, False))
    with pytest.raises(InputError, match=rf"^row {place}, place \[0, 2, 5\] of the data is nan"):
        make_trainer(tmp_path).fit(make_learner(held), datamodule=held)
    with pytest.raises(DivergedError, match=rf"`x` of row {place} of the data is nan itself, at \[0, 2, 5\]: mend it"):
        make_trainer(tmp_path).fit(make_learner(read), datamodule=read)


def test_so_it_is_by_the_name_of_a_column():
    x, y = torch.rand(20, 4), torch.arange(20) % 3
    x[3, 2] = float("inf")
    with pytest.raises(InputError, match=r"^row 3, column pressure of the data is inf"):
        SplitData(Source(TensorDataset(x, y), None, 3, ["a", "b", "pressure", "d"]), VERTICAL)

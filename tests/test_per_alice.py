"""Who is served how well, and what is forgotten: against counts by hand and against a network that is run by hand."""

import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
from helpers import SGD
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from runs import fit, make_data, make_learner, make_trainer, results
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from splitlearn.callbacks.per_alice import PerAlice, performance_gap
from splitlearn.callbacks.results import Results
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Personal
from splitlearn.schedules.weights import copied
from splitlearn.training.accuracy import AccuracyByOwner

SIDE_BY_SIDE = {"alice": Average(), "bob": Average()}
PERSONAL = {"alice": Personal(), "bob": Average()}
PARALLEL = {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"}
OWN_STEP = {"alice": Personal(), "bob": MeanGradient(), "turn": "step"}


def test_the_gap_is_the_mean_over_labels_of_the_largest_loss():
    """Of four rows of each of the first two labels; nobody has a row of the third.

    label 0: 4, 1, 2 are right, so that 3 of 4 are lost; label 1: 0, 2, 1, so that 1 of 4 is lost.
    """
    right = torch.tensor([[4, 0, 0], [1, 2, 0], [2, 1, 0]])
    counts = torch.stack([right, torch.tensor([4, 4, 0]).expand(3, 3)], dim=1)
    assert performance_gap(counts).item() == (3 / 4 + 1 / 4) / 2
    assert performance_gap(counts.flip(0)).item() == (1 / 4 + 2 / 4) / 2
    assert performance_gap(counts[:1].expand(3, 2, 3)).item() == 0


def test_accuracy_by_owner_counts_the_rows_of_each():
    metric = AccuracyByOwner(["alice0", "alice1", "alice2"])
    output = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [5.0, 0.0]])
    metric.update(output, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 2, 2, 2]))
    metric.update(output[:1], torch.tensor([1]), torch.tensor([0]))
    expected = {"/alice0": 1 / 2, "/alice2": 1 / 3, "_worst": 1 / 3}
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected)


def micro(output, labels):
    """torchmetrics' accuracy of all rows but those of label 1."""
    return multiclass_accuracy(output, labels, output.shape[1], average="micro", ignore_index=1).item()


def test_rows_of_an_ignored_label_are_not_counted():
    """As in torchmetrics; who has no others is not told of."""
    torch.manual_seed(0)
    output, labels = torch.randn(60, 3), torch.randint(3, (60,))
    owners = torch.arange(60) % 3
    labels[owners == 2] = 1
    metric = AccuracyByOwner(["alice0", "alice1", "alice2"], ignore_index=1)
    metric.update(output, labels, owners)
    expected = {f"/alice{i}": micro(output[owners == i], labels[owners == i]) for i in (0, 1)}
    expected["_worst"] = min(expected.values())
    assert {name: value.item() for name, value in metric.compute().items()} == expected


@pytest.mark.parametrize("schedule", [None, PERSONAL], ids=["sequential", "v3"])
def test_rows_that_the_loss_leaves_out_are_left_out_of_every_accuracy(schedule, tmp_path):
    data, learner, left, epochs = train(tmp_path, schedule, loss=nn.CrossEntropyLoss(ignore_index=1))
    x, y = data.rows.fields["x"], data.rows.fields["y"]

    def outputs(segments, ids):
        segments = copy.deepcopy(segments).eval()
        return segments["top"](segments["bottom"](x[ids]))

    hers = {alice: data.val_ids[data.owners[data.val_ids] == i] for i, alice in enumerate(data.shards)}
    together = []
    for alice, ids in hers.items():
        with learner.rounds.as_of(alice):
            together.append(outputs(learner.network.segments, ids))
        assert epochs[-1][f"val/accuracy/{alice}"] == pytest.approx(micro(together[-1], y[ids]))
        after = micro(outputs(left[1, alice], data.val_ids), y[data.val_ids])
        assert epochs[-1][f"val/accuracy_after/{alice}"] == pytest.approx(after)
    assert epochs[-1]["val/accuracy"] == pytest.approx(micro(torch.cat(together), y[torch.cat([*hers.values()])]))
    assert 0 < (y[data.val_ids] == 1).sum() < len(data.val_ids)


def test_of_many_owners_only_the_worst_is_told_and_of_one_nothing():
    many = AccuracyByOwner([f"alice{i}" for i in range(11)])
    many.update(torch.eye(11), torch.arange(11), torch.arange(11))
    assert {name: value.item() for name, value in many.compute().items()} == {"_worst": 1.0}
    one = AccuracyByOwner(["alice0", "alice1"])
    one.update(torch.eye(2), torch.arange(2), torch.zeros(2, dtype=torch.int64))
    assert one.compute() == {}


class Copies(Callback):
    """Keeps the network as each Alice leaves it."""

    def __init__(self) -> None:
        self.left = {}

    def on_alice_finished(self, trainer, learner, alice) -> None:
        with learner.rounds.as_of(alice):
            self.left[trainer.current_epoch, alice] = copy.deepcopy(learner.network.segments)


def train(folder, schedule=None, num_alices=3, ckpt=None, callbacks=(), loss=None):
    data = make_data(36, val_rows=9, num_alices=num_alices)
    learner = make_learner(data, schedule=schedule, loss=loss)
    copies = Copies()
    trainer = make_trainer(folder, [PerAlice(), Results(folder / "results.json"), copies, *callbacks])
    trainer.fit(learner, datamodule=data, ckpt_path=ckpt)
    return data, learner, copies.left, results(folder)["epochs"]


def accuracy(segments, data, ids):
    segments = copy.deepcopy(segments).eval()
    rows = data.rows.fields
    return (segments["top"](segments["bottom"](rows["x"][ids])).argmax(1) == rows["y"][ids]).float().mean().item()


@pytest.mark.parametrize(
    "schedule",
    [None, SIDE_BY_SIDE, PERSONAL, PARALLEL, OWN_STEP, {"turn": 1, "order": "cyclic"}],
    ids=["sequential", "v1", "v3", "parallel", "parallel, personal", "alternating"],
)
def test_each_alice_is_judged_by_the_network_that_she_leaves(tmp_path, schedule):
    data, learner, left, epochs = train(tmp_path, schedule)
    for epoch, measured in enumerate(epochs):
        for alice in data.shards:
            expected = accuracy(left[epoch, alice], data, data.val_ids)
            assert measured[f"val/accuracy_after/{alice}"] == pytest.approx(expected)
        assert 0 <= measured["val/performance_gap"] <= 1
    personal = schedule in (PERSONAL, OWN_STEP)
    for i, alice in enumerate(data.shards):
        hers = data.val_ids[data.owners[data.val_ids] == i]
        with learner.rounds.as_of(alice):
            segments = copy.deepcopy(learner.network.segments)
        assert epochs[-1][f"val/accuracy/{alice}"] == pytest.approx(accuracy(segments, data, hers))
        if personal:
            assert not torch.equal(segments["bottom"].block2[1].weight, left[0, alice]["bottom"].block2[1].weight)


@pytest.mark.parametrize("schedule", [None, SIDE_BY_SIDE, PERSONAL, OWN_STEP], ids=["sequential", "v1", "v3", "own"])
def test_judging_changes_no_bit_of_the_training(tmp_path, schedule):
    _, judged, _, _ = train(tmp_path / "judged", schedule)
    plain, _ = fit(tmp_path / "plain", make_data(36, val_rows=9, num_alices=3), schedule=schedule)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, judged.state_dict()[name]), name
    assert judged.ledger.table() == plain.ledger.table()
    assert judged.evaluation_ledger.table() != plain.evaluation_ledger.table()


def test_a_resumed_epoch_is_judged_as_a_whole(tmp_path):
    saver = ModelCheckpoint(tmp_path / "whole", "{step}", every_n_train_steps=5, save_top_k=-1)
    *_, whole = train(tmp_path / "whole", callbacks=[saver])
    *_, resumed = train(tmp_path / "again", ckpt=tmp_path / "whole" / "step=5.ckpt")
    assert len(whole) == 2
    assert resumed == whole


def test_of_many_alices_the_first_the_last_and_some_between_are_judged(tmp_path):
    data = make_data(40, val_rows=10, num_alices=5)
    learner = make_learner(data, make=SGD)
    make_trainer(tmp_path, [PerAlice(most=3), Results(tmp_path / "results.json")]).fit(learner, datamodule=data)
    for epoch in results(tmp_path)["epochs"]:
        after = [name.rpartition("/")[2] for name in epoch if name.startswith("val/accuracy_after")]
        assert after == ["alice0", "alice2", "alice4"]


def test_one_alice_is_not_judged_apart(tmp_path):
    *_, epochs = train(tmp_path, num_alices=1)
    assert [name for name in epochs[0] if name.startswith("val/")] == ["val/loss", "val/accuracy"]


def test_two_at_least_are_judged():
    with pytest.raises(ValueError, match=r"^`callbacks.per_alice.most` \(=1\) must be at least 2"):
        PerAlice(1)


def test_weights_that_are_loaded_behind_a_round_are_what_is_evaluated(tmp_path):
    data = make_data(36, val_rows=9, num_alices=3)
    learner = make_learner(data, schedule=SIDE_BY_SIDE)
    before = copy.deepcopy(learner.network.segments)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(learner, datamodule=data)
    learner.network.segments.load_state_dict(before.state_dict())
    (measured,) = trainer.validate(learner, datamodule=data, verbose=False)
    assert measured["val/accuracy"] == pytest.approx(accuracy(before, data, data.val_ids))


def test_a_run_that_ends_in_the_middle_of_a_round_says_so(tmp_path):
    data = make_data(36, val_rows=9, num_alices=3)
    for scheme, halfway in ((SIDE_BY_SIDE, True), (PARALLEL, False), (None, False)):
        learner = make_learner(data, schedule=copy.deepcopy(scheme))
        trainer = make_trainer(tmp_path, max_steps=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(learner, datamodule=data)
        assert any("in the middle of a round" in str(warning.message) for warning in caught) is halfway


def test_an_epoch_that_is_not_validated_is_not_judged(tmp_path):
    data = make_data(36, val_rows=9, num_alices=3)
    learner = make_learner(data)
    trainer = make_trainer(tmp_path, [PerAlice(), Results(tmp_path / "results.json")], check_val_every_n_epoch=2)
    trainer.fit(learner, datamodule=data)
    first, second = results(tmp_path)["epochs"]
    assert "val/performance_gap" not in first
    assert "val/performance_gap" in second
    rows = sum(learner.evaluation_ledger.num_bytes[f"alice{i}", "bob", "activation"] for i in range(3)) / 40
    assert rows == 9 + 3 * 9  # the validation, and as each Alice left the network


def test_only_those_who_took_part_are_judged(tmp_path):
    data = make_data(36, val_rows=9, num_alices=4, sizes=[8, 10, 8, 10])
    learner = make_learner(data, schedule={**SIDE_BY_SIDE, "participation": 0.5})
    trainer = make_trainer(tmp_path, [PerAlice(), Results(tmp_path / "results.json")], max_epochs=4)
    trainer.fit(learner, datamodule=data)
    for number, epoch in enumerate(results(tmp_path)["epochs"]):
        after = {name.rpartition("/")[2] for name in epoch if name.startswith("val/accuracy_after")}
        assert after == set(learner.schedule.participants(number))


class Looks(pl.Callback):
    """Compares the weights as an Alice leaves them with those that she is judged by."""

    content_with_stretches = True

    def __init__(self) -> None:
        self.same = []

    def on_alice_finished(self, trainer, learner, alice):
        weights = learner.rounds.weights["bob"]
        before = copied(weights.tensors)
        with learner.rounds.as_of(alice):
            self.same.append(all(torch.equal(value, before[name]) for name, value in weights.tensors.items()))


def test_who_has_a_bottom_of_her_own_is_judged_with_the_top_as_she_left_it(tmp_path):
    """SplitFed V3: Bob's copy is hers until the round is over."""
    looks, schedule = Looks(), {"alice": Personal(), "bob": Average()}
    train(tmp_path, schedule, callbacks=[looks])
    assert looks.same == [True] * 6

"""What the learner measures, refuses, saves, and does when training fails."""

from functools import partial

import pytest
import torch
from helpers import BLOCKS, SGD, net, run_blocks
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import TWO_PARTY, batches_of, difference, end_state, make_data, make_learner, make_trainer, results, weights
from torch import nn

from splitlearn.callbacks.results import Results
from splitlearn.errors import DivergedError
from splitlearn.layout import u_shaped, whole
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork
from splitlearn.schedules.schedule import Schedule


def fit(folder, data, callbacks=(), layout=TWO_PARTY, trainer=None, **learner):
    trained = make_learner(data, layout, **learner)
    lightning = make_trainer(folder, callbacks, **(trainer or {}))
    lightning.fit(trained, datamodule=data)
    return trained, lightning


@pytest.mark.parametrize("length", [1, 50])
def test_the_training_loss_is_the_mean_over_the_rows_of_the_epoch(tmp_path, length):
    data = make_data()
    learner, trainer = fit(tmp_path, data, steps_per_execution=length, trainer={"max_epochs": 1})
    model = net()
    optimizer, total = SGD(model.parameters()), 0.0
    for x, y, number in batches_of(data, 0):
        loss = nn.functional.cross_entropy(run_blocks(model.named_children(), x, number), y)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)
    assert learner.mean_loss == total / 39
    assert learner.epoch_loss.last == loss.item()
    assert trainer.callback_metrics["train/loss"] == torch.tensor(total / 39)


@pytest.mark.parametrize("layout", [TWO_PARTY, u_shaped(BLOCKS, [1, 3]), whole(BLOCKS)], ids=lambda layout: layout.kind)
def test_evaluation_is_that_of_the_whole_network_in_evaluation_mode(tmp_path, layout):
    data = make_data(val_rows=7)  # in batches of 3, 3 and 1
    learner, trainer = fit(tmp_path, data, layout=layout)
    assert learner.training
    assert learner.network.training
    trained = net().eval()
    trained.load_state_dict(dict(zip(trained.state_dict(), weights(learner), strict=True)))
    for stage, rows, ids in (("val", data.rows, data.val_ids), ("test", data.test_rows, data.test_ids)):
        if stage == "test":
            trainer.test(learner, datamodule=data, verbose=False)
        with torch.no_grad():
            output, labels = trained(rows.fields["x"][ids]), rows.fields["y"][ids]
        loss = float(nn.functional.cross_entropy(output, labels))
        assert float(trainer.callback_metrics[f"{stage}/loss"]) == pytest.approx(loss, rel=1e-6)
        assert float(trainer.callback_metrics[f"{stage}/accuracy"]) == pytest.approx(
            float((output.argmax(1) == labels).float().mean())
        )


def test_evaluation_has_a_ledger_of_its_own(tmp_path):
    learner, trainer = fit(tmp_path, make_data(val_rows=6))
    trained = {"alice0->bob": {"activation": 2 * 39 * 40}, "bob->alice0": {"gradient": 2 * 39 * 40}}
    assert learner.ledger.table() == trained
    assert learner.evaluation_ledger.table() == {"alice0->bob": {"activation": 2 * 6 * 40}}
    trainer.test(learner, datamodule=trainer.datamodule, verbose=False)
    assert learner.ledger.table() == trained
    assert learner.evaluation_ledger.table() == {"alice0->bob": {"activation": (2 * 6 + 5) * 40}}
    assert learner.network.wire.ledger is learner.ledger


def test_a_part_in_evaluation_mode_stays_in_it(tmp_path):
    data = make_data(val_rows=6)
    learner = make_learner(data)
    frozen = learner.network.segments["bottom"].eval()
    before = {name: value.clone() for name, value in frozen.named_buffers()}
    make_trainer(tmp_path).fit(learner, datamodule=data)
    learner.network.look(data.sample(3))
    assert difference(dict(frozen.named_buffers()), before) == []
    assert not any(module.training for module in frozen.modules())
    assert learner.network.segments["top"].training


def unchecked(**settings):
    """Data whose values nobody looks at before training, as where rows are read one by one."""
    data = make_data(**settings)
    data._require_finite = lambda rows: None
    return data


def poisoned(place):
    """Data with a row that is not a number in mini-batch `place` of the first epoch."""
    data = unchecked()
    x, _, _ = list(batches_of(data, 0))[place]
    rows = data.rows.fields["x"]
    rows[(rows == x[0]).flatten(1).all(1)] = float("nan")
    return data


@pytest.mark.parametrize("length", [1, 7, 50])
def test_a_loss_that_is_not_a_number_stops_training_and_is_named(tmp_path, length):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    kept = Results(tmp_path / "results.json")
    with pytest.raises(DivergedError) as error:
        fit(tmp_path, poisoned(7), [kept, saver], steps_per_execution=length)
    told = "the loss is nan in the turn of alice0 at epoch 0, mini-batch 7"
    assert str(error.value).startswith(told)
    assert "is nan itself, at [0, 0, 0]: mend it" in str(error.value)
    assert results(tmp_path)["stopped"].startswith(f"DivergedError: {told}")
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt"]


def test_a_loss_that_diverges_is_told_with_its_cure(tmp_path):
    with pytest.raises(DivergedError, match=r"in the turn of alice0 at epoch 0, .*: lower `optimizer.lr` or set"):
        fit(tmp_path, make_data(), make=partial(torch.optim.SGD, lr=1e30))


def test_the_last_good_checkpoint_goes_on_with_good_data(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole_run, whole_trainer = fit(tmp_path / "whole", make_data())
    with pytest.raises(DivergedError):
        fit(tmp_path, poisoned(7), [saver])
    data = make_data()
    learner, trainer = make_learner(data), make_trainer(tmp_path)
    trainer.fit(learner, datamodule=data, ckpt_path=tmp_path / "step=6.ckpt")
    assert difference(end_state(learner, trainer), end_state(whole_run, whole_trainer)) == []


def test_the_alice_in_whose_turn_it_happened_is_named(tmp_path):
    data = unchecked(num_alices=5)
    data.rows.fields["x"][data.shards["alice3"][0]] = float("nan")
    with pytest.raises(DivergedError, match=r"in the turn of alice3 at epoch 0, mini-batch [67]:"):
        fit(tmp_path, data)


def test_a_checkpoint_holds_plain_values_only(tmp_path):
    fit(tmp_path, make_data(val_rows=6, num_alices=5), [ModelCheckpoint(tmp_path, "end")], state="keep", make=SGD)
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    kept = checkpoint["splitlearn"]["rounds"]["sharings"]["alice"]["kept"]
    assert set(kept) == {"alice0", "alice1", "alice2", "alice3"}
    assert checkpoint["splitlearn"]["kind"]["layout"] == TWO_PARTY.describe()


def make(model=None, loss=None, num_classes=3, **kwargs):
    blocks = net() if model is None else model
    sample = make_data().sample()
    network = SplitNetwork(blocks, whole(tuple(dict(blocks.named_children()))), sample)
    return SplitLearner(network, Schedule(("alice0",)), SGD, loss or nn.CrossEntropyLoss(), num_classes, **kwargs)


def ending_in(layer):
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 3), layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": "batch"}, r"`scheduler.interval` \(=batch\) must be epoch or step"),
        ({"steps_per_execution": 0}, r"`steps_per_execution` \(=0\) must be at least 1"),
        ({"gradient_clip_val": -1.0}, r"`trainer.gradient_clip_val` \(=-1.0\) must not be negative"),
        ({"num_classes": 4}, r"output has shape \[3\] per sample, the data 4 classes: end the model in a block with 4"),
        ({"model": nn.Sequential(nn.Conv2d(1, 3, 3))}, r"output has shape \[3, 2, 4\] per sample"),
        ({"loss": nn.NLLLoss()}, r"`loss` \(=NLLLoss\) takes log-probabilities: end the model in LogSoftmax"),
        ({"model": ending_in(nn.LogSoftmax(1))}, r"`loss` \(=CrossEntropyLoss\) takes logits: drop the model's last"),
        ({"model": ending_in(nn.Softmax(1))}, r"`loss` \(=CrossEntropyLoss\) takes logits: drop the model's last"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("loss", [partial(nn.NLLLoss), partial(nn.NLLLoss, weight=torch.ones(3))])
def test_log_probabilities_go_with_their_loss(loss):
    make(ending_in(nn.LogSoftmax(1)), loss())


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_a_mini_batch_has_a_whole_number_of_parts(wrong):
    with pytest.raises(ValueError, match=r"`micro_batches` \(=.*\) must be a whole number of at least 1"):
        make_learner(make_data(), micro_batches=wrong)

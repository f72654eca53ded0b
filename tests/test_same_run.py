"""What a run refuses to mix up, to save or to forget."""

import json
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import SEED, SGD
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint
from runs import make_data, make_learner, make_trainer
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

from splitlearn.callbacks.results import Results
from splitlearn.data import Source, SplitData
from splitlearn.errors import DivergedError, InputError
from splitlearn.layout import two_party
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork
from splitlearn.schedules.schedule import Schedule


def saved(folder, data=None, make=SGD, **trainer):
    data = data or make_data()
    lightning = make_trainer(folder, [ModelCheckpoint(folder, "one")], **{"max_epochs": 1, **trainer})
    lightning.fit(make_learner(data, make=make), datamodule=data)
    return folder / "one.ckpt"


def go_on(folder, ckpt, data, make=SGD):
    make_trainer(folder).fit(make_learner(data, make=make), datamodule=data, ckpt_path=ckpt)


def test_another_split_of_the_rows_is_refused(tmp_path):
    """Under another seed, rows held out for the test would be trained on."""
    ckpt, other = saved(tmp_path), make_data()
    other.seed, other.shards = 8, {"alice0": torch.arange(39).flip(0)}
    with pytest.raises(
        InputError, match=rf"`ckpt` is of another run: `seed` is {SEED} in the checkpoint and 8 here; `data.rows` is"
    ):
        go_on(tmp_path, ckpt, other)


def test_another_batch_size_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"run: `data.batch_size` is 4 in the checkpoint and 5 here: resume"):
        go_on(tmp_path, saved(tmp_path), make_data(batch_size=5))


def test_another_learning_rate_is_refused(tmp_path):
    """Lightning would go on at the checkpoint's, whatever was typed."""
    with pytest.raises(InputError, match=r"run: `optimizer.lr` is 0.1 in the checkpoint and 0.5 here: resume"):
        go_on(tmp_path, saved(tmp_path, make=rate(0.1)), make_data(), rate(0.5))


def rate(lr):
    return partial(torch.optim.SGD, lr=lr)


class Scaled(nn.Module):
    """Scales by a number that torch does not print."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.flatten = factor, nn.Flatten()

    def forward(self, x):
        return self.factor * self.flatten(x)


def made(data, model_seed=SEED, schedule_seed=0, factor=1.0, decay=0.0, step=1):
    """A learner of which each argument changes what is computed, and nothing that its layout or model prints."""
    torch.manual_seed(1)
    model = nn.Sequential(OrderedDict(first=nn.Sequential(Scaled(factor), nn.Linear(24, 5)), head=nn.Linear(5, 3)))
    network = SplitNetwork(model, two_party(model, 1), data, seed=model_seed)

    def optimizer(parameters):
        return torch.optim.SGD([{"params": list(parameters), "weight_decay": decay}], lr=0.1)

    halve = {1: lambda optimizer: StepLR(optimizer, 1), 2: lambda optimizer: StepLR(optimizer, 2)}[step]
    schedule = Schedule(tuple(data.shards), seed=schedule_seed)
    return SplitLearner(network, schedule, optimizer, nn.CrossEntropyLoss(), 3, scheduler=halve)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"model_seed": 8}, r"`model.seed` is \d+ in the checkpoint and 8 here: resume"),
        ({"schedule_seed": 8}, r"`schedule.seed` is 0 in the checkpoint and 8 here: resume"),
        ({"factor": 9.0}, r"`model.first` is .*factor=1.0 in the checkpoint and .*factor=9.0 here: resume"),
        ({"decay": 0.9}, r"`optimizer.param_groups` is one in the checkpoint and .*0.9.* here: resume"),
        ({"step": 2}, r"`scheduler` is <lambda> \w+ in the checkpoint and <lambda> \w+ here: resume"),
    ],
)
def test_what_changes_the_result_and_is_not_printed_is_refused(change, told, tmp_path):
    data, saver = make_data(), ModelCheckpoint(tmp_path, "one")
    make_trainer(tmp_path, [saver], max_epochs=1).fit(made(data), datamodule=data)
    refused = pytest.raises(InputError, match=told) if told else nullcontext()
    with refused:
        make_trainer(tmp_path).fit(made(data, **change), datamodule=data, ckpt_path=tmp_path / "one.ckpt")


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The last mini-batch of an epoch may break the weights behind a loss that was finite."""
    good = saved(tmp_path, max_steps=9, max_epochs=-1).read_bytes()
    with pytest.raises(DivergedError, match=r"weights are not finite after 1 mini-batches: lower `optimizer.lr`"):
        saved(tmp_path, make=rate(float("inf")), max_steps=1, max_epochs=-1)
    assert (tmp_path / "one.ckpt").read_bytes() == good


def test_results_are_json_whatever_the_loss(tmp_path):
    results, learner = Results(tmp_path / "results.json"), make_learner(make_data())
    results.epochs = [{"epoch": 0, "train/loss": float("nan")}]
    results.write(learner)
    loaded = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert loaded["epochs"] == [{"epoch": 0, "train/loss": None}]


class Unfreeze(BaseFinetuning):
    """Lightning's own way to train the first layer of Bob's from the second epoch on."""

    def __init__(self):
        super().__init__()
        self.left_over = []

    def freeze_before_training(self, learner):
        self.freeze(next(learner.network.segments["top"].children()))

    def finetune_function(self, learner, epoch, optimizer):
        first = next(learner.network.segments["top"].children())
        if epoch == 1 and optimizer is learner.stepper.optimizers["bob"]:
            self.unfreeze_and_add_param_group(first, optimizer)

    def on_before_backward(self, trainer, learner, loss):
        self.left_over += [p.grad for p in learner.network.segments["top"].parameters() if p.grad is not None]

    def on_after_backward(self, trainer, learner):
        self.trained = [p.grad is not None for p in learner.network.segments["top"].parameters()]


def test_gradients_of_unfrozen_parameters_are_erased_too(tmp_path):
    data, unfreeze = make_data(), Unfreeze()
    make_trainer(tmp_path, [unfreeze]).fit(make_learner(data, make=rate(0.01)), datamodule=data)
    assert unfreeze.trained == [True] * 6
    assert unfreeze.left_over == []


def test_a_batch_norm_in_eval_mode_stays_there():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(OrderedDict(first=nn.Sequential(nn.Linear(4, 4), norm.eval()), head=nn.Linear(4, 2)))
    source = Source(TensorDataset(torch.randn(6, 4), torch.tensor([0, 1] * 3)), None, 2)
    network = SplitNetwork(model, two_party(["first", "head"], 1), SplitData(source))
    assert not norm.training
    assert network.training

"""Each role's optimizer steps as a hand-written loop would, with clipping and schedulers."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from helpers import ADAM, BLOCKS, SGD, make_rows, net, run_blocks
from pytorch_lightning.callbacks import Callback
from runs import (
    TWO_PARTY,
    Plain,
    batches_of,
    by_hand,
    difference,
    fit,
    fit_plain,
    make_data,
    make_learner,
    make_trainer,
    weights,
)
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from splitlearn.errors import InputError
from splitlearn.layout import whole
from splitlearn.learner import SplitLearner
from splitlearn.network import SplitNetwork
from splitlearn.schedules.aggregation import MeanGradient
from splitlearn.training.optimizers import by_role

WHOLE = whole(BLOCKS)


CLIPS = {
    "norm": partial(nn.utils.clip_grad_norm_, max_norm=0.1),
    "value": partial(nn.utils.clip_grad_value_, clip_value=0.1),
}


@pytest.mark.parametrize("algorithm", CLIPS)
@pytest.mark.parametrize("length", [1, 50])
def test_each_role_is_clipped_by_itself(tmp_path, algorithm, length):
    learner, _ = fit(tmp_path, steps_per_execution=length, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    expected, _ = by_hand(clip=CLIPS[algorithm])
    assert difference(weights(learner), expected) == []
    assert difference(expected, by_hand()[0]) != []


def test_roles_may_have_optimizers_of_their_own(tmp_path):
    learner, trainer = fit(tmp_path, make=SGD, optimizers={"bob": ADAM})
    assert difference(weights(learner), by_hand((SGD, ADAM))[0]) == []
    assert [type(optimizer).__name__ for optimizer in trainer.optimizers] == ["SGD", "Adam"]


@pytest.mark.parametrize("frozen", [0, 1], ids=["alice", "bob"])
def test_a_frozen_role_has_no_optimizer_and_keeps_its_weights(tmp_path, frozen):
    model, reference = net(), net()
    for copy in (model, reference):
        (copy[2:] if frozen else copy[:2]).requires_grad_(False)
    learner, _ = fit(tmp_path, model=model)
    makers = [SGD, SGD]
    makers[frozen] = None
    assert difference(weights(learner), by_hand(makers, model=reference)[0]) == []
    assert list(learner.stepper.optimizers) == [["bob"], ["alice"]][frozen]
    initial = dict(net().named_parameters())
    unchanged = [name for name, p in reference.named_parameters() if torch.equal(p, initial[name])]
    assert unchanged == [name for name in initial if name.startswith(("block3", "head")) == bool(frozen)]


class Unfreeze(Callback):
    """The plain way of fine-tuning, which in plain torch an optimizer of all parameters follows."""

    def __init__(self, name: str, place: tuple[int, int | None]) -> None:
        self.name, self.place = name, place

    def on_train_epoch_start(self, trainer, learner) -> None:
        self._unfreeze(learner, (trainer.current_epoch, None))

    def on_after_backward(self, trainer, learner) -> None:
        self._unfreeze(learner, (trainer.current_epoch, trainer.fit_loop.batch_idx))

    def _unfreeze(self, learner, place) -> None:
        if place == self.place:
            learner.network.get_submodule(self.name).requires_grad_(True)


@pytest.mark.parametrize("place", [(1, None), (0, 4), (1, 4)], ids=["between epochs", "within", "within the last"])
@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (
            "bottom.block2.1",
            r"^`bottom.block2.1.weight` and 1 more of alice would be trained, but no optimizer has it: ",
        ),
        ("top", r"^`top.block3.0.weight` and 5 more of bob would be trained, .* add it to the optimizer$"),
    ],
)
def test_what_is_unfrozen_for_no_optimizer_is_refused(frozen, message, place, tmp_path):
    learner = make_learner(make_data())
    learner.network.segments.get_submodule(frozen).requires_grad_(False)
    learner = SplitLearner(learner.network, learner.schedule, SGD, nn.CrossEntropyLoss(), 3)
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, [Unfreeze(f"segments.{frozen}", place)]).fit(learner, datamodule=make_data())


def test_so_is_what_an_optimizer_leaves_out_on_its_own(tmp_path):
    def matrices(parameters):
        return torch.optim.SGD([p for p in parameters if p.ndim > 1], lr=0.1)

    with pytest.raises(InputError, match=r"^`bottom.block1.0.bias` and 3 more of alice would be trained, but no optim"):
        fit(tmp_path, make=matrices)


class Rates(Callback):
    """Notes the learning rate of every mini-batch."""

    def __init__(self) -> None:
        self.rates = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


STEP = partial(StepLR, step_size=2, gamma=0.5)
COSINE = partial(CosineAnnealingLR, T_max=30)
PLATEAU = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.2)


@pytest.mark.parametrize(
    ("scheduler", "interval", "trainer"),
    [
        (STEP, "epoch", {"max_epochs": 5}),
        (STEP, "step", {}),
        (COSINE, "step", {"max_steps": 13}),
        (COSINE, "epoch", {"max_epochs": 3, "limit_train_batches": 4}),
        (PLATEAU, "epoch", {"max_epochs": 5}),
        (partial(PLATEAU, threshold=0.99), "epoch", {"max_epochs": 4, "val_check_interval": 5}),
    ],
)
def test_schedulers_step_when_lightning_steps_them(tmp_path, scheduler, interval, trainer):
    data, expected, found = make_data(val_rows=6, layout=WHOLE), Rates(), Rates()
    plain = Plain(scheduler=scheduler, interval=interval)
    lightning = make_trainer(tmp_path, [expected], **trainer)
    fit_plain(plain, data, lightning)
    learner = make_learner(data, WHOLE, scheduler=scheduler, interval=interval)
    split = make_trainer(tmp_path, [found], **trainer)
    split.fit(learner, datamodule=data)
    assert found.rates == expected.rates
    assert len(set(found.rates)) > 1
    assert difference(weights(learner), weights(plain)) == []
    states = [[c.scheduler.state_dict() for c in t.lr_scheduler_configs] for t in (split, lightning)]
    assert difference(*states) == []  # of a plateau also the best metric so far


def test_a_broken_off_epoch_does_not_step_a_scheduler_of_epochs(tmp_path):
    _, trainer = fit(tmp_path, scheduler=STEP, trainer={"max_steps": 14})
    assert [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs] == [1, 1]


def test_every_role_has_a_scheduler(tmp_path):
    scheduler = partial(StepLR, step_size=1, gamma=0.1)
    learner, _ = fit(tmp_path, scheduler=scheduler, optimizers={"bob": partial(torch.optim.SGD, lr=0.5)})
    rates = {role: optimizer.param_groups[0]["lr"] for role, optimizer in learner.stepper.optimizers.items()}
    assert rates == {"alice": pytest.approx(0.001), "bob": pytest.approx(0.005)}


def test_a_plateau_follows_the_metric_it_is_told(tmp_path):
    _, trainer = fit(tmp_path, scheduler=PLATEAU, monitor="train/loss")
    assert trainer.lr_scheduler_configs[0].scheduler.best <= float(trainer.callback_metrics["train/loss"])
    with pytest.raises(
        InputError, match=r"`scheduler.monitor` \(=val/loss\) is not measured: choose one of train/loss"
    ):
        fit(tmp_path, scheduler=PLATEAU)


def test_what_cannot_be_made_is_refused_before_training():
    network = SplitNetwork(net(), TWO_PARTY, dict(zip("xy", make_rows(2), strict=True)))
    with pytest.raises(ValueError, match=r"`optimizers.carol` names no role of the layout: alice, bob"):
        by_role(network, SGD, {"carol": SGD})
    with pytest.raises(ValueError, match=r"the optimizer of bob cannot be made: .*momentums.*; change `optimizer`"):
        by_role(network, SGD, {"bob": partial(torch.optim.SGD, lr=0.1, momentums=0.9)})
    with pytest.raises(ValueError, match=r"the optimizer of alice cannot be made: Invalid learning rate: -1"):
        by_role(network, partial(torch.optim.SGD, lr=-1), {})
    with pytest.raises(ValueError, match=r"the scheduler of alice cannot be made: .*; change `scheduler`"):
        by_role(network, SGD, {}, partial(StepLR, steps=3))
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="there is nothing to train"):
        by_role(network, SGD, {})


@pytest.mark.parametrize("num_batches", [2, 3, 4])
def test_accumulated_gradients_are_those_of_the_plain_loop(num_batches, tmp_path):
    """Every tenth mini-batch ends an epoch, and what is left then steps as in Lightning."""
    model, data = net(), make_data()
    optimizer = SGD(model.parameters())
    for epoch in range(2):
        for i, (x, y, number) in enumerate(batches_of(data, epoch)):
            loss = nn.functional.cross_entropy(run_blocks(model.named_children(), x, number), y)
            (loss / num_batches).backward()
            if (i + 1) % num_batches == 0 or i == 9:
                optimizer.step()
                optimizer.zero_grad()
    learner, trainer = fit(tmp_path, accumulate_grad_batches=num_batches)
    assert trainer.global_step == 20
    assert difference(weights(learner), list(model.state_dict().values())) == []


def test_a_validation_leaves_what_waits_alone(tmp_path):
    """Lightning erases gradients in front of a validation, which here is amid those that add up."""

    def trained(**trainer):
        data = make_data(val_rows=6)
        learner, _ = fit(tmp_path, data, accumulate_grad_batches=4, trainer={"max_epochs": 1, **trainer})
        return weights(learner)

    assert difference(trained(val_check_interval=3), trained()) == []


def test_a_turn_ends_in_a_step(tmp_path):
    """With five Alices of two mini-batches each, accumulating three steps behind every turn."""
    steps = []

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(len(self.param_groups[0]["params"]))
            return super().step(closure)

    def make(parameters):
        return Counted(parameters, lr=0.1)

    data = make_data(num_alices=5)
    learner = make_learner(data, make=make, accumulate_grad_batches=3)
    steps.clear()
    make_trainer(tmp_path, max_epochs=1).fit(learner, datamodule=data)
    assert len(steps) == 2 * 5  # two roles


@pytest.mark.parametrize(
    ("schedule", "rule"),
    [
        ({"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"}, r"does not fit `schedule.turn` \(=step\)"),
        ({"turn": 3}, r"\(=2\) must divide `schedule.turn` \(=3\)"),
    ],
)
def test_gradients_that_would_add_up_over_turns_are_refused(schedule, rule):
    with pytest.raises(ValueError, match=rule):
        make_learner(make_data(num_alices=2), schedule=schedule, accumulate_grad_batches=2)


class Sharp(torch.optim.SGD):
    """Takes two steps, as SAM does, and so needs a closure."""

    def step(self, closure=None):
        assert closure is not None, "needs a closure"


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam, Sharp])
def test_an_optimizer_that_wants_more_than_gradients_is_refused(kind):
    with pytest.raises(ValueError, match=rf"optimizer of alice \({kind.__name__}\) cannot step .* no closure"):
        make_learner(make_data(), make=partial(kind, lr=0.1))


@pytest.mark.parametrize("algorithm", ["value", "norm"])
def test_a_role_without_gradients_is_passed_over(algorithm, tmp_path):
    """An Alice who has no mini-batch in a step has none, in a process of her own."""
    learner, _ = fit(tmp_path, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    before = [weight.clone() for weight in weights(learner)]
    learner.stepper.zero_grad()
    learner.stepper.step(["alice", "bob"])
    assert difference(weights(learner), before) == []


@pytest.mark.parametrize(
    "callback",
    [
        pl.callbacks.LearningRateFinder(),
        pl.callbacks.BatchSizeFinder(),
        pl.callbacks.StochasticWeightAveraging(0.1),
        pl.callbacks.EMAWeightAveraging(),
        pl.callbacks.GradientAccumulationScheduler({0: 2}),
        pl.callbacks.BackboneFinetuning(),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_what_steps_an_optimizer_of_its_own_is_refused(callback, tmp_path):
    data = make_data()
    with pytest.raises(InputError, match=rf"`callbacks` \({type(callback).__name__}\) needs one optimizer"):
        make_trainer(tmp_path, [callback]).fit(make_learner(data), datamodule=data)

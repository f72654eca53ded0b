"""A resumed run is the uninterrupted one, to the bit: weights, optimizers, schedulers, bytes, results, logged steps.

Every resumed run has new objects only; it shares nothing with the first one but the checkpoint.
"""

from functools import partial

import pytest
import torch
from helpers import ADAM, BLOCKS, Thaw, cases
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from runs import (
    TWO_PARTY,
    Recorder,
    difference,
    end_state,
    make_data,
    make_learner,
    make_trainer,
    results,
    weights,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from splitlearn.callbacks.results import Results
from splitlearn.errors import InputError
from splitlearn.layout import multi_hop, two_party, u_shaped, whole
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Handoff, Personal

PLATEAU = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.1)
STEP = partial(StepLR, step_size=1, gamma=0.7)


class Marks(Callback):
    """Writes into a checkpoint how much was logged before it."""

    def __init__(self, recorder) -> None:
        self.recorder = recorder

    def on_save_checkpoint(self, trainer, learner, checkpoint) -> None:
        checkpoint["logged"] = len(self.recorder.logged)


def half_precision():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**21, growth_interval=2))


def run(
    folder,
    ckpt=None,
    saves=True,
    callbacks=(),
    num_alices=1,
    layout=TWO_PARTY,
    trainer=None,
    plugins=(),
    sizes=None,
    **learner,
):
    """Train for two epochs of ten mini-batches; a checkpoint behind each of them, and at the end of each epoch."""
    data = make_data(val_rows=6, num_alices=num_alices, layout=layout, sizes=sizes)
    trained, recorder = make_learner(data, layout, **learner), Recorder()
    callbacks = [Results(folder / "results.json"), *callbacks, Marks(recorder)]
    for name, when in saves * (
        ("{step}", {"every_n_train_steps": 1}),
        ("end{epoch}", {"save_on_train_epoch_end": True}),
    ):
        callbacks.append(ModelCheckpoint(folder, f"{name}", save_top_k=-1, auto_insert_metric_name=False, **when))
    settings = {"log_every_n_steps": 4, **(trainer or {})}
    lightning = make_trainer(folder, callbacks, recorder, [make() for make in plugins], **settings)
    lightning.fit(trained, datamodule=data, ckpt_path=ckpt)
    stopping = [c.state_dict() for c in lightning.callbacks if isinstance(c, EarlyStopping)]
    return {**end_state(trained, lightning), "results": results(folder), "stopping": stopping}, recorder.logged


VALIDATE_EVERY_FIVE = {"val_check_interval": 5}
ENDLESS = {"max_steps": 20, "max_epochs": -1}
U_SHAPED = u_shaped(BLOCKS, [1, 3])


def scheme(layout=TWO_PARTY, trainer=None, **schedule):
    """Five Alices with Adam, two mini-batches each in an epoch."""
    return {"make": ADAM, "num_alices": 5, "layout": layout, "schedule": schedule, "trainer": trainer}


# Two Alices an epoch, four mini-batches each: 4 stands between two turns, 5 in a turn, 8 at the end of a round
DRAWN = {"participation": 0.4, "local_epochs": 2, "order": "random"}
# Arguments of `run`, and the checkpoints to go on from: behind so many mini-batches, or the first epoch's end
CASES = {
    "adam, dropout": ({"make": ADAM}, ["1", "9", "10", "end0", "11", "18"]),
    "without validation": ({"trainer": {"limit_val_batches": 0}, "scheduler": STEP}, ["4", "10", "end0"]),
    "validation every three": ({"trainer": {"val_check_interval": 3}}, ["5", "6", "9", "10"]),
    "validation every five": ({"trainer": VALIDATE_EVERY_FIVE, "scheduler": PLATEAU}, ["5", "10", "end0", "15"]),
    "validation across epochs": (
        {"trainer": {"val_check_interval": 7, "check_val_every_n_epoch": None}},
        ["7", "9", "10", "14"],
    ),
    "validation every other epoch": ({"trainer": {"check_val_every_n_epoch": 2}}, ["5", "10", "end0", "15"]),
    "max_steps": ({"trainer": ENDLESS, "scheduler": STEP}, ["4", "10", "end0", "15"]),
    "max_steps, validation every five": ({"trainer": {**ENDLESS, **VALIDATE_EVERY_FIVE}}, ["4", "5", "10", "end0"]),
    "max_steps, no validation": ({"trainer": {**ENDLESS, "limit_val_batches": 0}}, ["4", "10", "end0"]),
    "limit_train_batches": ({"trainer": {"limit_train_batches": 8}, "scheduler": STEP}, ["4", "8", "end0"]),
    "the same, no validation": ({"trainer": {"limit_train_batches": 8, "limit_val_batches": 0}}, ["4", "8", "end0"]),
    "scheduler of steps": ({"scheduler": STEP, "interval": "step"}, ["7", "10", "end0"]),
    "plateau": ({"scheduler": PLATEAU}, ["5", "10", "end0"]),
    "plateau of the training loss": ({"scheduler": PLATEAU, "monitor": "train/loss"}, ["5", "10", "end0"]),
    # behind mini-batch 5 it is the middle of the turn of alice2
    "five alices": ({"make": ADAM, "num_alices": 5, "scheduler": STEP}, ["5", "6", "10", "end0", "15"]),
    "five alices, keep": ({"make": ADAM, "num_alices": 5, "state": "keep"}, ["5", "6", "end0", "15"]),
    "five alices, reset": ({"make": ADAM, "num_alices": 5, "state": "reset"}, ["5"]),
    "sequential by way of a server": (
        scheme(alice=Handoff("keep", "server"), turn=1, order="cyclic"),
        ["1", "5", "10", "13"],
    ),
    "splitfed_v1": (scheme(alice=Average(), bob=Average()), ["1", "5", "6", "10", "end0", "13"]),
    "splitfed_v1, keep": (scheme(U_SHAPED, alice=Average("keep"), bob=Average("keep")), ["5", "10", "13"]),
    "splitfed_v1, carry, some": (
        scheme(multi_hop(BLOCKS, [1, 2]), alice=Average("carry"), bob=Average("carry"), **DRAWN),
        ["3", "4", "8", "13"],
    ),
    "splitfed_v2, validation in a round": (
        scheme(alice=Average("keep"), order="random", trainer={"val_check_interval": 3}),
        ["5", "6", "end0"],
    ),
    "splitfed_v3": (scheme(alice=Personal(), bob=Average("carry")), ["5", "6", "10", "13"]),
    "splitfed_v3, some, validation in a round": (
        scheme(alice=Personal(), bob=Average(), trainer={"val_check_interval": 3}, **DRAWN),
        ["3", "5", "8"],
    ),
    "fedavg by mini-batches": (scheme(whole(BLOCKS), alice=Average("carry"), turn=1), ["3", "5", "7", "end0"]),
    "parallel": (
        scheme(alice=MeanGradient(), bob=MeanGradient(), turn="step", local_epochs=2),
        ["1", "4", "end0", "5"],
    ),
    # three mini-batches and two in the first epoch, three and one in the second
    "epochs of unequal lengths": (
        {**scheme(alice=Average("keep"), participation=0.4, order="random"), "sizes": (12, 10, 7, 6, 4)},
        ["2", "3", "5", "end0", "6"],
    ),
    "the same, in a handful of steps": (
        {**scheme(alice=Personal(), bob=MeanGradient(), turn="step", participation=0.4), "sizes": (12, 10, 7, 6, 4)},
        ["2", "3", "end0", "5"],
    ),
    "parallel, personal": (scheme(alice=Personal(), bob=MeanGradient(), turn="step"), ["1", "end0", "3"]),
    "u-shaped": ({"layout": U_SHAPED}, ["5", "end0"]),
    "16-mixed": ({"plugins": [half_precision], "make": ADAM}, ["1", "5", "end0"]),
    "bf16-mixed": ({"trainer": {"precision": "bf16-mixed"}}, ["5", "end0"]),
    "64-true": ({"trainer": {"precision": "64-true"}, "make": ADAM}, ["5", "end0"]),
    # gradients of one, two and no mini-batches wait
    "accumulated gradients": ({"accumulate_grad_batches": 3, "scheduler": STEP, "interval": "step"}, ["4", "5", "6"]),
    "the same, five alices": ({**scheme(alice=Average("keep")), "accumulate_grad_batches": 3}, ["5", "6", "7"]),
}


# What each of these has to itself, one of the others has together with something else.
SLOW = (
    *("without validation", "validation every five", "validation across epochs", "validation every other epoch"),
    *("max_steps, validation every five", "max_steps, no validation", "the same, no validation"),
    *("plateau of the training loss", "five alices, keep", "five alices, reset", "sequential by way of a server"),
    *("splitfed_v1, keep", "splitfed_v1, carry, some", "splitfed_v2, validation in a round", "splitfed_v3"),
    *("fedavg by mini-batches", "the same, in a handful of steps", "parallel, personal", "bf16-mixed"),
    "the same, five alices",
)


@pytest.mark.parametrize(("case", "names"), cases(CASES, SLOW))
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, case, names):
    whole, logged = run(tmp_path / "whole", **case)
    for name in names:
        ckpt = tmp_path / "whole" / f"{name}.ckpt"
        resumed, logged_after = run(tmp_path / name, ckpt, saves=name == "5", **case)
        assert difference(resumed, whole) == [], name
        seen = torch.load(ckpt, weights_only=True)["logged"]
        seen += name == "end0"  # Lightning logs the metrics of an epoch behind the hook that saves
        assert difference(logged_after, logged[seen:]) == [], name


def test_early_stopping_goes_on_counting(tmp_path):
    def case():
        patient = EarlyStopping("val/loss", patience=3, min_delta=1e9)
        return {"callbacks": [patient], "trainer": {"val_check_interval": 5, "max_epochs": 4}}

    whole, _ = run(tmp_path / "whole", **case())
    assert whole["step, epoch"] == (20, 2)  # a first validation, and three that are not better
    for name in ("5", "7", "10", "15"):
        resumed, _ = run(tmp_path / name, tmp_path / "whole" / f"{name}.ckpt", **case())
        assert difference(resumed, whole) == [], name


class Frost(Callback):
    """Trains Bob's first block in the first epoch alone."""

    def on_train_epoch_start(self, trainer, learner) -> None:
        learner.network.segments["top"].block3.requires_grad_(trainer.current_epoch == 0)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_what_is_frozen_or_unfrozen_in_mid_run_is_so_behind_a_resume(schedule, tmp_path):
    """In a checkpoint behind the first epoch, too, and in one within the second."""
    means = {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step", "local_epochs": 2}
    chosen = {"schedule": means} if schedule == "parallel" else {}

    def case():
        return {"callbacks": [Thaw(), Frost()], "num_alices": 2, "make": ADAM, "trainer": {"max_epochs": 3}, **chosen}

    def trained(folder, ckpt=None):
        end, _ = run(folder, ckpt, **case())
        return {name: end[name] for name in ("weights", "optimizers", "bytes", "rounds")}  # FLOPs are as of the end

    whole = trained(tmp_path / "whole")
    for name in ("5", "end0", "15", "end1", "25"):
        assert difference(trained(tmp_path / name, tmp_path / "whole" / f"{name}.ckpt"), whole) == [], name


@pytest.mark.parametrize("max_steps", [4, 10, 13])
def test_training_that_max_steps_ended_goes_on_with_more(tmp_path, max_steps):
    whole, _ = run(tmp_path / "whole", scheduler=STEP)
    run(tmp_path / "first", scheduler=STEP, trainer={"max_steps": max_steps, "max_epochs": -1})
    for more in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": 20}):
        for name in (str(max_steps), f"end{(max_steps - 1) // 10}"):
            ckpt = tmp_path / "first" / f"{name}.ckpt"
            resumed, _ = run(tmp_path / str(more), ckpt, saves=False, scheduler=STEP, trainer=more)
            assert difference(resumed, whole) == [], (name, more)


@pytest.mark.parametrize(
    "scheme",
    [
        {},
        {"num_alices": 5, "schedule": {"alice": Average(), "bob": Average()}},
        {"num_alices": 5, "schedule": {"alice": Personal(), "bob": Average()}},
    ],
    ids=["one alice", "v1", "v3"],
)
def test_a_checkpoint_saved_behind_a_validation(tmp_path, scheme):
    """It is not repeated; what it measured is in the checkpoint, and of a round that goes on what is trained."""
    case = {"scheduler": PLATEAU, "trainer": VALIDATE_EVERY_FIVE, **scheme}
    when = {"save_top_k": -1, "save_on_train_epoch_end": False, "auto_insert_metric_name": False}
    saver = ModelCheckpoint(tmp_path / "whole", "val{step}", "val/loss", **when)
    whole, logged = run(tmp_path / "whole", callbacks=[saver], **case)
    for step in (5, 10, 15):
        ckpt = tmp_path / "whole" / f"val{step}.ckpt"
        resumed, logged_after = run(tmp_path / str(step), ckpt, saves=False, **case)
        assert difference(resumed, whole) == [], step
        assert difference(logged_after, logged[torch.load(ckpt, weights_only=True)["logged"] :]) == [], step


def test_a_resumed_run_can_be_resumed(tmp_path):
    case = {"make": ADAM, "num_alices": 5, "trainer": VALIDATE_EVERY_FIVE, "scheduler": PLATEAU}
    whole, _ = run(tmp_path / "whole", **case)
    source = tmp_path / "whole"
    for name in ("5", "8", "10", "13"):
        resumed, _ = run(tmp_path / name, source / f"{name}.ckpt", **case)
        assert difference(resumed, whole) == []
        source = tmp_path / name


@pytest.mark.parametrize("name", ["5", "10", "end0"])
def test_other_lengths_of_stretches_resume_to_the_same_bits(tmp_path, name):
    whole, _ = run(tmp_path / "whole", steps_per_execution=1, trainer={"val_check_interval": 5})
    data = make_data(val_rows=6)
    learner = make_learner(data, steps_per_execution=50)
    kept = Results(tmp_path / "results.json")
    trainer = make_trainer(tmp_path, [kept], val_check_interval=5)
    trainer.fit(learner, datamodule=data, ckpt_path=tmp_path / "whole" / f"{name}.ckpt")
    state = {**end_state(learner, trainer), "results": results(tmp_path), "stopping": []}
    assert difference(state, whole) == []


def test_a_finished_run_has_nothing_left_to_train(tmp_path):
    whole, _ = run(tmp_path / "whole")
    resumed, _ = run(tmp_path / "whole", tmp_path / "whole" / "end1.ckpt")
    assert difference(resumed, whole) == []


def test_a_checkpoint_of_another_layout_is_refused_by_name(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError) as error:
        run(tmp_path / "other", tmp_path / "end0.ckpt", layout=two_party(BLOCKS, 1))
    assert TWO_PARTY.describe() in str(error.value)
    assert two_party(BLOCKS, 1).describe() in str(error.value)
    assert "`ckpt`" in str(error.value)


def test_a_checkpoint_that_is_not_ours_is_refused(tmp_path):
    run(tmp_path)
    checkpoint = torch.load(tmp_path / "end0.ckpt", weights_only=True)
    del checkpoint["splitlearn"]
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match="was not saved by splitlearn"):
        run(tmp_path / "other", tmp_path / "foreign.ckpt")


def test_a_checkpoint_that_would_run_code_is_not_loaded(tmp_path):
    run(tmp_path)
    checkpoint = torch.load(tmp_path / "end0.ckpt", weights_only=True)
    torch.save({**checkpoint, "harm": Marks(None)}, tmp_path / "harm.ckpt")
    with pytest.raises(InputError, match="UnpicklingError"):
        run(tmp_path / "other", tmp_path / "harm.ckpt")


def test_testing_a_checkpoint_leaves_the_counts_of_training_alone(tmp_path):
    run(tmp_path)
    data = make_data(val_rows=6)
    learner, trainer = make_learner(data), make_trainer(tmp_path)
    trainer.fit(learner, datamodule=data)
    trained, mean = learner.ledger.table(), learner.mean_loss
    trainer.test(learner, datamodule=data, ckpt_path=tmp_path / "end0.ckpt", verbose=False)
    assert (learner.ledger.table(), learner.mean_loss) == (trained, mean)
    assert (
        difference(weights(learner), list(torch.load(tmp_path / "end0.ckpt", weights_only=True)["state_dict"].values()))
        == []
    )

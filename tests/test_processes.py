"""One process per party trains to the same bits as the simulator, and sends the same bytes."""

import json
import math

import pytest
import torch
from federated import run_tiny, weights_of
from helpers import cases, differences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TWO_PARTY = "layout.cut=2"
# (what is asked, whose checkpoints hold the weights that the simulator ends with, if one set of weights is left)
RUNS = {
    "sequential": (["schedule=sequential"], ["bob", "alice2"]),
    "splitfed_v1": (["schedule=splitfed_v1"], ["bob", "server"]),
    "parallel": (["schedule=parallel"], ["bob", "server"]),
    "fedavg": (["schedule=fedavg"], ["server"]),
    "u_shaped": (["layout=u_shaped"], ["bob", "alice2"]),
    "vertical": (["layout=vertical", "num_alices=2", "layout.cut=1"], ["bob", "alice0", "alice1"]),
}
MORE = {
    "centralised": (["schedule=centralised"], ["alice0"]),
    "sequential, by way of the server": (["schedule.alice.handoff=server"], ["bob", "alice2"]),
    "sequential, keep": (["schedule.alice.optimizer_state=keep"], ["bob", "alice2"]),
    "sequential, reset, cyclic": (["schedule.alice.optimizer_state=reset", "schedule.order=cyclic"], ["bob", "alice0"]),
    "sequential, turns of two, micro-batches": (["schedule.turn=2", "micro_batches=2", "data.batch_size=8"], ["bob"]),
    "sequential, two of three": (["schedule.participation=0.67", "schedule.local_epochs=2"], ["bob"]),
    "labels at alice": (["layout.labels=alice"], ["bob", "alice2"]),
    "splitfed_v1, carry": (["schedule=splitfed_v1", "schedule.alice.optimizer_state=carry"], ["bob", "server"]),
    "splitfed_v2": (["schedule=splitfed_v2"], ["bob", "server"]),
    "splitfed_v2, keep, turns of two": (
        ["schedule=splitfed_v2", "schedule.alice.optimizer_state=keep", "schedule.turn=2"],
        ["bob", "server"],
    ),
    "splitfed_v3": (["schedule=splitfed_v3"], ["bob"]),
    "parallel_personal": (["schedule=parallel_personal"], ["bob"]),
    "large_batch": (["schedule=large_batch"], ["server"]),
    "large_batch, two of three": (["schedule=large_batch", "schedule.participation=0.67"], ["server"]),
    "multi_hop": (["layout=multi_hop"], ["bob", "carol", "alice2"]),
    "multi_hop, splitfed_v1": (["layout=multi_hop", "schedule=splitfed_v1"], ["bob", "carol", "server"]),
    "u_shaped, splitfed_v1": (["layout=u_shaped", "schedule=splitfed_v1"], ["bob", "server"]),
    "u_shaped, splitfed_v3": (["layout=u_shaped", "schedule=splitfed_v3"], ["bob"]),
    "u_shaped, parallel": (["layout=u_shaped", "schedule=parallel"], ["bob", "server"]),
    "extended_vanilla": (["layout=extended_vanilla", "num_alices=2"], ["bob", "carol", "alice0", "alice1"]),
    "what stands twice, and unsaved buffers": (["model._target_=federated.tied"], ["bob", "alice2"]),
    "u_shaped, tied ends": (["layout=u_shaped", "model._target_=federated.tied_ends"], ["bob", "alice2"]),
    "u_shaped, tied ends, splitfed_v1": (
        ["layout=u_shaped", "model._target_=federated.tied_ends", "schedule=splitfed_v1"],
        ["bob", "server"],
    ),
    "what stands twice, averaged": (["model._target_=federated.tied", "schedule=splitfed_v1"], ["bob", "server"]),
    "parallel, layers without a gradient": (
        ["model._target_=federated.experts", "schedule=parallel"],
        ["bob", "server"],
    ),
    "vertical, columns": (
        ["layout=vertical", "num_alices=2", "partition=columns", "data.columns=[[0,1,5],[2,3,4]]"],
        ["bob", "alice0", "alice1"],
    ),
}


def check(asked, holders, wire, configure, tmp_path):
    """`wire` is its name, or name and overrides."""
    name, *more = [wire] if isinstance(wire, str) else wire
    simulated = run_tiny(configure, tmp_path / "simulated", "num_alices=3", *asked)
    engine = ["engine=processes", f"wire={name}", *more]
    ours = run_tiny(configure, tmp_path / "processes", "num_alices=3", *asked, *engine)
    assert ours == simulated
    left = weights_of(tmp_path / "processes", holders)
    expected = {k: v for k, v in weights_of(tmp_path / "simulated").items() if k in left}
    assert differences(left, expected) == []
    assert len(left) >= 2


@pytest.mark.parametrize(("asked", "holders"), cases(RUNS, slow=["parallel", "fedavg"]))
def test_processes_equal_the_simulator(asked, holders, configure, tmp_path):
    check(asked, holders, "gloo", configure, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "holders"), MORE.values(), ids=MORE)
def test_every_scheme_and_layout_equals_the_simulator(asked, holders, configure, tmp_path):
    check(asked, holders, "gloo", configure, tmp_path)


@pytest.mark.slow
def test_what_a_callback_unfreezes_in_mid_run_is_trained_and_counted_as_in_the_simulator(configure, tmp_path):
    asked = [TWO_PARTY, "num_alices=3", "schedule=parallel", "+callbacks.thaw={_target_: helpers.Thaw}"]
    simulated = run_tiny(configure, tmp_path / "simulated", *asked)
    ours = run_tiny(configure, tmp_path / "processes", *asked, "engine=processes")
    assert [ours["bytes"], ours["test"]] == [simulated["bytes"], simulated["test"]]
    left = weights_of(tmp_path / "processes", ["bob", "server"])
    assert differences(left, weights_of(tmp_path / "simulated")) == []


def test_so_they_do_over_grpc(configure, tmp_path, monkeypatch):
    monkeypatch.setattr("splitlearn.certificates._write", None)  # keys made for a run are never written
    check(["layout=multi_hop"], ["bob", "carol", "alice2"], "grpc", configure, tmp_path)


def test_batch_norm_in_micro_batches_is_warned_of(configure, tmp_path):
    with pytest.warns(UserWarning, match="batch norm takes its statistics from each micro-batch"):
        run_tiny(configure, tmp_path, "micro_batches=2", "data.batch_size=14", "trainer.max_epochs=1")


CLIPPED_BY_VALUE = ("trainer.gradient_clip_val=0.1", "trainer.gradient_clip_algorithm=value")
BESIDE = ["gloo", "wire._target_=federated.BesideByGloo"]


def test_so_they_do_where_tensors_go_beside_their_headers(configure, tmp_path):
    asked = ["schedule=splitfed_v1", "layout.cut=2", "micro_batches=2", "data.batch_size=8"]
    check(asked, ["bob", "server"], BESIDE, configure, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "holders"), RUNS.values(), ids=RUNS)
def test_every_kind_of_scheme_equals_the_simulator_with_tensors_beside(asked, holders, configure, tmp_path):
    check(asked, holders, BESIDE, configure, tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("wire", ["gloo", "nccl"])
def test_two_gpus_equal_the_simulator_on_one(wire, configure, tmp_path):
    asked = ["layout.cut=2", "trainer.accelerator=gpu"]
    simulated = run_tiny(configure, tmp_path / "simulated", *asked, "trainer.devices=1")
    ours = run_tiny(configure, tmp_path / "processes", *asked, "engine=processes", f"wire={wire}")
    assert ours == simulated


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "holders"), [*RUNS.values(), *MORE.values()], ids=[*RUNS, *MORE])
def test_every_scheme_and_layout_equals_the_simulator_over_grpc(asked, holders, configure, tmp_path):
    check(asked, holders, "grpc", configure, tmp_path)


TRAINER = {
    "TensorBoard": ["schedule=fedavg", "logger=tensorboard", "trainer.log_every_n_steps=3"],
    "max_steps": ["schedule=fedavg", "trainer.max_steps=15"],  # which ends in mid-round
    "validation in mid-round": [
        *("schedule=splitfed_v1", "schedule.turn=2", "trainer.val_check_interval=5", "trainer.max_steps=13"),
    ],
    "streamed, clipped, plateau": [
        *("layout.cut=2", "data.in_memory=false", "trainer.gradient_clip_val=0.1", "scheduler=plateau"),
    ],
    "accumulated": [
        *("layout.cut=2", "trainer.accumulate_grad_batches=3", "callbacks.checkpoint.monitor=val/loss", "test=best"),
    ],
    "by value": ["schedule=parallel", "schedule.participation=0.67", *CLIPPED_BY_VALUE],
    "validation in a round of fedavg": ["schedule=fedavg", "trainer.val_check_interval=5", "trainer.max_epochs=1"],
    # blocked signals do not hold them
    "workers": ["data.in_memory=false", "data.num_workers=1", "trainer.max_epochs=1"],
}


@pytest.mark.parametrize(
    "asked",
    cases({name: [asked] for name, asked in TRAINER.items()}, slow=["TensorBoard", "max_steps", "workers"]),
)
def test_what_a_trainer_is_asked_holds_for_processes(asked, configure, tmp_path):
    simulated = run_tiny(configure, tmp_path / "simulated", "num_alices=3", *asked)
    assert run_tiny(configure, tmp_path / "run", "num_alices=3", *asked, "engine=processes") == simulated


def test_curves_of_a_party_are_of_the_whole_or_say_whose_they_are(configure, tmp_path):
    asked = ["num_alices=2", "trainer.max_epochs=1", "engine=processes"]
    run_tiny(configure, tmp_path, *asked, "logger=tensorboard")
    (epoch,) = json.loads((tmp_path / "results.json").read_text())["epochs"]
    for party in ("alice0", "alice1", "bob"):
        events = EventAccumulator(str(tmp_path / party / "tensorboard"))
        events.Reload()
        (point,) = events.Scalars("cost/val_accuracy_by_bytes")
        assert point.step == epoch["bytes"]
        tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("bytes/")}
        assert tags
        assert all(party in tag for tag in tags)


def test_only_who_holds_the_loss_draws_it_and_nobody_draws_nan(configure, tmp_path):
    asked = ["trainer.max_epochs=1", "logger=tensorboard", "trainer.log_every_n_steps=2"]
    run_tiny(configure, tmp_path / "simulated", *asked)
    run_tiny(configure, tmp_path / "run", *asked, "engine=processes")
    drawn = {}
    for folder in ("simulated", "run/bob", "run/alice0"):
        events = EventAccumulator(str(tmp_path / folder / "tensorboard"))
        events.Reload()
        drawn[folder] = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        }
        assert all(math.isfinite(value) for curve in drawn[folder].values() for _, value in curve)
    assert len(drawn["simulated"]["train/loss_step"]) > 1
    assert drawn["run/bob"]["train/loss_step"] == drawn["simulated"]["train/loss_step"]
    assert "train/loss_step" not in drawn["run/alice0"]


@pytest.mark.parametrize("schedule", ["sequential", "splitfed_v1"])
def test_a_finished_run_goes_on_with_more_epochs(schedule, configure, tmp_path):
    asked = ["num_alices=3", f"schedule={schedule}", "scheduler=plateau"]
    first = [*asked, "engine=processes", "trainer.max_epochs=1"]
    run_tiny(configure, tmp_path / "first", *first)
    ours = run_tiny(configure, tmp_path / "more", *asked, "engine=processes", f"ckpt={tmp_path}/first")
    assert ours == run_tiny(configure, tmp_path / "whole", *asked)
    left, whole = weights_of(tmp_path / "more", ["bob"]), weights_of(tmp_path / "whole")
    assert differences(left, {name: whole[name] for name in left}) == []

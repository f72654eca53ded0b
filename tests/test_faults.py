"""A party dies: the others notice, nothing is lost, and the run ends as `engine.on_failure` says."""

import json
import os
import re
import signal
import time
from itertools import product
from pathlib import Path
from random import Random
from subprocess import TimeoutExpired

import pytest
from federated import (
    TINY,
    held,
    killer,
    launched,
    results_of,
    run_tiny,
    says,
    started,
    until,
    weights_of,
)
from helpers import differences

from splitlearn.certificates import make_certificates
from splitlearn.errors import InputError
from splitlearn.federation.processes import PartyLostError

SLOW = pytest.mark.slow


def test_stop_says_who_when_and_how_to_go_on(configure, tmp_path):
    asked = ["num_alices=3", "engine=processes", *killer("alice1", 20, tmp_path)]
    with pytest.raises(PartyLostError, match=r"alice1 was lost at about mini-batch [1-9]\d*: .* ckpt="):
        run_tiny(configure, tmp_path / "run", *asked)
    assert "alice1 was lost" in json.loads((tmp_path / "run" / "results.json").read_text())["stopped"]
    whole = run_tiny(configure, tmp_path / "whole", "num_alices=3")
    resumed = run_tiny(configure, tmp_path / "resumed", *asked, f"ckpt={tmp_path}/run")
    assert resumed == whole
    spent = [e["party_seconds"] for e in json.loads((tmp_path / "resumed" / "results.json").read_text())["epochs"]]
    assert [list(each) for each in spent] == [["bob", "alice0", "alice1", "alice2"]] * 2
    for party, what in product(spent[0], ["computing", "waiting", "wire"]):
        assert 0 < spent[0][party][what] <= spent[1][party][what]  # over the resume, too
    assert differences(weights_of(tmp_path / "resumed", ["bob", "alice2"]), weights_of(tmp_path / "whole")) == []


@pytest.mark.parametrize(
    ("party", "by"),
    [("bob", "SIGKILL"), pytest.param("alice1", "SIGKILL", marks=SLOW), pytest.param("alice1", "SIGINT", marks=SLOW)],
)
def test_wait_goes_on_as_if_nothing_had_happened(party, by, configure, tmp_path):
    asked = ["num_alices=3", "engine=processes", "engine.on_failure=wait", *killer(party, 25, tmp_path, by)]
    ours = run_tiny(configure, tmp_path / "run", *asked)
    assert (tmp_path / "killed").exists()
    assert ours == run_tiny(configure, tmp_path / "whole", "num_alices=3")
    assert differences(weights_of(tmp_path / "run", ["bob", "alice2"]), weights_of(tmp_path / "whole")) == []


# Two random deaths over each. V3 and parallel_personal keep weights at each Alice, the vertical one has no server.
SCHEMES = {
    "sequential": ["schedule=sequential"],
    "splitfed_v1": ["schedule=splitfed_v1", "schedule.alice.optimizer_state=carry"],
    "splitfed_v2": ["schedule=splitfed_v2", "schedule.turn=2"],
    "splitfed_v3": ["schedule=splitfed_v3"],
    "parallel": ["schedule=parallel"],
    "parallel_personal": ["schedule=parallel_personal"],
    "fedavg": ["schedule=fedavg", "schedule.alice.optimizer_state=keep"],
    "large_batch": ["schedule=large_batch"],
    "multi_hop": ["layout=multi_hop", "schedule.alice.handoff=server"],
    "vertical": ["layout=vertical", "num_alices=2", "layout.cut=1"],
}
PARTIES = {
    "fedavg": ("server", "alice0", "alice1", "alice2"),
    "large_batch": ("server", "alice0", "alice1", "alice2"),
    "multi_hop": ("bob", "carol", "server", "alice0", "alice1", "alice2"),
    "vertical": ("bob", "alice0", "alice1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["gloo", "grpc"])
@pytest.mark.parametrize("name", SCHEMES)
def test_nothing_is_lost_whoever_dies_and_when(name, wire, configure, tmp_path):
    draw = Random(f"{name} {wire}")
    party = draw.choice(PARTIES.get(name, ("bob", "alice0", "alice1", "alice2")))
    asked = ["num_alices=3", *SCHEMES[name]]
    dying = killer(party, draw.randint(1, 18), tmp_path)
    ours = run_tiny(
        configure, tmp_path / "run", *asked, "engine=processes", f"wire={wire}", "engine.on_failure=wait", *dying
    )
    assert (tmp_path / "killed").exists()
    assert ours == run_tiny(configure, tmp_path / "whole", *asked)


@pytest.mark.parametrize(
    "schedule", ["sequential", pytest.param("splitfed_v2", marks=SLOW), pytest.param("fedavg", marks=SLOW)]
)
def test_skip_goes_on_without_her(schedule, configure, tmp_path):
    asked = ["num_alices=3", f"schedule={schedule}", "engine=processes", "engine.on_failure=skip"]
    left = run_tiny(configure, tmp_path / "run", *asked, *killer("alice1", 12, tmp_path))
    assert left["left_out"] == ["alice1"]
    assert len(left["epochs"]) == 2
    assert 0 <= left["test"]["test/accuracy"] <= 1
    whole = run_tiny(configure, tmp_path / "whole", "num_alices=3", f"schedule={schedule}")
    assert left["epochs"][-1]["step"] == whole["epochs"][-1]["step"]  # her mini-batches are left out, not trained
    assert sum(left["flops"]["alice1"].values()) < sum(whole["flops"]["alice1"].values())
    assert left["flops"]["alice2"] == whole["flops"]["alice2"]


def test_nobody_but_an_alice_can_be_skipped(configure, tmp_path):
    asked = ["num_alices=2", "engine=processes", "engine.on_failure=skip", *killer("bob", 3, tmp_path)]
    with pytest.raises(PartyLostError, match=r"bob was lost .* Only Alices who are not the hub can be skipped"):
        run_tiny(configure, tmp_path / "run", *asked)


@pytest.mark.parametrize("wire", ["gloo", "grpc"])
def test_a_frozen_party_is_noticed_in_time(wire, configure, tmp_path):
    asked = ["num_alices=2", "engine=processes", f"wire={wire}", "engine.timeout=2"]
    with pytest.raises(PartyLostError, match="alice1 was lost"):
        run_tiny(configure, tmp_path / "run", *asked, *killer("alice1", 12, tmp_path, "SIGSTOP"))
    froze = (tmp_path / "killed").stat().st_mtime
    assert time.time() - froze < 2 + 2  # the timeout, and what the others take to end


@pytest.mark.parametrize("wire", ["gloo", "grpc"])
def test_a_dead_party_is_noticed_within_two_seconds(wire, configure, tmp_path):
    asked = ["num_alices=2", "engine=processes", f"wire={wire}"]
    with pytest.raises(PartyLostError, match="alice1 was lost"):
        run_tiny(configure, tmp_path / "run", *asked, *killer("alice1", 12, tmp_path))
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 2


@pytest.mark.parametrize(("party", "wire"), [("bob", "grpc"), ("alice0", "gloo")])
def test_a_program_that_fails_says_how_and_ends_the_run(party, wire, configure, tmp_path):
    breaks = f"+callbacks.breaker={{_target_: federated.Breaker, party: {party}}}"
    with pytest.raises(InputError, match=f"{party}: its program failed by RuntimeError: broken"):
        run_tiny(configure, tmp_path / "run", "num_alices=2", "engine=processes", f"wire={wire}", breaks)


def test_who_evaluates_when_the_last_is_skipped_is_who_had_it_before(configure, tmp_path):
    """alice2 dies in the last turn of all: alice1, who handed the bottom to her, has it, and Bob knows."""
    asked = ["num_alices=3", "engine=processes", "engine.on_failure=skip", "engine.join_timeout=30"]
    dying = [*killer("alice2", 7, tmp_path), "engine.save_every_n_steps=11", "trainer.max_epochs=1"]
    left = run_tiny(configure, tmp_path / "run", *asked, *dying)
    assert left["left_out"] == ["alice2"]
    assert "alice1->bob" in left["evaluation_bytes"]
    assert "alice0->bob" in left["evaluation_bytes"]  # as judged behind her own turn
    assert left["evaluation_bytes"]["alice1->bob"]["activation"] > left["evaluation_bytes"]["alice0->bob"]["activation"]


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["gloo", "grpc"])
def test_wait_holds_from_the_first_greeting_on(wire, configure, tmp_path):
    """alice0 dies while alice1 is awaited and comes again, then Bob does."""
    make_certificates(["bob", "alice0", "alice1"], tmp_path / "certificates")
    secure = lambda party: [f"wire.certificates={tmp_path}/certificates/{party}"] if wire == "grpc" else []  # noqa: E731
    asked = ["num_alices=2", f"wire={wire}", "engine.on_failure=wait", "engine.timeout=5", "engine.join_timeout=200"]
    with started(tmp_path, *asked) as start:
        bob, alice0 = start("bob", *secure("bob")), start("alice0", *secure("alice0"))
        says(tmp_path / "bob.log", "alice0 has come")
        alice0.kill()
        says(tmp_path / "bob.log", "alice0 has gone again")
        alice0 = start("alice0", *secure("alice0"))
        says(tmp_path / "bob.log", "alice0 has come", 2)
        bob.kill()
        says(tmp_path / "alice0.log", "tries again")
        running = [alice0, start("bob", *secure("bob")), start("alice1", *secure("alice1"))]
        assert [process.wait(120) for process in running] == [0, 0, 0], (tmp_path / "alice0.log").read_text()
    whole = run_tiny(configure, tmp_path / "whole", "num_alices=2")
    assert results_of(tmp_path / "alice0") == whole


SIGNALS = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}


@pytest.mark.parametrize("wire", [pytest.param("gloo", marks=SLOW), "grpc"])
def test_a_signal_at_a_party_is_agreed_on_with_those_who_are_ahead(wire, configure, tmp_path):
    """alice2, whose turn begins with mini-batch 9, waits there while alice0 trains her second with a slow Bob."""
    asked = ["num_alices=3", "engine=processes", f"wire={wire}", *killer("alice0", 2, tmp_path, "SIGINT")]
    slow = "+callbacks.slow={_target_: federated.Slow, party: bob, seconds: 0.1}"
    told = r"^alice0 was stopped by Ctrl-C at mini-batch 9\. To go on from mini-batch 9, the newest snapshot of all, "
    with pytest.raises(PartyLostError, match=told):
        run_tiny(configure, tmp_path / "run", *asked, slow, "engine.save_every_n_steps=500")
    assert json.loads((tmp_path / "run" / "alice1" / "results.json").read_text())["stopped"] == (
        "StoppedError: alice0 was stopped by Ctrl-C at mini-batch 9"
    )
    resumed = run_tiny(configure, tmp_path / "resumed", *asked, f"ckpt={tmp_path}/run")
    assert resumed == run_tiny(configure, tmp_path / "whole", "num_alices=3")
    assert differences(weights_of(tmp_path / "resumed", ["bob", "alice2"]), weights_of(tmp_path / "whole")) == []


def stopped_at(folder: Path, party: str, name: str) -> int:
    """Return the mini-batch behind which the run of that folder was stopped, by its one line about it."""
    log = (folder.parent / f"{folder.name}.log").read_text()
    assert "Traceback" not in log
    told = re.findall(
        rf"^splitlearn: {party} was stopped by {name} at mini-batch (\d+)\. To go on from mini-batch (\d+), the newest "
        rf"snapshot of all, .* ckpt={folder}$",
        log,
        re.MULTILINE,
    )
    assert len(told) == log.count("was stopped") == 1, log
    assert told[0][0] == told[0][1]
    return int(told[0][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wire", "party", "by"),
    [("gloo", "alice0", "SIGINT"), ("grpc", "bob", "SIGTERM"), ("grpc", "alice1", "SIGHUP"), ("gloo", "bob", "SIGINT")],
)
def test_a_signal_ends_all_behind_a_snapshot_of_that_moment(wire, party, by, configure, tmp_path):
    tls = ["wire.tls=off"] if wire == "grpc" else []
    asked = ["num_alices=2", f"wire={wire}", *tls, "trainer.max_epochs=3"]
    parties = ("bob", "alice0", "alice1")
    with started(tmp_path, *asked, *held(tmp_path)) as start:
        running = {one: start(one) for one in parties}
        until((tmp_path / "held").exists, 300)
        running[party].send_signal(signal.Signals[by])
        time.sleep(1)  # until all have heard of it
        (tmp_path / "go").touch()
        codes = {one: process.wait(60) for one, process in running.items()}
    assert codes == {**dict.fromkeys(parties, 1), party: 128 + signal.Signals[by]}
    steps = {one: stopped_at(tmp_path / one, party, SIGNALS[by]) for one in parties}
    assert len({*steps.values()}) == 1  # long before any snapshot that is taken anyway
    (tmp_path / "again").mkdir()
    with started(tmp_path / "again", *asked) as start:
        again = [start(one, f"ckpt={tmp_path}/{one}") for one in parties]
        assert [process.wait(300) for process in again] == [0, 0, 0]
    assert results_of(tmp_path / "again" / "bob") == run_tiny(configure, tmp_path / "whole", *asked[:1], asked[-1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulated", "processes"])
@pytest.mark.parametrize("by", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_one_command_for_all_ends_by_a_signal_in_one_line(engine, by, tmp_path):
    asked = [*TINY, "num_alices=2", *held(tmp_path), f"engine={engine}", f"hydra.run.dir={tmp_path}/run"]
    process = launched(*asked, out=tmp_path / "log")
    until((tmp_path / "held").exists, 300)
    if by == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the processes of all parties
    else:
        process.send_signal(signal.Signals[by])
    time.sleep(1)
    (tmp_path / "go").touch()
    assert process.wait(60) == 128 + signal.Signals[by]
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    line = rf"^splitlearn: the run was stopped by {SIGNALS[by]} (?:at|behind) mini-batch (\d+)\. .* ckpt=(\S+)$"
    told = re.findall(line, said, re.MULTILINE)
    assert len(told) == 1, said
    ((step, ckpt),) = told
    of_parties = {path.name.rpartition("-")[2] for path in Path(ckpt).glob("*/snapshots/*.ckpt")}
    assert of_parties == (set() if engine == "simulated" else {f"step{step}.ckpt"})
    assert "was stopped by" in json.loads((tmp_path / "run" / "results.json").read_text())["stopped"]


@pytest.mark.slow
def test_a_second_signal_ends_at_once_with_the_snapshot_before(tmp_path):
    asked = [*TINY, "num_alices=2", *held(tmp_path), "engine=processes", f"hydra.run.dir={tmp_path}/run"]
    process = launched(*asked, "engine.save_every_n_steps=4", "engine.timeout=300", out=tmp_path / "log")
    until((tmp_path / "held").exists, 300)
    process.send_signal(signal.SIGINT)
    with pytest.raises(TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(100) == 128 + signal.SIGINT
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert re.search(
        r"^splitlearn: the run was stopped by Ctrl-C at about mini-batch [56]\. .* mini-batch 4, ", said, re.M
    )

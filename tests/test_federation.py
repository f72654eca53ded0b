"""What the processes of a run agree on before the first mini-batch, and what they refuse."""

import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from commands import run_command
from federated import TINY, TOLD, results_of, run_tiny
from helpers import BLOCKS as NET
from helpers import make_network
from omegaconf import OmegaConf

from splitlearn.certificates import make_certificates
from splitlearn.errors import InputError
from splitlearn.federation.frame import FrameError
from splitlearn.federation.greetings import agree, check_greeting, check_welcome, warn_of_threads
from splitlearn.federation.launch import _as_rank, _play_of, _take_gpu, shared_by_all
from splitlearn.federation.party import LOST, Attempt, Federation, parties_of
from splitlearn.federation.processes import PartyLostError, Processes
from splitlearn.federation.remote_wire import RemoteWire
from splitlearn.federation.snapshots import newest_common, path_of, steps_in
from splitlearn.federation.streams import AgainError, DifferenceError
from splitlearn.federation.wiring import GlooWiring, GrpcWiring
from splitlearn.layout import multi_hop, two_party, u_shaped, vertical, whole
from splitlearn.learner import SplitLearner
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Handoff, Personal
from splitlearn.train import train

BLOCKS = ("a", "b", "c")
TWO_PARTY = two_party(BLOCKS, 1)
RUN, OTHER = "0" * 32, "1" * 32
DIGEST = "0123456789abcdef"


def greeting(**changes):
    same = {"version": "1", "torch": "2", "layout": "L", "model": "M", "num_alices": "2", "schedule": "S"}
    own = {"party": "bob", "data": "100 rows", "config": {"optimizer.lr": 0.1}, "resumes": False}
    return {**same, **own, **TOLD, **changes}


@pytest.mark.parametrize(
    ("layout", "num_alices", "sharings", "parties"),
    [
        (TWO_PARTY, 2, {}, ["bob", "alice0", "alice1"]),
        (TWO_PARTY, 2, {"alice": Handoff(handoff="server")}, ["bob", "server", "alice0", "alice1"]),
        (TWO_PARTY, 2, {"alice": Average()}, ["bob", "server", "alice0", "alice1"]),
        (TWO_PARTY, 2, {"alice": Personal(), "bob": Average()}, ["bob", "alice0", "alice1"]),
        (TWO_PARTY, 1, {"alice": Handoff(handoff="server")}, ["bob", "alice0"]),
        (multi_hop(BLOCKS, [1, 2]), 1, {}, ["bob", "carol", "alice0"]),
        (multi_hop(BLOCKS, [1], parties=["alice", "zoe"]), 1, {}, ["zoe", "alice0"]),
        (u_shaped(BLOCKS, [1, 2]), 1, {}, ["bob", "alice0"]),
        (vertical(BLOCKS, 1, num_alices=2), 2, {}, ["bob", "alice0", "alice1"]),
        (whole(BLOCKS), 2, {"alice": Average()}, ["server", "alice0", "alice1"]),
        (whole(BLOCKS), 2, {"alice": MeanGradient(), "turn": "step"}, ["server", "alice0", "alice1"]),
        (whole(BLOCKS), 2, {}, ["alice0", "alice1"]),
        (whole(BLOCKS), 1, {}, ["alice0"]),
    ],
)
def test_the_parties_of_a_run_the_hub_first(layout, num_alices, sharings, parties):
    schedule = Schedule(layout.takers(num_alices), **sharings)
    assert parties_of(SimpleNamespace(layout=layout, schedule=schedule)) == parties


ALIKE = {
    **{"classes": "cat, dog", "number of rows": "8"},
    **dict.fromkeys(("labels", "rows", "order of rows"), DIGEST),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "3"}, "`torch` is 2 at bob and 3 at alice0"),
        ({"data": "99 rows"}, "`data` is 100 rows at bob and 99 rows at alice0: the data must be the same"),
        ({"layout": "U"}, "`layout` is L at bob and U at alice0"),
        ({"config": {"optimizer.lr": 0.2}}, "`optimizer.lr` is 0.1 at bob and 0.2 at alice0"),
        ({"config": {"optimizer.lr": 0.1, "seed": 1}}, "`seed` is None at bob and 1 at alice0"),
        ({"resumes": True}, "`start` is anew at bob and behind a run \\(`ckpt`\\) at alice0"),
        (
            {"alike": {**ALIKE, "classes": "cat, ship"}},
            "`classes` is cat, dog at bob and cat, ship at alice0: give both",
        ),
        (
            {"alike": {**ALIKE, "number of rows": "9"}},
            "`number of rows` is 8 at bob and 9 at alice0: give both the same",
        ),
        (
            {"alike": {**ALIKE, "labels": "0" * 16}},
            "`labels` is not the same at bob and alice0: the same rows, but in an",
        ),
        (
            {"alike": {**ALIKE, "labels": "0" * 16, "rows": "1" * 16}},
            "`labels` is not the same at bob and alice0: give both",
        ),
        (
            {"alike": {**ALIKE, "order of rows": "0" * 16}},
            "`order of rows` is not .*: the same rows, but in another order: ",
        ),
    ],
)
def test_a_difference_is_named(change, message):
    check_greeting(greeting(alike=ALIKE), greeting(party="alice0", alike=ALIKE), "bob")
    with pytest.raises(DifferenceError, match=f"^{message}"):
        check_greeting(greeting(alike=ALIKE), greeting(**{"party": "alice0", "alike": ALIKE, **change}), "bob")


def test_the_configuration_is_compared_before_the_data():
    """The first of all differences, mended one by one: what has words comes before what has none."""
    wrong = {"version": "0", "torch": "3", "config": {"optimizer.lr": 0.2}, "layout": "U"}
    wrong |= {"alike": {"labels": DIGEST[::-1]}, "data": "8 rows split as 1"}
    told = []
    while wrong:
        with pytest.raises(DifferenceError) as refused:
            check_greeting(greeting(alike={"labels": DIGEST}), greeting(party="alice0", **wrong), "bob")
        told.append(re.match("`([a-z.]+)` is", str(refused.value))[1])
        wrong.pop({"optimizer.lr": "config", "labels": "alike"}.get(told[-1], told[-1]))
    assert told == ["version", "torch", "optimizer.lr", "labels", "layout", "data"]


def test_a_difference_far_into_a_long_text_is_shown():
    ours, theirs = (f"{500 * 'a'}{end}{500 * 'b'}" for end in ("cut 1", "cut 2"))
    with pytest.raises(
        DifferenceError, match=r"`model` is \.\.\.aaa.*cut 1bb.* at bob and \.\.\.aaa.*cut 2bb.* at alice0"
    ):
        check_greeting(greeting(model=ours), greeting(party="alice0", model=theirs), "bob")


NO_GREETING = [
    *({"version": 1}, {"torch": None}, {"threads": [1]}, {"threads": True}, {"threads": -1}, {"snapshots": None}),
    *({"snapshots": {"x": [1]}}, {"snapshots": {RUN: [-1]}}, {"snapshots": {RUN: 1}}, {"common": ["../" + RUN]}),
    *({"run": 7}, {"run": "../x"}, {"run": RUN[1:]}, {"run": RUN[1:] + "G"}, {"nonce": "0"}, {"nonce": RUN + "0"}),
    *({"config": []}, {"alike": {"rows": 1}}, {"file": {}}, {"gpu": 1}, {"certificate": 7}, {"data": ["x"]}),
]


@pytest.mark.parametrize("change", NO_GREETING, ids=str)
def test_what_is_no_greeting_is_refused_by_name_and_does_not_count_as_another_run(change):
    with pytest.raises(
        InputError, match=f"`{next(iter(change))}` of the greeting of alice0 is .*, which has no sense"
    ) as e:
        check_greeting(greeting(), greeting(party="alice0", **change), "bob")
    assert not isinstance(e.value, DifferenceError)


@pytest.mark.parametrize("key", ["config", "snapshots", "nonce", "alike"])
def test_what_a_greeting_lacks_is_named(key):
    theirs = {name: value for name, value in greeting(party="alice0").items() if name != key}
    with pytest.raises(InputError, match=f"`{key}` of the greeting of alice0 is missing"):
        check_greeting(greeting(), theirs, "bob")


def test_what_a_greeting_says_is_cut_and_escaped():
    for change in (
        {"torch": "\x1b[2J" + 2**20 * "x"},
        {"threads": "\n\x9b" + 2**20 * "x"},
        {"config": {"\r\u202e": 1}},
    ):
        with pytest.raises(InputError) as refused:
            check_greeting(greeting(), greeting(party="alice0", **change), "bob")
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 400


def test_a_greeting_brings_a_certificate_of_the_runs_ca_or_none(tmp_path):
    for folder in ("ours", "theirs"):
        make_certificates(["alice0", "alice1"], tmp_path / folder)
    ca = (tmp_path / "ours" / "alice0" / "ca.crt").read_bytes()

    def check(path, nonce=RUN):
        shown = path and (tmp_path / path / "party.crt").read_text()
        check_greeting(greeting(nonce=RUN), greeting(party="alice0", certificate=shown, nonce=nonce), "bob", ca)

    check("ours/alice0")
    for path, message in (
        ("ours/alice1", "the certificate is of alice1, and must be of alice0"),
        ("theirs/alice0", "the certificate shown for alice0 is not signed by the run's CA"),
        (None, "`certificate` and `nonce` of alice0 must be there"),
    ):
        with pytest.raises(InputError, match=message):
            check(path)
    with pytest.raises(InputError, match="`certificate` and `nonce` of alice0 must be there"):
        check("ours/alice0", nonce="")
    with pytest.raises(InputError, match="a certificate is not PEM"):
        check_greeting(greeting(nonce=RUN), greeting(party="alice0", certificate="x", nonce=RUN), "bob", ca)


def welcome(**changes):
    each = {"certificates": {"bob": None, "alice0": None}, "nonces": {"bob": "", "alice0": ""}}
    return {"party": "bob", "parties": ["bob", "alice0"], "run": RUN, "step": 4, "gone": ["alice1"], **each, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "x"}, "`run` of the welcome of bob is x, which has no sense"),
        ({"step": "4"}, "`step` of the welcome of bob is 4, which has no sense"),
        ({"gone": None}, "`gone` of the welcome of bob is None"),
        ({"gone": []}, "`parties` of the welcome of bob is bob, alice0, and must be bob, alice0, alice1"),
        (
            {"parties": ["bob", "x\x1b", "alice0"]},
            r"`parties` of the welcome of bob is bob, x\\x1b, alice0, and must be",
        ),
        ({"parties": ["bob"], "gone": ["alice0", "alice1"]}, "`parties` of the welcome of bob"),
        ({"nonces": {"bob": ""}}, "`nonces` of the welcome of bob must have one for each of bob, alice0"),
        ({"certificates": {"bob": 1, "alice0": None}}, "`certificates` of the welcome of bob must have"),
    ],
)
def test_a_welcome_that_is_none_is_refused(change, message):
    parties = ["bob", "alice0", "alice1"]
    check_welcome(welcome(), greeting(party="alice0"), parties)
    with pytest.raises(InputError, match=message):
        check_welcome(welcome(**change), greeting(party="alice0"), parties)


def test_the_largest_message_is_weights_or_the_activation_of_a_mini_batch():
    """Room for 8 bytes an element: `net` has 480 in its largest weights, and takes 24 a row, more than it passes on."""
    federation = Federation(Attempt("bob", "127.0.0.1:0"), GrpcWiring(), 1, 1, 1, None)
    federation.learner = SimpleNamespace(network=make_network(two_party(NET, 2)))
    for rows, elements in (((4, 7), 480), ((21, 7), 504), ((4, 1000), 24_000)):
        federation.data = SimpleNamespace(batch_size=rows[0], eval_batch_size=rows[1])
        assert federation._largest() == 8 * elements
    federation.data = SimpleNamespace(batch_size=25_000_000, eval_batch_size=1)
    with pytest.raises(InputError, match="a message may have 2,400,000,000 bytes, and gRPC takes"):
        federation._largest()
    federation.wiring = GlooWiring()
    assert federation._largest() == 8 * 600_000_000


def test_other_numbers_of_threads_are_warned_of(recwarn):
    greetings = {"bob": greeting(threads=2), "alice0": greeting(threads=2)}
    warn_of_threads(greetings)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"threads differ \(bob 2, alice0 2, alice1 4\)"):
        warn_of_threads({**greetings, "alice1": greeting(threads=4)})


def test_so_they_are_in_a_run(configure, tmp_path):
    with pytest.raises((InputError, PartyLostError), match=r"threads differ \(bob 1, alice0 2\)"):
        run_tiny(configure, tmp_path, "engine=processes", "wire._target_=federated.MoreThreads")


def test_a_new_run_begins_at_its_start_whatever_lies_about():
    run, step = agree({"bob": greeting(snapshots={OTHER: [5]}), "alice0": greeting(snapshots={OTHER: [5]})}, None)
    assert (len(run), step) == (32, 0)
    assert run != OTHER


def test_who_waits_goes_on_with_the_newest_step_that_all_have():
    greetings = {
        "bob": greeting(run=RUN, snapshots={RUN: [4, 8]}),
        "alice0": greeting(snapshots={RUN: [2, 4], OTHER: [8]}),
    }
    assert agree(greetings, None) == (RUN, 4)


def test_a_run_that_ended_before_all_had_a_snapshot_begins_anew():
    assert agree({"bob": greeting(run=RUN, snapshots={RUN: [4]}), "alice0": greeting()}, None) == (RUN, 0)


def test_who_lacks_what_all_had_is_named():
    waits = greeting(run=RUN, snapshots={RUN: [4]}, common=[RUN])
    with pytest.raises(InputError, match=r"alice0 has none of this run.*hydra.run.dir"):
        agree({"bob": waits, "alice0": greeting()}, None)
    with pytest.raises(InputError, match="no step of which all have a snapshot"):
        agree({"bob": greeting(resumes=True, snapshots={RUN: [4]}), "alice0": greeting(resumes=True)}, None)


def test_a_resumed_run_goes_on_with_the_newest_of_all(tmp_path):
    assert newest_common([{RUN: [1, 2], OTHER: [9]}, {RUN: [2, 3], OTHER: [9]}]) == (OTHER, 9)
    assert newest_common([{OTHER: [9], RUN: [1, 2]}, {RUN: [2, 3], OTHER: [9]}]) == (RUN, 2)  # a later run's
    assert newest_common([{RUN: [1]}, {RUN: [2]}]) is None
    for name in (f"{RUN}-step10.ckpt", f"{RUN}-step9.ckpt", "last.ckpt", f"{RUN}-step11.ckpt.tmp"):
        (tmp_path / name).touch()
    assert steps_in([tmp_path]) == {RUN: [9, 10]}


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped"])
def test_of_damaged_snapshots_none_is_offered(damage, tmp_path):
    folders = tmp_path / "own", tmp_path / "earlier"
    for folder, steps in zip(folders, ([4, 8], [8, 12]), strict=True):
        folder.mkdir()
        for step in steps:
            torch.save({"weights": torch.arange(1000.0)}, folder / f"{RUN}-step{step}.ckpt")
    for path in (folders[0] / f"{RUN}-step8.ckpt", folders[1] / f"{RUN}-step12.ckpt"):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"cut": whole[:middle], "emptied": b"", "flipped": flipped}[damage])
    with pytest.warns(UserWarning, match=f"{RUN}-step12.ckpt is damaged: the snapshot before it counts"):
        assert steps_in(folders, whole=True) == {RUN: [4, 8]}
    assert path_of(folders, RUN, 8) == folders[1] / f"{RUN}-step8.ckpt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_failure": "pray"}, r"`engine.on_failure` \(=pray\) must be one of stop, wait, skip"),
        ({"timeout": 0}, r"`engine.timeout` \(=0\) must be a number above 0"),
        ({"join_timeout": "long"}, r"`engine.join_timeout` \(=long\) must be a number above 0"),
        ({"save_every_n_steps": -1}, r"`engine.save_every_n_steps` \(=-1\)"),
        ({"address": "nowhere"}, r"`engine.address` \(=nowhere\) must be HOST:PORT"),
        ({"party": "bob"}, r"`engine.address` \(=127.0.0.1:0\) must name a port when `engine.party` \(=bob\) is given"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        Processes(**settings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["trainer.max_time=00:01:00:00"], r"`trainer.max_time` .* take trainer.max_steps"),
        (["trainer.val_check_interval=00:00:01:00"], "`trainer.val_check_interval` .* take a number of mini-batches"),
        (["+trainer.val_check_interval.seconds=9"], "`trainer.val_check_interval` .* take a number of mini-batches"),
        (
            ["+callbacks.checkpoint.train_time_interval={_target_: datetime.timedelta, seconds: 1}"],
            "`callbacks.checkpoint.train_time_interval` .* take every_n_train_steps",
        ),
        (["link=wan"], "`link` predicts in the simulator"),
        (["ckpt=nowhere"], r"`ckpt` \(=nowhere\) must be the folder of a run"),
        (["layout.cut=9"], r"`layout.cut` \(=9\) must lie between 1 and 3"),
        (["wire=grpc", "wire.tls=maybe"], r"`wire.tls` \(=maybe\)"),
        (["wire=grpc", "wire.certificates=nowhere"], "nowhere"),
        (["wire._target_=federated.OneGpu"], "takes a GPU for each party, and bob and alice0 are on the same, GPU-7"),
        (["wire=nccl", "trainer.accelerator=cpu"], r"`wire` \(=nccl\) goes from GPU to GPU, and .* computes on cpu"),
        (["layout=vertical", "num_alices=2", "layout.cut=1", "engine.on_failure=skip"], "every Alice owns columns"),
        (["engine.party=mallory", "engine.address=127.0.0.1:29431"], "`engine.party` .*mallory.* must be one of"),
        (["engine.party=alice0", "engine.address=127.0.0.1:29432", "engine.join_timeout=1"], "bob does not answer"),
        (
            ["engine.party=bob", "engine.address=127.0.0.1:29433", "engine.join_timeout=1"],
            "alice0 did not come within 1 s",
        ),
        (
            ["engine.party=bob", "engine.address=192.0.2.1:29434", "wire=grpc", "wire.tls=off"],
            "in the clear, on loopback alone",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(asked, message, configure, tmp_path):
    with pytest.raises(InputError, match=message):
        run_tiny(configure, tmp_path, "engine=processes", *asked)


def test_what_a_host_has_in_its_own_way_is_not_compared(configure):
    one = shared_by_all(configure(*TINY, "engine=processes", "data.num_workers=3", "trainer.devices=[0]"))
    other = shared_by_all(configure(*TINY, "engine=processes", "engine.party=bob", "engine.address=h:1", "ckpt=x"))
    assert one == other
    assert one != shared_by_all(configure(*TINY, "engine=processes", "optimizer.lr=0.5"))
    assert "optimizer.lr" in one


@pytest.mark.slow
def test_early_stopping_stops_all_at_one_epoch(configure, tmp_path):
    stop = "+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/loss, patience: 1}"
    asked = ["num_alices=2", "optimizer.lr=0.1", "trainer.max_epochs=30", stop]
    whole = run_tiny(configure, tmp_path / "whole", *asked)
    assert len(whole["epochs"]) < 30
    assert run_tiny(configure, tmp_path / "run", *asked, "engine=processes") == whole


def test_a_rank_takes_its_own_certificates(configure, monkeypatch):
    told = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    cfg = configure(*TINY, "num_alices=2", "engine=processes", "wire=grpc", "wire.certificates=all")
    engine = _as_rank(cfg, Processes())
    assert (engine.party, engine.address, cfg.wire.certificates) == ("alice0", "h:2", "all/alice0")


def test_parties_that_are_started_together_take_the_gpus_of_the_host_in_turn(configure, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def devices(place: int, *asked: str) -> object:
        _take_gpu(cfg := configure(*TINY, *asked), place)
        return cfg.trainer.devices

    assert [devices(place, "trainer.accelerator=auto") for place in range(3)] == [[0], [1], [0]]
    assert devices(1, "trainer.accelerator=cpu") == configure(*TINY).trainer.devices


@pytest.mark.slow
def test_a_sweep_runs_one_federation_after_the_other(tmp_path):
    asked = ["-m", "+experiment=digits_2party", "engine=processes"]
    more = ["layout.cut=1,2", "trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    done = run_command(*asked, *more, f"hydra.sweep.dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(lines) == 3
    accuracies = {line.split(",")[1] for line in lines[1:]}
    assert len(accuracies) == 1  # where the network is cut changes nothing


@pytest.mark.slow
def test_under_torchrun_each_rank_plays_a_party(configure, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    asked = ["splitlearn.train", "+experiment=digits_2party", "trainer.max_epochs=1"]
    more = ["engine=processes", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    subprocess.run([*command, *asked, *more, f"hydra.run.dir={tmp_path}/run"], check=True)
    train(configure(*asked[1:], f"output_dir={tmp_path}/whole"))
    assert results_of(tmp_path / "run") == results_of(tmp_path / "whole")


def delaying(listener: socket.socket, to: int, seconds: float, bytes_per_second: float) -> None:
    """Pass on what connects to `listener`, both ways, so much later and no faster."""

    def pump(src: socket.socket, dst: socket.socket) -> None:
        due: queue.SimpleQueue = queue.SimpleQueue()

        def deliver() -> None:
            while (item := due.get()) is not None:
                when, chunk = item
                time.sleep(max(0.0, when - time.monotonic()))
                with suppress(OSError):  # the run is over
                    dst.sendall(chunk)

        threading.Thread(target=deliver, daemon=True).start()
        free = 0.0
        while chunk := src.recv(2**16):
            free = max(free, time.monotonic()) + len(chunk) / bytes_per_second
            due.put((free + seconds, chunk))

    def serve() -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", to))
                except ConnectionRefusedError:  # Bob has not come yet: Alice tries again
                    near.close()
                    continue
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()


@pytest.mark.slow
def test_a_slow_link_takes_as_long_as_the_link_model_predicts(configure, tmp_path):
    """100 ms and 10 Mbit/s each way, between the processes of Bob and Alice: far more than what else they wait for."""
    asked = ["+experiment=digits_2party", "model.hidden_sizes=[256,256]", "trainer.max_epochs=1", "logger=none"]
    quick = ["data.val_fraction=0", "metric=null", "trainer.limit_train_batches=20", "~callbacks.per_alice"]
    train(
        configure(*asked, *quick, "link.bandwidth=10Mbit/s", "link.latency=100ms", f"output_dir={tmp_path}/predicted")
    )
    predicted = json.loads((tmp_path / "predicted" / "results.json").read_text())["link"]["seconds"]
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as free:
        proxy, port = listener.getsockname()[1], free.getsockname()[1]
        free.close()
        delaying(listener, port, 0.1, 10e6 / 8)
        own = {"bob": port, "alice0": proxy}
        runs = [
            configure(*asked, *quick, "engine=processes", "wire=grpc", "wire.tls=off", f"engine.party={party}")
            for party in own
        ]
        for (party, at), cfg in zip(own.items(), runs, strict=True):
            cfg.engine.address, cfg.output_dir = f"127.0.0.1:{at}", str(tmp_path / party)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(train, runs))
    parties = json.loads((tmp_path / "alice0" / "results.json").read_text())["parties"]
    assert predicted > 20 * 0.2
    assert parties["alice0"]["seconds"]["waiting"] == pytest.approx(predicted, rel=0.2)


def test_a_terminal_with_one_party_shows_what_the_simulators_does(configure, tmp_path):
    cfg = configure(*TINY, "trainer.enable_progress_bar=true")

    def shown(party: str, *parties: str) -> dict:
        own = OmegaConf.create(_play_of(cfg, Processes(), party, [*parties], tmp_path).args[0])
        return {"bar": own.trainer.enable_progress_bar, "drawing": "layout_drawing" in own.callbacks}

    assert shown("alice0", "alice0") == {"bar": True, "drawing": True}
    assert shown("bob", "bob", "alice0") == {"bar": True, "drawing": False}  # it was drawn by who started them
    assert shown("alice0", "bob", "alice0") == {"bar": False, "drawing": False}


def test_who_is_waited_for_is_said_once_in_a_wait(capsys, monkeypatch):
    monkeypatch.setattr("splitlearn.federation.party.LONG", 0.05)
    federation = Federation(Attempt("bob", "127.0.0.1:0", alone=True), GlooWiring(), 1, 1, 1, None)
    threading.Thread(target=federation._tell_waits, daemon=True).start()
    for awaited in (("alice0", 0.0), ("alice1", time.perf_counter() + 60), ("alice0", 1.0), None):
        federation.wire.awaited = awaited
        time.sleep(0.3)
    assert capsys.readouterr().err == 2 * "splitlearn: bob: waits for alice0\n"


def test_what_is_awaited_is_known_while_it_is():
    wire, seen = RemoteWire("bob"), []

    def receive_head(src: str) -> bytes:
        seen.append(wire.awaited[0])
        return b""

    wire.connect(SimpleNamespace(receive_head=receive_head), ["bob", "alice0"], bytes(16))
    with pytest.raises(FrameError):
        wire._hear("alice0")
    assert (seen, wire.awaited) == (["alice0"], None)


def test_a_loss_is_noticed_before_the_trainer_has_begun(monkeypatch):
    posted, ended = [], []
    federation = Federation(Attempt("bob", "127.0.0.1:0"), GlooWiring(), 1, 1, 1, posted.append)
    monkeypatch.setattr("os._exit", ended.append)
    federation._lost("alice0", "died")
    federation.trainer, federation.learner = pl.Trainer(logger=False), SplitLearner.__new__(SplitLearner)
    federation._lost("alice0", "died")
    federation.stopped(signal.SIGTERM)
    assert posted[:2] == 2 * [{"lost": "alice0", "why": "died", "step": 0}]
    assert posted[2:] == [{"lost": "bob", "why": "was stopped by SIGTERM", "step": 0}]
    assert ended == [LOST, LOST, 128 + signal.SIGTERM]


def test_who_is_lost_while_all_halt_is_lost_since_another_was_stopped(monkeypatch):
    posted, ended = [], []
    federation = Federation(Attempt("bob", "127.0.0.1:0"), GlooWiring(), 1, 1, 1, posted.append)
    monkeypatch.setattr("os._exit", ended.append)
    federation.halt.who, federation.halt.number = "alice1", signal.SIGHUP
    federation._lost("alice0", "its process ended")
    federation.stopped(signal.SIGTERM)  # this one, too, has an exit code of its own
    federation._lost("alice0", "its process ended")
    assert posted == [
        {"lost": "alice1", "why": "was stopped by SIGHUP", "step": 0},
        {"lost": "bob", "why": "was stopped by SIGTERM", "step": 0},
    ]
    assert ended == [LOST, 128 + signal.SIGTERM]


@pytest.mark.parametrize(
    ("waits", "alone", "tries"), [(False, True, 1), (False, False, 1), (True, True, 3), (True, False, 1)]
)
def test_who_could_not_join_tries_again_where_parties_are_waited_for(waits, alone, tries, monkeypatch, capsys):
    """With one command for all, who started it starts all again."""
    joins, lost = [], []

    class Refused:
        def __init__(self, *terms) -> None:
            pass

        def join(self, greeting, timeout, check):
            joins.append(greeting)
            if len(joins) < 3:
                raise AgainError("bob ended", "bob")
            return "welcome"

        def drop(self) -> None:
            pass

    def give_up(party, why):
        lost.append(party)
        raise KeyboardInterrupt

    monkeypatch.setattr("splitlearn.federation.party.Member", Refused)
    monkeypatch.setattr("splitlearn.federation.party.TRY_AGAIN", 0.01)
    federation = Federation(Attempt("alice0", "127.0.0.1:1", alone=alone), GlooWiring(), 1, 10, 1, None)
    federation.waits, federation.identity, federation._lost = waits, None, give_up
    federation.data = SimpleNamespace(names=())
    if tries == 3:
        assert federation._join("bob", 1, {}, None)[1] == "welcome"
        assert capsys.readouterr().err == "splitlearn: alice0: bob ended; tries again\n"
    else:
        with pytest.raises(KeyboardInterrupt if waits else AgainError):
            federation._join("bob", 1, {}, None)
    assert (len(joins), lost) == (tries, ["bob"] if waits and not alone else [])

"""A message takes the time that a hand works out, and a run that of its messages in the order of its schedule."""

import json
import re

import pytest
from helpers import BLOCKS, dealt, make_rows, net, train
from hydra.errors import HydraException
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import Recorder, difference, end_state, make_data, make_learner, make_trainer, results
from torch import nn

from splitlearn.build import build
from splitlearn.callbacks.link_seconds import LinkSeconds
from splitlearn.callbacks.results import Results
from splitlearn.costs.link import Link, make_link
from splitlearn.costs.timeline import Diary, Exchange, Timeline, in_rounds
from splitlearn.errors import InputError
from splitlearn.layout import multi_hop, two_party, u_shaped, vertical, whole
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Handoff, Personal, Shared
from splitlearn.train import train as run

TWO_PARTY = two_party(BLOCKS, 2)
ONE, ALL = (Link("1B/s", "1s", serves=serves) for serves in ("one", "all"))  # 3 bytes take 4 seconds


# One message


@pytest.mark.parametrize(
    ("bandwidth", "seconds"),
    [
        ("1bit/s", 8e6),
        ("1kbit/s", 8e3),
        ("1Mbit/s", 8),
        ("1Gbit/s", 0.008),
        ("1B/s", 1e6),
        ("1kB/s", 1e3),
        ("1MB/s", 1),
        ("1GB/s", 0.001),
        ("10 Mbit/s", 0.8),
        ("2.5MB/s", 0.4),
        ("1e3kB/s", 1),
    ],
)
def test_a_million_bytes(bandwidth, seconds):
    assert Link(bandwidth).seconds(1_000_000) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(("latency", "seconds"), [("2s", 3), ("20ms", 1.02), ("20us", 1.00002), ("0ms", 1)])
def test_latency_is_added_once(latency, seconds):
    assert Link("1MB/s", latency).seconds(1_000_000) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(("loss", "seconds"), [(0, 3), (0.5, 4), (0.75, 6)])
def test_what_is_lost_is_sent_again(loss, seconds):
    """Half of the bits lost, half of the rest lost again, ...: twice as many in all. The latency stays."""
    assert Link("1MB/s", "2s", loss).seconds(1_000_000) == seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10Mbps",), "`link.bandwidth` (=10Mbps) must be a number and one of bit/s, kbit/s, Mbit/s, Gbit/s, B/s, kB"),
        (("10mbit/s",), "`link.bandwidth` (=10mbit/s) must be a number and one of"),
        (("fast",), "`link.bandwidth` (=fast) must be a number and one of"),
        ((10,), "`link.bandwidth` (=10) must be a number and one of"),
        (("1e999bit/s",), "`link.bandwidth` (=1e999bit/s) must be a number and one of"),
        (("0bit/s",), "`link.bandwidth` (=0bit/s) must be above 0: link=none"),
        (("-1bit/s",), "`link.bandwidth` (=-1bit/s) must be above 0"),
        (("1bit/s", "20"), "`link.latency` (=20) must be a number and one of s, ms, us: e.g. 20ms"),
        (("1bit/s", 0), "`link.latency` (=0) must be a number and one of s, ms, us: e.g. 20ms"),
        (("1bit/s", "-1ms"), "`link.latency` (=-1ms) must not be negative: 0ms"),
        (("1bit/s", "1ms", 1), "`link.loss` (=1) must lie in [0, 1), e.g. 0.01"),
        (("1bit/s", "1ms", -0.1), "`link.loss` (=-0.1) must lie in [0, 1)"),
        (("1bit/s", "1ms", "1%"), "`link.loss` (=1%) must lie in [0, 1)"),
        (("1bit/s", "1ms", float("nan")), "`link.loss` (=nan) must lie in [0, 1)"),
        (("1bit/s", "1ms", 0, "two"), "`link.serves` (=two) must be one of one, all"),
    ],
    ids=str,
)
def test_what_is_no_link_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Link(*arguments)


def test_no_bandwidth_is_no_link():
    assert make_link(None) is None
    assert make_link("1bit/s").seconds(1) == 8


@pytest.mark.parametrize("settings", [{"latency": "1ms"}, {"loss": 0.5}, {"serves": "all"}], ids=str)
def test_a_setting_without_a_bandwidth_is_refused(settings):
    with pytest.raises(ValueError, match=r"^`link.bandwidth` \(=None\) must be given with any other setting of `link`"):
        make_link(None, **settings)


# A round, drawn


def steps(alice, *sizes, servers=("bob",)):
    """Mini-batches whose activation and gradient have so many bytes each."""
    return [Exchange(alice, [(alice, *servers, size), (*servers, alice, size)]) for size in sizes]


def moves(src, dst, num_bytes):
    return Exchange(dst if src == "server" else src, [(src, dst, num_bytes)], moves=True)


def test_three_messages():
    """
    alice0 -> bob   |aaaa|
    bob -> carol         |bb|
    carol -> bob            |ccc|
                    0    4  6   9
    """
    chain = Exchange("alice0", [("alice0", "bob", 3), ("bob", "carol", 1), ("carol", "bob", 2)])
    assert Timeline(ONE).seconds([chain]) == Timeline(ALL).seconds([chain]) == 4 + 2 + 3


def test_two_messages_on_one_connection_share_the_latency_and_on_two_connections_overlap():
    """
    alice0 -> bob     |aaa.|            alice0 -> bob     |aaa.|
    alice0 -> carol   |b.|              alice0 -> carol   |b.|
    alice0 -> bob         |c.|          carol -> bob         |bb.|
    """
    shared = [("alice0", "bob", 3), ("alice0", "carol", 1), ("alice0", "bob", 1)]
    assert Timeline(ONE).seconds([Exchange("alice0", shared)]) == 3 + 1 + 1
    onwards = [("alice0", "bob", 3), ("alice0", "carol", 1), ("carol", "bob", 2)]
    assert Timeline(ONE).seconds([Exchange("alice0", onwards)]) == 2 + 3


def test_who_joins_what_two_send_waits_for_both():
    """
    alice0 -> bob   |aaaa|
    alice1 -> bob   |bb|
    bob -> carol         |ccc|
    """
    joined = Exchange("alices", [("alice0", "bob", 3), ("alice1", "bob", 1), ("bob", "carol", 2)])
    assert Timeline(ONE).seconds([joined]) == 4 + 3


@pytest.mark.parametrize(("link", "seconds"), [(ONE, 3 * 4 * 2), (ALL, 2 * 4 * 2)])
def test_side_by_side(link, seconds):
    """
    one   alice0 | x x |     | x x |     all   alice0 | x x | x x |
          alice1 |     | x x |           alice1 | x x |
    """
    assert Timeline(link).seconds([*steps("alice0", 3, 3), *steps("alice1", 3)]) == seconds


def test_first_come_first_served():
    """
    alice0 | x |           | xxx |           |
    alice1     | x |             | y |
    alice2         | xxxxx |
    """
    exchanges = [*steps("alice0", 1, 3), *steps("alice1", 1, 2), *steps("alice2", 5)]
    assert Timeline(ONE).seconds(exchanges) == 2 * (2 + 2 + 6 + 4 + 3)
    last = [*exchanges, moves("alice0", "server", 100)]
    assert Timeline(ONE).seconds(last) == 2 * (2 + 2 + 6 + 4) + 101


def test_one_after_the_other():
    """
    alice0 | x x |             | serves=all makes no difference
    alice1             | x x x |
    weights      | >>> |
    """
    exchanges = [*steps("alice0", 3, 3), moves("alice0", "alice1", 9), *steps("alice1", 3, 3, 3)]
    for link in (ONE, ALL):
        assert Timeline(link, serial=True).seconds(exchanges) == 2 * 8 + 10 + 3 * 8


@pytest.mark.parametrize("link", [ONE, ALL])
def test_weights_by_way_of_the_server_take_two_transfers(link):
    exchanges = [moves("alice0", "server", 9), moves("server", "alice1", 9)]
    assert Timeline(link, serial=True).seconds(exchanges) == 20


@pytest.mark.parametrize(("link", "seconds"), [(ONE, 3 * 10 + 4), (ALL, 10 + 4)])
def test_the_server_of_the_weights_serves_one_at_a_time_as_well_and_beside_bob(link, seconds):
    """
    one   alice0 | >>> | x |              all   alice0 | >>> | x |
          alice1       | >>> | x |              alice1 | >>> | x |
          alice2             | >>> | x |        alice2 | >>> | x |
    """
    alices = ("alice0", "alice1", "alice2")
    exchanges = [each for alice in alices for each in (moves("server", alice, 9), *steps(alice, 1))]
    assert Timeline(link).seconds(exchanges) == seconds


@pytest.mark.parametrize("link", [ONE, ALL])
def test_one_top_for_all_serves_in_the_order_of_training(link):
    """Each mini-batch starts from the top that the one before it has left: alice1 waits, ready as she is.

    alice0 | >>>>> | x x | x x |
    alice1                     | x x |
    """
    late = [moves("server", "alice0", 9), *steps("alice0", 3, 3), *steps("alice1", 3)]
    assert Timeline(link, in_order=("bob",)).seconds(late) == 10 + 3 * 8
    assert Timeline(link).seconds(late) == 10 + 2 * 8


def test_connections_that_alices_share_take_one_message_after_the_other():
    """
    alice0 -> bob   |a.|    alice1 -> bob   |b.|
    bob -> carol       |aaabbb.|
    """
    exchanges = [Exchange(a, [(a, "bob", 1), ("bob", "carol", 3)]) for a in ("alice0", "alice1")]
    assert Timeline(ALL).seconds(exchanges) == 2 + 3 + 4
    assert Timeline(ONE).seconds(exchanges) == 2 * (2 + 4)


def test_no_message_takes_no_time():
    assert Timeline(ONE).seconds([]) == Timeline(ONE).seconds([Exchange("alice0", [])]) == 0


def test_a_round_ends_behind_the_last_upload():
    """a: mini-batch, A: the one that ends the round, <: to the server, >: from it."""
    plain, last = Exchange("alice0", []), Exchange("alice0", [], ends_round=True)
    up, down = moves("alice0", "server", 1), moves("server", "alice0", 1)
    assert in_rounds([]) == [[]]
    assert in_rounds([down, plain, up]) == [[down, plain, up]]
    assert in_rounds([down, plain, last, up]) == [[down, plain, last, up], []]
    assert in_rounds([last, up, down, plain]) == [[last, up], [down, plain]]
    assert in_rounds([last, up, up, down, last, plain]) == [[last, up, up], [down, last], [plain]]
    assert in_rounds([plain, last, last]) == [[plain, last], [last], []]


def test_a_diary_keeps_each_mini_batch_and_each_move_of_weights():
    diary = Diary()
    diary.write("server", "alice0", "weights", 3)
    diary.write("server", "alice0", "weights", 4)
    diary.write("server", "alice0", "optimizer_state", 5)
    diary.begin("alice0", False)
    diary.write("alice0", "bob", "activation", 7)
    diary.write("alice0", "bob", "label", 8)
    diary.write("bob", "alice0", "gradient", 7)
    diary.begin("alice0", True)
    diary.write("alice0", "server", "weight_gradient", 9)
    diary.write("server", "alice1", "weights", 3)
    assert diary.exchanges == [
        Exchange("alice0", [("server", "alice0", 12)], moves=True),
        Exchange("alice0", [("alice0", "bob", 15), ("bob", "alice0", 7)]),
        Exchange("alice0", [], ends_round=True),
        Exchange("alice0", [("alice0", "server", 9)], moves=True),
        Exchange("alice1", [("server", "alice1", 3)], moves=True),
    ]


# Runs


def predict(link, layout=TWO_PARTY, sizes=(8, 12), **arguments):
    """Train on so many rows of each Alice, in mini-batches of four. Return the seconds and the bytes by sender."""
    prediction = LinkSeconds(link)
    made = {"partition": dealt(*sizes)} if "alice" in layout.roles else {}
    arguments = {"epochs": 1, "optimizer_state": "reset", "rows": make_rows(sum(sizes)), "data": made, **arguments}
    trainer = {"callbacks": [prediction], **arguments.pop("trainer", {})}
    num_alices = len(sizes)
    learner = train(layout, num_alices=num_alices, trainer=trainer, **arguments).learner
    return prediction.seconds, learner.ledger.num_bytes


STEP = 2 * (1 + 4 * 10 * 4)  # 4 rows of 10 floats behind block2, there and back
MOVE = 1 + 4 * (2 * 9 + 2) + 4 * 4 * 2 + 8 + 4 * (48 * 10 + 10)  # convolution, batch norm and its counter, linear
MOVE_ALL = MOVE + 4 * (10 * 7 + 7) + 4 * 4 * 7 + 8 + 4 * (7 * 3 + 3)
SEQUENTIAL = {}
SPLITFED_1 = {"alice": Average(), "bob": Average()}
SPLITFED_2 = {"alice": Average(), "bob": Shared()}
SPLITFED_3 = {"alice": Personal(), "bob": Average()}
PARALLEL = {"alice": MeanGradient(), "bob": MeanGradient(), "turn": "step"}


@pytest.mark.parametrize(
    ("schedule", "layout", "one", "all_"),
    [
        # a a > b b b
        (SEQUENTIAL, TWO_PARTY, 5 * STEP + MOVE, 5 * STEP + MOVE),
        ({"alice": Handoff("reset", "server")}, TWO_PARTY, 5 * STEP + 2 * MOVE, 5 * STEP + 2 * MOVE),
        # a > b > a > b b, from the third round on b alone
        ({"turn": 1}, TWO_PARTY, 5 * STEP + 3 * MOVE, 5 * STEP + 3 * MOVE),
        # a: > xx  <     all: b: > xxx <
        # b:  >  xxx <   where > and < are longer than three x
        (SPLITFED_1, TWO_PARTY, 4 * MOVE, 2 * MOVE + 3 * STEP),
        # one as above      all: a: > xx <
        #                        b: >   xxx <
        (SPLITFED_2, TWO_PARTY, 4 * MOVE, 2 * MOVE + 5 * STEP),
        # one: a: x x        all: b: x x x
        #      b:  x xx
        (SPLITFED_3, TWO_PARTY, 5 * STEP, 3 * STEP),
        # one, of each round: a: x<  >       the third: b: x<>     all: a: x<>x<>
        #                     b:  x <  >                                b: x<>x<>x<>
        # where a of the second round has had her x while b waits for her >
        (
            PARALLEL,
            TWO_PARTY,
            (STEP + 2 * MOVE) + 2 * MOVE + 2 * MOVE + 2 * MOVE + STEP + 2 * MOVE,
            3 * (STEP + 2 * MOVE),
        ),
        ({"alice": Average()}, whole(BLOCKS), 4 * MOVE_ALL, 2 * MOVE_ALL),
    ],
    ids=["sequential", "by server", "turns", "splitfed_v1", "splitfed_v2", "splitfed_v3", "parallel", "fedavg"],
)
def test_schemes_with_two_alices(schedule, layout, one, all_):
    schedule = {"alice": Handoff("reset"), **schedule}
    assert predict(ONE, layout, schedule=schedule)[0] == one
    assert predict(ALL, layout, schedule=schedule)[0] == all_


@pytest.mark.parametrize(
    ("layout", "step"),
    [
        (u_shaped(BLOCKS, [1, 3]), 2 * (1 + 4 * 48 * 4) + 2 * (1 + 4 * 7 * 4)),
        (multi_hop(BLOCKS, [1, 3]), 2 * (1 + 4 * 48 * 4) + 2 * (1 + 4 * 7 * 4)),
        (two_party(BLOCKS, 2, labels="alice"), STEP + 4 * 8),
        (whole(BLOCKS), 0),
    ],
    ids=["u_shaped", "multi_hop", "labels", "whole"],
)
@pytest.mark.parametrize("link", [ONE, ALL])
def test_a_mini_batch_of_each_layout(layout, step, link):
    assert predict(link, layout, sizes=(12,))[0] == 3 * step


def test_owners_of_columns_send_side_by_side():
    """
    alice0 -> bob   |aaa|        bob -> alice0       |ggg|
    alice1 -> bob   |aaa|        bob -> alice1       |ggg|
    """
    first = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    model = nn.Sequential()
    model.add_module("first", first)
    model.add_module("second", nn.Linear(10, 3))
    layout = vertical(("first", "second"), 1, 2)
    assert predict(ONE, layout, sizes=(4, 4), model=model)[0] == 2 * 2 * (1 + 4 * 5 * 4)


def test_a_frozen_bottom_is_sent_no_gradient():
    model = net()
    model[:2].requires_grad_(False)
    assert predict(ONE, sizes=(12,), model=model)[0] == 3 * STEP / 2


@pytest.mark.parametrize("arguments", [{"schedule": {"turn": 2}}, {"optimizer_state": "carry"}], ids=str)
def test_without_latency_a_serial_run_takes_as_long_as_its_training_bytes_in_a_row(arguments):
    """What crosses for the validation is not among them."""
    held_out = {"data": {}, "sizes": (12, 12), "val_fraction": 1 / 3}
    seconds, num_bytes = predict(Link("1B/s"), epochs=2, **held_out, **arguments)
    assert seconds == sum(num_bytes.values()) > 0


@pytest.mark.parametrize("schedule", [SPLITFED_1, SPLITFED_3], ids=["splitfed_v1", "splitfed_v3"])
def test_served_all_at_once_a_round_takes_as_long_as_the_bytes_of_the_busiest(schedule):
    seconds, num_bytes = predict(Link("1B/s", serves="all"), sizes=(8, 12, 4), schedule=schedule)
    assert seconds == sum(size for pair, size in num_bytes.items() if "alice1" in pair)


@pytest.mark.parametrize("schedule", [SPLITFED_1, SPLITFED_2, SPLITFED_3, PARALLEL], ids=str)
def test_one_alice_side_by_side_with_nobody_is_serial(schedule):
    seconds, num_bytes = predict(Link("1B/s"), sizes=(12,), schedule=schedule, epochs=2)
    assert seconds == sum(num_bytes.values())


def test_an_epoch_that_a_limit_breaks_off_ends_its_round():
    limited = {"limit_train_batches": 2}
    assert predict(ALL, schedule=PARALLEL, trainer=limited)[0] == 2 * (STEP + 2 * MOVE)
    # a a b | b b b
    cyclic = {**SPLITFED_3, "order": "cyclic"}
    assert predict(ALL, schedule=cyclic, trainer={"limit_train_batches": 3}, epochs=2)[0] == (2 + 3) * STEP


def fit(folder, link, ckpt=None, schedule=SPLITFED_1, saves=False):
    """Two epochs of ten mini-batches of three Alices."""
    data = make_data(val_rows=6, num_alices=3, sizes=(16, 12, 11))
    learner, recorder = make_learner(data, schedule=schedule), Recorder()
    callbacks = [LinkSeconds(link), Results(folder / "results.json")]
    if saves:
        every = {"every_n_train_steps": 1, "save_top_k": -1, "auto_insert_metric_name": False}
        callbacks += [ModelCheckpoint(folder, "{step}", **every)]
    trainer = make_trainer(folder, callbacks, recorder)
    trainer.fit(learner, datamodule=data, ckpt_path=ckpt)
    return end_state(learner, trainer), results(folder), recorder.logged


@pytest.mark.parametrize("schedule", [SPLITFED_1, PARALLEL, {"turn": 2}], ids=["splitfed_v1", "parallel", "turns"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_predicts_the_same(tmp_path, schedule, step):
    _, whole_run, _ = fit(tmp_path / "whole", ONE, schedule=schedule, saves=True)
    _, resumed, _ = fit(tmp_path / "resumed", ONE, tmp_path / "whole" / f"{step}.ckpt", schedule)
    assert resumed == whole_run
    assert resumed["link"]["seconds"] > 0


def test_a_link_changes_nothing_but_what_it_tells(tmp_path):
    with_link, its_results, its_logs = fit(tmp_path / "with", ONE)
    without, results_, logs = fit(tmp_path / "without", None)
    assert difference(with_link, without) == []
    told = [epoch.pop("link_seconds") for epoch in its_results["epochs"]]
    link = its_results.pop("link")
    assert its_results == results_
    assert link == {
        **{"seconds": told[1], "seconds_per_step": told[1] / with_link["step, epoch"][0]},
        **{"bandwidth": "1B/s", "latency": "1s", "loss": 0.0, "serves": "one"},
    }
    assert told[1] == 2 * told[0] > 0
    assert [metrics["link/seconds"] for _, metrics in its_logs if "link/seconds" in metrics] == told
    assert not any("link/seconds" in metrics for _, metrics in logs)


# From the command line


@pytest.mark.parametrize("profile", ["lan", "wifi", "4g", "wan"])
def test_a_profile_is_a_link(configure, profile):
    (prediction,) = [c for c in build(configure(f"link={profile}")).trainer.callbacks if isinstance(c, LinkSeconds)]
    assert 0.0005 <= prediction.link.seconds(0) <= 0.05
    assert 0 < prediction.link.occupied(1_000_000) < 1


def test_a_link_of_ones_own(configure):
    cfg = configure("link.bandwidth=10Mbit/s", "link.latency=20ms", "link.loss=0", "link.serves=all")
    (prediction,) = [c for c in build(cfg).trainer.callbacks if isinstance(c, LinkSeconds)]
    assert prediction.link.seconds(1_000_000) == pytest.approx(0.82, rel=1e-12)
    assert prediction.link.serves == "all"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("link.bandwidth=10", "`link.bandwidth` (=10) must be a number and one of"),
        ("link.latency=20ms", "`link.bandwidth` (=None) must be given with any other setting"),
        ("+link.speed=3", "speed"),
    ],
)
def test_a_wrong_link_is_told_before_training(configure, override, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run(configure(override))


def test_an_unknown_profile_is_told(configure):
    with pytest.raises(HydraException, match="Could not find 'link/5g'"):
        configure("link=5g")


@pytest.mark.parametrize("link", ["none", "wan"])
def test_a_run_writes_the_seconds_where_a_link_is_given(configure, tmp_path, link):
    run(configure(f"link={link}", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=none"))
    kept = json.loads((tmp_path / "run" / "results.json").read_text())
    assert ("link" in kept, "link_seconds" in kept["epochs"][0]) == ((link == "wan"),) * 2

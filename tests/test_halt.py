"""Parties whose streams are real, and whose programs only count: all end behind one mini-batch, or at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from federated import until
from stars import PARTIES, PATIENCE, Ends

from splitlearn.federation.halt import Halt
from splitlearn.training.stopping import StoppedError, call_when_stopped

LAST = 100  # mini-batches of a run
NUMBER = signal.SIGTERM


class Run:
    """The halts of all, whose programs start by `train`. `ended` has who was ended at once, and `saved` what was."""

    def __init__(self, ends: Ends, timeout: float) -> None:
        self.lost = ends.lost
        self.ended: SimpleQueue[str] = SimpleQueue()
        self.saved: list[tuple[str, int]] = []
        self.halts = {party: Halt(party, timeout, lambda party=party: self.ended.put(party)) for party in PARTIES}
        self.streams, _ = ends.meet()
        self.trainers = {party: SimpleNamespace(global_step=0) for party in PARTIES}
        for party, halt in self.halts.items():
            halt.listen(self.streams[party])
            halt.saves = SimpleNamespace(save=lambda trainer, _, party=party: self._save(party, trainer))

    def _save(self, party: str, trainer: SimpleNamespace) -> None:
        self.saved.append((party, trainer.global_step))

    def stop(self, *parties: str) -> None:
        """These are stopped; returns when all have agreed, which takes none of their programs."""
        for party in parties:
            self.halts[party].ask(NUMBER)
        until(lambda: all(halt.target is not None for halt in self.halts.values()))

    def train(self, party: str, work: Callable[[int], object]) -> Future:
        """The mini-batches up to LAST, of each of which `work` is told; the result is what stopped it, or None."""
        told: Future = Future()
        halt, trainer, learner = self.halts[party], self.trainers[party], SimpleNamespace(pace=SimpleNamespace())
        halt.on_train_start(trainer, learner)

        def program() -> None:
            try:
                for step in range(1, LAST + 1):
                    work(step)
                    trainer.global_step = step
                    if learner.pace.ends(step):
                        halt.on_train_batch_end(trainer, learner)
                halt.on_train_end(trainer, learner)
                told.set_result(None)
            except StoppedError as stop:
                told.set_result(str(stop))

        threading.Thread(target=program, daemon=True).start()  # where nobody agrees it waits for ever
        return told


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Ends() as ends:
        yield ends


@pytest.mark.parametrize("stopped", PARTIES)
def test_all_end_where_nobody_has_passed(stopped, ends):
    """alice0 has nothing to do until mini-batch 30, where she waits for Bob; he is slow, and alice1 with him."""
    run, begun = Run(ends, PATIENCE), threading.Event()
    passed = [threading.Event() for _ in range(LAST + 1)]

    def bobs(step: int) -> None:
        if step == 3:
            begun.wait(PATIENCE)  # until the signal has come
        time.sleep(0.002)
        passed[step].set()

    programs = {
        "bob": run.train("bob", bobs),
        "alice0": run.train("alice0", lambda step: step < 30 or passed[step - 1].wait(PATIENCE)),
        "alice1": run.train("alice1", lambda step: passed[step - 1].wait(PATIENCE) if step > 1 else None),
    }
    until(lambda: run.trainers["alice0"].global_step == 29)
    run.stop(stopped)
    begun.set()
    for program in programs.values():
        assert program.result(PATIENCE) == f"{stopped} was stopped by SIGTERM at mini-batch 30"
    assert sorted(run.saved) == sorted((party, 30) for party in PARTIES)
    assert run.ended.empty()


def test_two_who_are_stopped_agree(ends):
    run, begun = Run(ends, PATIENCE), threading.Event()
    programs = [run.train(party, lambda step: begun.wait(PATIENCE) if step == 2 else None) for party in PARTIES]
    run.stop("alice0", "alice1")
    begun.set()
    assert len({program.result(PATIENCE).rpartition(" was ")[2] for program in programs}) == 1
    assert len({step for _, step in run.saved}) == 1


def test_who_is_asked_in_the_last_mini_batch_ends_behind_it(ends):
    run, begun, last = Run(ends, PATIENCE), threading.Event(), threading.Event()

    def work(step: int) -> None:
        if step == LAST:
            last.set()
            begun.wait(PATIENCE)

    programs = [run.train(party, work) for party in PARTIES]
    last.wait(PATIENCE)
    run.stop("bob")
    begun.set()
    assert {p.result(PATIENCE) for p in programs} == {f"bob was stopped by SIGTERM at mini-batch {LAST}"}


def test_who_is_stopped_before_the_hub_trains_is_lost_as_by_leaving(ends):
    run = Run(ends, PATIENCE)
    run.streams["alice0"].tell({"stop": NUMBER})
    assert run.lost["bob"].get(timeout=PATIENCE)[:2] == ("alice0", "was stopped by SIGTERM")
    assert run.lost["alice1"].get(timeout=PATIENCE)[:2] == ("alice0", "was stopped by SIGTERM")
    assert run.halts["bob"].who is None


def test_who_does_not_train_ends_at_once(ends):
    run, free = Run(ends, PATIENCE), threading.Event()
    try:
        run.train("bob", lambda step: free.wait(PATIENCE))
        run.train("alice1", lambda step: free.wait(PATIENCE))
        run.halts["alice1"].ask(NUMBER)
        assert run.ended.get(timeout=PATIENCE) == "alice0"
        assert (run.halts["alice0"].who, run.halts["alice0"].why) == ("alice1", "was stopped by SIGTERM")
    finally:
        free.set()


def test_who_hangs_ends_at_once_after_the_timeout(ends):
    run, free, known = Run(ends, 0.5), threading.Event(), threading.Event()
    try:
        run.train("bob", lambda step: free.wait(PATIENCE))
        others = [run.train(alice, lambda step: step == 50 and known.wait(PATIENCE)) for alice in ("alice0", "alice1")]
        run.stop("alice0")
        known.set()
        assert all("alice0 was stopped by SIGTERM" in program.result(PATIENCE) for program in others)
        assert run.ended.get(timeout=PATIENCE) == "bob"
    finally:
        free.set()


def test_who_lies_about_where_she_is_holds_nobody_for_longer(ends):
    run, free = Run(ends, 0.5), threading.Event()
    alice1 = run.streams["alice1"]
    alice1.heed = lambda note, peer: "halt" in note and alice1.tell({"step": 10**9})
    try:
        for party in ("bob", "alice0"):
            run.train(party, lambda step: step < LAST or free.wait(PATIENCE))
        alice1.tell({"stop": int(NUMBER)})
        assert {run.ended.get(timeout=PATIENCE) for _ in range(2)} == {"bob", "alice0"}
        assert run.saved == []
    finally:
        free.set()


@pytest.mark.parametrize(
    ("note", "why"),
    [
        ({"stop": "now"}, "'now' is not a valid Signals"),
        ({"step": "now"}, "'now' is no number of a mini-batch"),
        ({"step": 1.5}, "1.5 is no number of a mini-batch"),
    ],
)
def test_a_note_without_sense_ends_its_party_alone(note, why, ends):
    run = Run(ends, PATIENCE)
    run.streams["alice0"].tell(note)
    lost, told, _ = run.lost["bob"].get(timeout=PATIENCE)
    assert lost == "alice0"
    assert why in told
    assert run.halts["bob"].who is None


def test_who_is_not_the_hub_asks_nobody(ends):
    run = Run(ends, PATIENCE)
    for note in ({"halt": "alice1", "number": 2}, {"target": 1}):
        run.streams["alice0"].tell(note)
    run.streams["alice0"].tell({"farewell": True})
    until(lambda: "alice0" in run.streams["bob"].done)  # which came behind them
    assert (run.halts["bob"].who, run.halts["bob"].target) == (None, None)


def test_a_second_signal_is_told_apart():
    signals, heard = SimpleQueue(), SimpleQueue()
    call_when_stopped(lambda *told: heard.put(told), signals.get)
    for number in (signal.SIGHUP, NUMBER):
        signals.put(number)
    assert [heard.get(timeout=PATIENCE) for _ in range(2)] == [(signal.SIGHUP, False), (NUMBER, True)]

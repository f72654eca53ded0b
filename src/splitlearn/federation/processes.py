"""One process per party: starts them, and knows what to do when one is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only

from splitlearn.errors import InputError, check_whole
from splitlearn.federation.party import ORPHANED, Attempt
from splitlearn.layout import Party
from splitlearn.ledger import is_alice
from splitlearn.training.stopping import WAS_STOPPED, StoppedError, block, raising, was_stopped_by

ON_FAILURE = ("stop", "wait", "skip")
LAST_PORT = 65535
TRIES = 5  # without a new snapshot in between; then the fault is in the program
PATIENCE = 10.0  # seconds that the others have to notice that a party is lost
STOPPING = 2.0  # seconds that a process has to end when it must at once
Play = Callable[[Attempt, "Post"], None]
"""What a process does: build its part of the run, train it, and post what came of it."""


class PartyLostError(RuntimeError):
    """A party has died or does not answer, and the run cannot go on without it."""


@dataclass
class Processes:
    """Arguments: see conf/engine/processes.yaml.

    Raises InputError for a value that is out of its range.
    """

    party: Party | None = None
    address: str = "127.0.0.1:0"
    timeout: float = 30.0
    join_timeout: float = 600.0
    on_failure: str = "stop"
    save_every_n_steps: int = 500

    def __post_init__(self) -> None:
        if self.on_failure not in ON_FAILURE:
            raise InputError(f"`engine.on_failure` (={self.on_failure}) must be one of {', '.join(ON_FAILURE)}")
        for name in ("timeout", "join_timeout"):
            if not isinstance(getattr(self, name), int | float) or getattr(self, name) <= 0:
                raise InputError(f"`engine.{name}` (={getattr(self, name)}) must be a number above 0")
        check_whole("engine.save_every_n_steps", self.save_every_n_steps)
        host, _, port = str(self.address).rpartition(":")
        if not host or not port.isdecimal() or int(port) > LAST_PORT:
            raise InputError(f"`engine.address` (={self.address}) must be HOST:PORT, e.g. 127.0.0.1:29400")
        if self.party is not None and not self.has_port:
            raise InputError(
                f"`engine.address` (={self.address}) must name a port when `engine.party` (={self.party}) is given: "
                "the same HOST:PORT for all, at which the hub listens"
            )

    @property
    def has_port(self) -> bool:
        return not self.address.endswith(":0")

    def launch(self, plays: dict[Party, Play], output_dir: str) -> dict[str, float]:
        """Run a process for each of these parties, the hub first, until the run is over; return the hub's metrics.

        Raises InputError for what does not fit, PartyLostError when the run cannot go on, StoppedError at a signal.
        """
        run, gone, begun, saved = None, tuple[Party, ...](), list[int](), 0
        while True:
            crew = Crew({party: play for party, play in plays.items() if party not in gone}, self.timeout)
            try:
                with raising():
                    outcome = crew.run(self.address, run, gone)
            except StoppedError as stop:
                saved = max(saved, crew.saved)
                how = f"{was_stopped_by(stop.number)} {_stopped_at(crew.step, crew.saved)}"
                who = self.party or "the run"
                raise StoppedError(stop.number, f"{who} {how}. {_cure(saved, output_dir)}") from None
            run, saved = crew.run_id or run, max(saved, crew.saved)
            if outcome.lost is None:
                return outcome.metrics
            begun.append(crew.begun)
            if begun[-TRIES:].count(crew.begun) == TRIES:
                raise PartyLostError(
                    f"{outcome.lost} was lost {TRIES} times on the way from one snapshot: {outcome.why}"
                )
            gone = self._go_on(outcome, gone, next(iter(plays)), _cure(saved, output_dir))
            waits = f"waiting up to {self.join_timeout:.0f} s for the same command to start it again"
            restarts = "starting it again" if outcome.lost in plays else waits
            rank_zero_info(f"splitlearn: {outcome}; {'going on without it' if outcome.lost in gone else restarts}")

    def _go_on(self, outcome: Outcome, gone: tuple[Party, ...], hub: Party, cure: str) -> tuple[Party, ...]:
        """Return who is left out of the next attempt, or raise."""
        lost = str(outcome.lost)
        if self.on_failure == "wait":
            return gone
        if self.on_failure == "skip" and is_alice(lost) and lost not in (self.party, hub):
            return (*gone, lost)
        rule = "Only Alices who are not the hub can be skipped. " if self.on_failure == "skip" else ""
        raise PartyLostError(f"{outcome}. {rule}{cure}")


def _cure(saved: int, output_dir: str) -> str:
    """How to go on, `saved` being the mini-batch of the newest snapshot of all, 0 for none."""
    if not saved:
        return "There is no snapshot of all yet: start all parties again as they were started"
    return (
        f"To go on from mini-batch {saved}, the newest snapshot of all, start all parties again, each with the folder "
        f"that its run had: here ckpt={output_dir}"
    )


def _stopped_at(step: int, saved: int) -> str:
    return f"at mini-batch {step}" if step == saved > 0 else f"at about mini-batch {step}"


@dataclass
class Outcome:
    """How an attempt ended: with metrics, or since a party was lost."""

    metrics: dict[str, float] = field(default_factory=dict)
    lost: Party | None = None
    why: str = ""
    step: int = 0
    saved: int = 0

    def __str__(self) -> str:
        if self.was_stopped:
            return f"{self.lost} {self.why} {_stopped_at(self.step, self.saved)}"
        return f"{self.lost} was lost at about mini-batch {self.step}: {self.why}"

    @property
    def was_stopped(self) -> bool:
        return self.why.startswith(WAS_STOPPED)


class Post:
    """What a process and the one that started it tell each other. Ends the process when that one is gone."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.ports: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.stops: queue.SimpleQueue[int] = queue.SimpleQueue()  # signals that the other process has heard
        threading.Thread(target=self._read, daemon=True).start()

    def __call__(self, note: dict[str, Any]) -> None:
        self.connection.send_bytes(json.dumps(note).encode())

    def port(self) -> int:
        """Wait for the port that the hub listens on."""
        return self.ports.get()

    def _read(self) -> None:
        try:
            while True:
                note = json.loads(self.connection.recv_bytes())
                if "stop" in note:
                    self.stops.put(note["stop"])
                else:
                    self.ports.put(note["port"])
        except (EOFError, OSError):
            os._exit(ORPHANED)


class Crew:
    """The processes of one attempt."""

    def __init__(self, plays: dict[Party, Play], timeout: float) -> None:
        self.plays, self.timeout = plays, timeout
        self.errors: list[str] = []  # as they come: others follow from the first
        self.run_id: str | None = None
        self.begun = -1  # the mini-batch that all went on from, once they have met
        self.saved = 0  # the mini-batch of the newest snapshot of all in this run's folder
        self.notes: dict[Party, dict[str, Any]] = {party: {} for party in plays}
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our own errors tell what it would
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # who waits must not keep a core busy that another needs
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["splitlearn.federation.launch"])  # so that a process starts in no time

    def run(self, address: str, run: str | None, gone: Sequence[Party]) -> Outcome:
        self.processes: dict[Party, ForkServerProcess] = {}
        self.connections: dict[Party, Connection] = {}
        try:
            for party, play in self.plays.items():
                self._start(play, Attempt(party, address, run, tuple(gone), alone=len(self.plays) == 1))
            return self._watch()
        except StoppedError as stop:
            try:
                self._stop(stop.number, 2 * self.timeout + STOPPING)  # to train up to where all end, and to save
            except StoppedError as second:
                self._stop(second.number, STOPPING)
            raise
        finally:
            for process in self.processes.values():
                process.kill()
                process.join()

    def _start(self, play: Play, attempt: Attempt) -> None:
        ours, theirs = self.context.Pipe()
        threads = torch.get_num_threads()  # the same arithmetic as here
        process = self.context.Process(target=_begin, args=(play, attempt, theirs, threads), name=attempt.party)
        process.start()
        theirs.close()
        self.processes[attempt.party], self.connections[attempt.party] = process, ours

    @property
    def step(self) -> int:
        return max(note.get("step", 0) for note in self.notes.values())

    def _stop(self, number: int, seconds: float) -> None:
        """Pass a signal on, and wait for the processes to end.

        Not as a signal: that of a terminal has come to them already, and a second one ends them at once.
        """
        deadline = time.monotonic() + seconds
        self._tell({"stop": number})
        for party, process in self.processes.items():
            process.join(max(0.0, deadline - time.monotonic()))
            self._hear(party)

    def _tell(self, note: dict[str, Any]) -> None:
        for connection in self.connections.values():
            with suppress(OSError):  # of a process that has ended
                connection.send_bytes(json.dumps(note).encode())

    def _watch(self) -> Outcome:
        """Until all have ended, or one was lost and the others had time to notice."""
        running = {process.sentinel: party for party, process in self.processes.items()}
        lost: Outcome | None = None
        while running:
            talking = {connection: party for party, connection in self.connections.items()}
            ready = wait([*running, *talking], timeout=PATIENCE if lost or self.errors else None)
            if not ready:
                break
            for one in ready:
                if one in talking:
                    self._hear(talking[one])
            for one in ready:
                if one in running:
                    party = running.pop(one)
                    self._hear(party)
                    lost = lost or self._outcome(party)
            if lost is not None and lost.lost in self.processes:
                self.processes[lost.lost].kill()  # it may only be frozen
        if self.errors:
            raise InputError(self.errors[0])
        if lost is not None:
            return replace(lost, step=self.step, saved=self.saved)
        return Outcome(self.notes[next(iter(self.plays))]["done"])

    def _hear(self, party: Party) -> None:
        """Take in what a party has told."""
        connection = self.connections.get(party)
        try:
            while connection is not None and connection.poll():
                note = json.loads(connection.recv_bytes())
                self.notes[party].update(note)
                if "error" in note:
                    self.errors.append(note["error"])
                self.saved = max(self.saved, note.get("saved", 0))
                if "run" in note:
                    self.run_id, self.begun = note["run"], note["step"]
                if "port" in note:
                    self._tell(note)
        except (EOFError, OSError):
            del self.connections[party]

    def _outcome(self, party: Party) -> Outcome | None:
        """What the end of a party's process means; nothing if it is done."""
        note, code = self.notes[party], self.processes[party].exitcode
        if "done" in note or "error" in note:
            return None
        if "lost" in note:
            return Outcome(lost=note["lost"], why=note["why"])
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return Outcome(lost=party, why=f"its process ended by {how}")


def _begin(play: Play, attempt: Attempt, connection: Connection, threads: int) -> None:
    block()
    torch.set_num_threads(threads)
    rank_zero_only.rank = 0  # type: ignore[attr-defined] # each party logs for itself
    play(attempt, Post(connection))

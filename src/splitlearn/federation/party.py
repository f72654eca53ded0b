"""One party's process among the others: it greets them, trains its part of the program, and leaves."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from splitlearn.data import SplitData
from splitlearn.errors import InputError
from splitlearn.federation.greetings import (
    agree,
    answer_with,
    check_columns,
    check_greeting,
    check_initial,
    check_welcome,
    warn_of_threads,
)
from splitlearn.federation.halt import Halt
from splitlearn.federation.hub import Hub
from splitlearn.federation.remote_wire import WIDEST, RemoteWire
from splitlearn.federation.snapshots import Snapshots, common_in, path_of, steps_in
from splitlearn.federation.streams import AgainError, Greeting, Member, Streams
from splitlearn.federation.together import Together
from splitlearn.federation.wiring import Wiring
from splitlearn.layout import Party
from splitlearn.learner import SplitLearner
from splitlearn.ledger import is_alice
from splitlearn.saved.folder import digest_of
from splitlearn.schedules.aggregation import Average, MeanGradient
from splitlearn.schedules.sharing import Handoff
from splitlearn.training.checkpoints import tested
from splitlearn.training.stopping import StoppedError, was_stopped_by
from splitlearn.wire import SERVER

LOST, FAILED, ORPHANED = 3, 1, 4  # exit codes
GOODBYE = 0.3  # seconds until what was said last has left
TRY_AGAIN = 1.0  # seconds until who could not join does
LONG = 5.0  # seconds of waiting for a party that are told of


class Attempt(NamedTuple):
    """What a process is to do: play `party`, at `address`; `run` and `gone` are those of an earlier attempt, if any.

    `alone`: whether it was started for this party alone.
    """

    party: Party
    address: str
    run: str | None = None
    gone: tuple[Party, ...] = ()
    alone: bool = False


class Federation:
    """What one process needs to play its party.

    Arguments:
        attempt: whom this process plays, and where.
        wiring: what carries the frames.
        timeout, join_timeout, save_every_n_steps: see conf/engine/processes.yaml.
        post: tells the process that started this one.
    """

    def __init__(
        self, attempt: Attempt, wiring: Wiring, timeout: float, join_timeout: float, save_every_n_steps: int, post: Any
    ) -> None:
        self.attempt, self.wiring, self.timeout, self.join_timeout = attempt, wiring, timeout, join_timeout
        self.save_every_n_steps, self.post = save_every_n_steps, post
        self.waits = False  # for who is lost: engine.on_failure=wait
        self.wire = RemoteWire(attempt.party)
        self.learner: SplitLearner | None = None
        self.trainer: pl.Trainer | None = None
        self.star: Streams | None = None
        self.signal = 0  # that stopped this party
        self.halt = Halt(attempt.party, timeout, self._end_at_once)

    def run(
        self,
        trainer: pl.Trainer,
        learner: SplitLearner,
        data: SplitData,
        shared: Mapping[str, Any],
        output_dir: str,
        ckpt: str | None,
        test: str = "last",
    ) -> dict[str, float]:
        """Join the others, fit and test; return the last value of every metric.

        `shared` is the part of the configuration that all must have alike, `output_dir` this party's folder, `ckpt`
        that of a run to go on from; `test`: the `last` weights or each party's `best`.
        """
        self.trainer, self.learner, self.data, parties = trainer, learner, data, parties_of(learner)
        folder = Path(output_dir)
        self._check(parties, trainer)
        self.wire.device = trainer.strategy.root_device
        if self.wire.device.type == "cuda":  # as Lightning does later: pinned memory, too, belongs to a GPU
            torch.cuda.set_device(self.wire.device)
        self.identity = self.wiring.identity(self.attempt.party) if len(parties) > 1 else None
        own = folder / "snapshots"
        folders = [own, Path(ckpt) / self.attempt.party / "snapshots"] if ckpt else [own]
        star, welcome = self._meet(parties, self._greeting(shared, folders, ckpt))
        run, step, gone = welcome["run"], welcome["step"], tuple(welcome["gone"])
        self.post({"run": run, "step": step})
        self._say(f"all have come; goes on from mini-batch {step}" if step else "all have come")
        transport = self.wiring.transport(star, welcome, self.wire.device)
        self.wire.connect(transport, star.parties, bytes.fromhex(run), self.wiring.seals(star, welcome))
        threading.Thread(target=self._tell_waits, daemon=True).start()
        saves = Snapshots(own, self.save_every_n_steps, run, lambda saved: self.post({"saved": saved}))
        if step in steps_in([own]).get(run, []):  # and not in the folder that it goes on from
            self.post({"saved": step})
        trainer.callbacks[:0] = [Together(self.wire, gone)]  # type: ignore[attr-defined]
        self.halt.saves = saves
        trainer.callbacks.extend([saves, self.halt])  # type: ignore[attr-defined]
        try:
            trainer.fit(learner, datamodule=data, ckpt_path=path_of(folders, run, step) if step else None)
        except StoppedError:
            star.close(self.timeout)  # nobody is missed who has heard that all have saved
            raise
        metrics = dict(trainer.callback_metrics)
        trainer.test(learner, datamodule=data, ckpt_path=tested(trainer, test), verbose=False)
        self.wire.gather("farewell")
        star.close(self.timeout)
        return {name: float(value) for name, value in {**metrics, **trainer.callback_metrics}.items()}

    def give_up(self, why: str) -> None:
        """Tell the others why this party cannot go on."""
        if self.star is not None:
            self.star.give_up(why)
            time.sleep(GOODBYE)

    def stopped(self, number: int, is_second: bool = False) -> None:
        """A signal ends this party, and the others with it: behind a snapshot of all, or at once by a second signal."""
        self.signal = number
        if is_second:
            self._end_at_once()
        else:
            self.halt.ask(number)

    def leave(self) -> None:
        """Since a party was stopped, this one ends."""
        if self.signal:
            self._exit(self.attempt.party, was_stopped_by(self.signal), 128 + self.signal)
        else:
            self._exit(str(self.halt.who), self.halt.why, LOST)

    def _end_at_once(self) -> None:
        """Since a party was stopped; the others end, too. What counts is the newest snapshot of all."""
        if self.star is not None:
            self.star.give_up(self.halt.why)
        self.leave()

    @property
    def _step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step  # the learner knows it only while it trains

    def _say(self, text: str) -> None:
        """To whoever watches a terminal with one party; with all in one it would be noise."""
        if self.attempt.alone:
            tqdm.write(f"splitlearn: {self.attempt.party}: {text}", file=sys.stderr)  # above a progress bar

    def _tell_waits(self) -> None:
        """Say who is waited for, once in a wait, when it is long."""
        told = None
        while True:
            time.sleep(LONG / 5)
            awaited = self.wire.awaited
            if awaited is not None and awaited != told and time.perf_counter() - awaited[1] > LONG:
                self._say(f"waits for {awaited[0]}")
                told = awaited

    def _check(self, parties: Sequence[Party], trainer: pl.Trainer) -> None:
        party = self.attempt.party
        if party not in parties:
            raise InputError(f"`engine.party` (={party}) must be one of the parties: {', '.join(parties)}")
        if parties[0] in self.attempt.gone:
            raise InputError(f"{parties[0]} is the hub, without whom there are no streams: start the run again")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise InputError(
                "`trainer.precision` (=16-mixed) scales all gradients alike, and each process would scale its own: "
                "take bf16-mixed"
            )

    def _greeting(self, shared: Mapping[str, Any], folders: Sequence[Path], ckpt: str | None) -> Greeting:
        assert self.learner is not None
        return {
            "party": self.attempt.party,
            "version": version("splitlearn"),
            "torch": torch.__version__.partition("+")[0],
            **self.learner.kind(self.data),
            "config": dict(shared),
            "alike": self.data.alike,
            "file": self.data.own_file,
            "initial": self._initial(self.learner),
            "run": self.attempt.run,
            "resumes": ckpt is not None,
            "snapshots": steps_in(folders, whole=True),
            "common": common_in(folders),
            "nonce": self.wiring.nonce.hex(),
            "threads": torch.get_num_threads(),
            "gpu": self.wiring.gpu(self.attempt.party, self.wire.device),
            "certificate": None if self.identity is None else self.identity.certificate.decode(),
        }

    def _initial(self, learner: SplitLearner) -> str | None:
        """What an Alice, or the server, begins with, and the others of them must: as drawn, or a digest."""
        network, mine = learner.network, learner.network.segments_of("alice")
        if not mine or learner.rounds.personal:  # which nobody else ever has
            return None
        return digest_of(mine.values()) if network.origins or network.frozen else ""

    def _meet(self, parties: list[Party], greeting: Greeting) -> tuple[Streams, Greeting]:
        hub, party = parties[0], self.attempt.party
        present = [other for other in parties if other not in self.attempt.gone]
        self.wiring.check(self.attempt.address)
        limit, identity = self._largest(), self.identity
        if party != hub:
            self._say(f"joins {hub} at {self.attempt.address}")
            return self._join(hub, limit, greeting, lambda welcome: check_welcome(welcome, greeting, parties))
        listener = self.star = Hub(party, self.attempt.address, identity, limit, self.timeout, self._lost)
        self.halt.listen(listener)
        self.post({"port": listener.port})
        listener.say, listener.patient = self._say, self.patient
        ca = None if identity is None else identity.ca
        others = listener.gather(
            present, lambda other: check_greeting(greeting, other, party, ca, self.data.names), self.join_timeout
        )
        greetings = {party: greeting, **others}
        check_columns(greetings)
        check_initial(greetings)
        self.wiring.check_gpus({name: each["gpu"] for name, each in greetings.items()})
        warn_of_threads(greetings)
        run, step = agree(greetings, self.attempt.run)
        welcome = {
            "party": party,
            "parties": present,
            "run": run,
            "step": step,
            "gone": self.attempt.gone,
            "certificates": {name: greetings[name]["certificate"] for name in present},
            "nonces": {name: greetings[name]["nonce"] for name in present},
            **self.wiring.offer(listener),
        }
        listener.welcome(welcome)
        return listener, welcome

    def _join(
        self, hub: Party, limit: int, greeting: Greeting, check: Callable[[Greeting], None]
    ) -> tuple[Member, Greeting]:
        """Join the hub; who is patient tries again where a party is lost before all have come."""
        terms = self._address(), self.identity, limit, self.timeout, self._lost, self.wiring.proxy(self.attempt.address)
        deadline, said = time.monotonic() + self.join_timeout, ""
        while True:
            member = self.star = Member(self.attempt.party, hub, *terms)
            member.say, member.answer = self._say, answer_with(self.data.names)
            self.halt.listen(member)
            try:
                return member, member.join(greeting, deadline - time.monotonic(), check)
            except AgainError as error:
                if self.waits and not self.attempt.alone:
                    self._lost(error.lost, str(error))  # who started all starts all again
                if not self.patient or time.monotonic() + TRY_AGAIN > deadline:
                    raise
                if str(error) != said:
                    self._say(f"{error}; tries again")
                said = str(error)
            member.drop()
            time.sleep(TRY_AGAIN)

    @property
    def patient(self) -> bool:
        """Whether who is lost before all have come, or comes with something else, may be started anew meanwhile."""
        return self.waits and self.attempt.alone

    def _address(self) -> str:
        """Where the hub listens; a port that is still to be chosen is told by the process that started this one."""
        host, _, port = self.attempt.address.rpartition(":")
        return self.attempt.address if port != "0" else f"{host}:{self.post.port()}"

    def _largest(self) -> int:
        """The most bytes that a message may need: a tensor of the weights, or the activation of a mini-batch."""
        assert self.learner is not None
        network = self.learner.network
        weights = [w for _, segment in network.program for w in (*segment.parameters(), *segment.buffers())]
        rows = max(self.data.batch_size, self.data.eval_batch_size)
        activations = (rows * value[0].numel() for value in network.shapes.values())
        most = WIDEST * max([*(weight.numel() for weight in weights), *activations])
        self.wiring.check_size(most // 2)  # of single precision
        return most

    def _lost(self, party: Party, why: str) -> None:
        """Nothing can be done here: what counts is on disk. `Processes.launch`, which started this one, may go on."""
        if self.halt.who is None:
            self._exit(party, why, LOST)
        else:  # who ends now does so since another was stopped
            self.leave()

    def _exit(self, lost: Party, why: str, code: int) -> None:
        self.post({"lost": lost, "why": why, "step": self._step})
        time.sleep(GOODBYE)
        os._exit(code)


def parties_of(learner: SplitLearner) -> list[Party]:
    """Everybody who takes part, the hub first: Bob; where there is no Bob, the server or the first Alice."""
    schedule, layout = learner.schedule, learner.layout
    takers = list(schedule.takers) if "alice" in layout.roles else []
    others = [role for role in layout.roles if role != "alice"]
    serves = isinstance(schedule.alice, Average | MeanGradient) or getattr(schedule.alice, "handoff", "") == "server"
    server = [SERVER] if takers and serves and not (isinstance(schedule.alice, Handoff) and len(takers) == 1) else []
    everybody = [*others, *server, *takers]
    first = "bob" if "bob" in others else next((p for p in everybody if not is_alice(p)), everybody[0])
    return [first, *(party for party in everybody if party != first)]

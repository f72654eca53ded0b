"""A party was stopped from outside: all end behind the same mini-batch, and take a snapshot there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from splitlearn.federation.snapshots import Snapshots
from splitlearn.federation.streams import Streams
from splitlearn.layout import Party
from splitlearn.learner import SplitLearner
from splitlearn.training.stopping import StoppedError, was_stopped_by


class Halt(Callback):
    """Agrees with the others on a mini-batch that nobody has passed; behind it, saves and raises StoppedError.

        alice0 was stopped --- stop ---> bob --- halt ---> all --- step ---> bob --- target ---> all

    Who has nothing to do may be ahead of the others by many mini-batches. So each answers with the number of the
    mini-batch at hand, behind which it waits for the target: the largest of all answers. Notes are answered by the
    threads that read the streams, since the program of a party may wait for one that is behind.

    Arguments:
        party: whose it is.
        timeout: seconds to reach the target in.
        end: ends this party at once, where it does not train, or the target is not reached.
    """

    content_with_stretches = True

    def __init__(self, party: Party, timeout: float, end: Callable[[], None]) -> None:
        self.party, self.end = party, end
        self.who: Party | None = None  # was stopped, first of all that are known here
        self.number = 0  # of the signal
        self.saves: Snapshots | None = None
        self.changed = threading.Condition()
        self._streams: Streams | None = None
        self._trains = False
        self._step: Callable[[], int] = lambda: 0
        self._answers: dict[Party, int] = {}  # at the hub, of all; elsewhere its own
        self.target: int | None = None  # the mini-batch behind which all end, once all have agreed on it
        self._timer = threading.Timer(timeout, end)
        self._timer.daemon = True

    @property
    def why(self) -> str:
        return was_stopped_by(self.number)

    def listen(self, streams: Streams) -> None:
        self._streams, streams.heed = streams, self._heed

    def ask(self, number: int) -> None:
        """This party was stopped by a signal."""
        self._hear_of(self.party, number)

    def is_behind(self, step: int) -> bool:
        """Whether this party, which has just trained mini-batch `step`, is to end here. Waits where it must be told."""
        with self.changed:
            if step < self._answers.get(self.party, step + 1):
                return False
            self.changed.wait_for(lambda: self.target is not None)
            return step == self.target

    def on_train_start(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        learner.pace.ends = self.is_behind
        with self.changed:
            self._step, self._trains = lambda: trainer.global_step, True

    def on_train_batch_end(self, trainer: pl.Trainer, learner: SplitLearner, *_: Any) -> None:  # type: ignore[override]
        if self.is_behind(trainer.global_step):
            self._stop(trainer, learner)

    def on_train_end(self, trainer: pl.Trainer, learner: SplitLearner) -> None:  # type: ignore[override]
        with self.changed:
            self._trains, ends = False, self.who is not None  # nobody reaches a target behind this mini-batch
        if ends:
            self._stop(trainer, learner)

    def _stop(self, trainer: pl.Trainer, learner: SplitLearner) -> None:
        assert self.saves is not None
        self._timer.cancel()  # to save may take long
        self.saves.save(trainer, learner)
        raise StoppedError(self.number, f"{self.who} {self.why} at mini-batch {trainer.global_step}")

    def _hear_of(self, who: Party, number: int) -> None:
        """`who` was stopped; the first one counts. Raises ValueError for a signal that there is not."""
        with self.changed:
            if self.who is not None:
                return
            was_stopped_by(number)  # which raises
            self.who, self.number = who, number
            if not self._trains:
                self.end()
                return
            assert self._streams is not None
            self._timer.start()
            if self._streams.leads:
                self._streams.tell({"halt": who, "number": number})
                self._answer(self.party, self._step() + 1)
            elif who == self.party:
                self._streams.tell({"stop": number})

    def _heed(self, note: dict[str, Any], peer: Party) -> None:
        """Take in what another has told. Raises ValueError for what has no sense."""
        assert self._streams is not None
        with self.changed:
            if self._streams.leads:
                if "stop" in note and self._trains:
                    self._hear_of(peer, note["stop"])
                elif "stop" in note:  # who ends before all have come may be awaited again
                    self._streams.lose(peer, was_stopped_by(note["stop"]))
                elif "step" in note:
                    self._answer(peer, _whole(note["step"]))
            elif "halt" in note:
                if note["halt"] not in self._streams.parties:
                    raise ValueError(f"{note['halt']!r} is no party")
                self._hear_of(note["halt"], note["number"])
                if self._trains and not self._answers:
                    self._answers[self.party] = self._step() + 1
                    self._streams.tell({"step": self._answers[self.party]})
            elif "target" in note:
                self._agree(_whole(note["target"]))

    def _answer(self, party: Party, step: int) -> None:
        """The hub's: when all have answered, tell all the target."""
        assert self._streams is not None
        self._answers.setdefault(party, step)
        if self.target is None and len(self._answers) == len(self._streams.parties):
            self._agree(max(self._answers.values()))
            self._streams.tell({"target": self.target})

    def _agree(self, target: int) -> None:
        self.target = target
        self.changed.notify_all()


def _whole(number: Any) -> int:
    if not isinstance(number, int):
        raise ValueError(f"{number!r} is no number of a mini-batch")
    return number

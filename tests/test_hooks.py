"""Callbacks and subclasses hear of every mini-batch what Lightning tells them of an ordinary module's."""

from collections import Counter

import pytest
from helpers import BLOCKS
from pytorch_lightning.callbacks import Callback
from runs import train_plain, train_split

from splitlearn.layout import whole
from splitlearn.learner import SplitLearner

LENGTHS = (1, 7, 50)
WHOLE = whole(BLOCKS)


def make_listener(*hooks, names=None):
    """A callback that notes each call of `hooks` and where it finds the trainer."""

    def note(hook):
        def call(self, trainer, module, *args):
            counts = trainer.fit_loop.batch_idx, trainer.fit_loop.total_batch_idx, trainer.is_last_batch
            batch_idx = args[-1] if hook.startswith("on_train_batch") else None
            self.heard.append((hook, trainer.global_step, trainer.current_epoch, batch_idx, *counts))

        return call

    return type("Listener", (Callback,), {"heard": [], **{hook: note(hook) for hook in hooks}})()


INNER = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
OUTER = ("on_train_batch_start", "on_train_batch_end")


@pytest.mark.parametrize("hooks", [INNER, OUTER, INNER + OUTER], ids=["inner", "outer", "all"])
def test_callbacks_hear_what_lightning_tells_them_of_an_ordinary_module(tmp_path, hooks):
    reference, listener = make_listener(*hooks), make_listener(*hooks)
    train_plain(tmp_path / "plain", [lambda: reference], val_check_interval=3)
    train_split(tmp_path / "split", 50, [lambda: listener], layout=WHOLE, val_check_interval=3)
    assert len(reference.heard) == 20 * len(hooks)
    assert listener.heard == reference.heard


def test_hooks_of_optimizers_are_called_once_for_each(tmp_path):
    listener = make_listener(*INNER)
    train_split(tmp_path, 50, [lambda: listener])
    calls = Counter((hook, step) for hook, step, *_ in listener.heard)
    per_optimizer = {(hook, step): 2 for hook in (INNER[0], INNER[3]) for step in range(20)}
    assert calls == per_optimizer | {(hook, step): 1 for hook in INNER[1:3] for step in range(20)}


class Looks(Callback):
    """Looks into every mini-batch."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, learner, batch, batch_idx) -> None:
        (turns,) = batch
        self.seen.append((batch_idx, turns.batches["alice0"].number, turns.batches["alice0"].ids.tolist()))

    def on_train_batch_end(self, trainer, learner, outputs, batch, batch_idx) -> None:
        (turns,) = batch
        self.seen.append((batch_idx, turns.batches["alice0"].number, turns.batches["alice0"].ids.tolist()))


def expected_views(loader):
    steps = [(epoch, i, step) for epoch in range(2) for i, step in enumerate(loader.steps(epoch))]
    numbered = [(epoch, i, step.batches["alice0"].tolist()) for epoch, i, step in steps]
    return [(i, (epoch, i), ids) for epoch, i, ids in numbered for _ in range(2)]


def test_a_callback_can_look_into_every_mini_batch(tmp_path):
    looks = Looks()
    _, trainer, _ = train_split(tmp_path, 50, [lambda: looks])
    assert looks.seen == expected_views(trainer.train_dataloader)


def test_a_subclass_of_the_learner_can_look_into_every_mini_batch(tmp_path):
    class Looking(SplitLearner):
        seen: list = []

        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            (turns,) = batch
            self.seen.append((batch_idx, turns.batches["alice0"].number, turns.batches["alice0"].ids.tolist()))

    _, trainer, _ = train_split(tmp_path, 50, kind=Looking)
    assert Looking.seen == expected_views(trainer.train_dataloader)[::2]


def test_a_metric_logged_inside_a_stretch_is_reduced_as_in_an_ordinary_module(tmp_path):
    """Lightning weighs it by the size of the batch, which it finds by iterating over the batch."""

    class Logs(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            module.log("seen", float(trainer.global_step), on_step=True, on_epoch=True)

    _, _, reference = train_plain(tmp_path / "plain", [Logs])
    expected = [(step, {k: v for k, v in m.items() if "seen" in k}) for step, m in reference]
    expected = [(step, m) for step, m in expected if m]
    assert [m["seen_epoch"] for _, m in expected if "seen_epoch" in m] == [
        pytest.approx((4 * sum(range(9)) + 3 * 9) / 39),
        pytest.approx((4 * sum(range(10, 19)) + 3 * 19) / 39),
    ]
    for length in LENGTHS:
        _, _, logged = train_split(tmp_path / str(length), length, [Logs], layout=WHOLE)
        found = [(step, {k: v for k, v in m.items() if "seen" in k}) for step, m in logged]
        assert [(step, m) for step, m in found if m] == expected

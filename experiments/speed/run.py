"""How long a mini-batch takes: splitlearn through Lightning, the unsplit network by hand, and the tutorial's own way.

    python experiments/speed/run.py

All three train the tutorial's network (784-128-640-10, SGD, batch 64) on 60,000 images, in one process, and take turns
every 100 mini-batches, since a shared machine changes its speed from second to second. splitlearn runs as
`+experiment=mnist_2party` does, with logger, progress bar, checkpoints and all. A ratio is the median over the epochs
of the ratio of their sums, so that what happens once an epoch counts; the first epoch warms up.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from loops import by_hand, images, the_tutorials_way

from splitlearn.build import build
from splitlearn.data import Source
from splitlearn.train import CONF


class Turns(pl.Callback):
    """After each stretch of splitlearn's, lets each other loop run as many mini-batches, or a share, and times them."""

    content_with_stretches = True

    def __init__(self, others: dict[str, Iterator[None]]) -> None:
        self.others = others
        self.seconds: list[dict[str, list[float]]] = []

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step, self.last = trainer.global_step, time.perf_counter()
        self.steps = trainer.num_training_batches

    def on_train_epoch_start(self, *_: Any) -> None:
        self.seconds.append({name: [] for name in ("split", *self.others)})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # From the end of the others' turn to here: also what Lightning did after the last stretch or epoch.
        self.seconds[-1]["split"].append(time.perf_counter() - self.last)
        # Who runs behind a loop of the same kernels finds warm caches, so the order changes each time.
        self.others = dict(reversed(self.others.items()))
        for name, loop in self.others.items():
            steps = trainer.global_step - self.step
            some = max(1, steps // SHARE[name])
            start = time.perf_counter()
            for _ in range(some):
                next(loop)
            self.seconds[-1][name].append((time.perf_counter() - start) * steps / some)
        self.step, self.last = trainer.global_step, time.perf_counter()

    def ratio(self, slow: str, fast: str) -> float:
        """The median over the epochs, but for the first, of how much longer `slow` took than `fast`."""
        return median(sum(epoch[slow]) / sum(epoch[fast]) for epoch in self.seconds[1:])

    def mini_batch(self, name: str) -> float:
        """The median over the epochs of the mean seconds that a mini-batch took."""
        return median(sum(epoch[name]) for epoch in self.seconds[1:]) / self.steps


def source() -> Source:
    """What splitlearn trains on here: the same images as the other loops."""
    x, y = images()
    rows = torch.utils.data.TensorDataset(x.unsqueeze(1), y)
    return Source(rows, torch.utils.data.TensorDataset(x[:64].unsqueeze(1), y[:64]), 10)


LOOPS = {"unsplit": by_hand, "tutorial": the_tutorials_way}
SHARE = {
    "unsplit": 1,
    "tutorial": 10,
}  # the tutorial's way is slow: of its mini-batches one in ten is run, and stands for ten


def measure(epochs: int, output_dir: str, typed: Sequence[str] = (), against: Sequence[str] = tuple(LOOPS)) -> Turns:
    with initialize_config_dir(CONF, version_base="1.3"):
        overrides = ["+experiment=mnist_2party", f"trainer.max_epochs={epochs}", f"output_dir={output_dir}", *typed]
        cfg = compose("train", overrides)
    cfg.data.source = {"_target_": f"{__name__}.source"}
    run = build(cfg)
    turns = Turns({name: LOOPS[name]() for name in against})
    run.trainer.callbacks.append(turns)  # type: ignore[attr-defined]
    run.trainer.fit(run.learner, datamodule=run.data)
    return turns


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=8, help="one of them warms up")
    parser.add_argument("typed", nargs="*", help="of splitlearn's configuration, e.g. steps_per_execution=1")
    options = parser.parse_args()
    with TemporaryDirectory() as output_dir:
        turns = measure(options.epochs, output_dir, options.typed)
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, python {sys.version.split()[0]}")
    for loop in ("split", "unsplit", "tutorial"):
        print(f"{loop:<10}{1e6 * turns.mini_batch(loop):8.0f} us a mini-batch")
    print(f"split/unsplit {turns.ratio('split', 'unsplit'):.2f}  tutorial/split {turns.ratio('tutorial', 'split'):.2f}")

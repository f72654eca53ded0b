"""How a thousand Alices compare with one, in time and in peak memory, over the same samples.

    python experiments/speed/alices.py
    python experiments/speed/alices.py --network mlp

On 64,000 random images of MNIST's shape, in mini-batches of 64. A thousand Alices have one mini-batch each, which is
the worst case: weights move with every mini-batch. The network is LeNet, or the tutorial's (784-128-640-10), of whose
189,450 parameters Alice has 183,040, with very little to compute beside: the worst case again. splitlearn runs as it
does from the command line, with logger, progress bar, checkpoints and all.

Time: the run of one and that of many take turns in one process, a stretch of mini-batches each, since a shared machine
changes its speed from second to second. The ratio is the median over the epochs, the first of which warms up. Memory:
the peak of a process each.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from tempfile import TemporaryDirectory
from threading import Semaphore
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from torch.utils.data import TensorDataset

from splitlearn.build import Run, build
from splitlearn.data import Source
from splitlearn.train import CONF

NETWORKS = {"lenet": "schemes", "mlp": "mnist_2party"}  # and the experiment that cuts it
SCHEMES = ("sequential", "fedavg", "splitfed_v1", "splitfed_v2")
MANY, BATCH_SIZE = 1000, 64


class Turns(pl.Callback):
    """Of two runs, in a thread each, one moves at a time, for a stretch; each times its own mini-batches by epoch."""

    content_with_stretches = True

    def __init__(self) -> None:
        self.mine, self.over = Semaphore(0), False
        self.seconds: list[float] = []

    def fit(self, run: Run, other: Turns) -> None:
        self.other = other
        run.trainer.callbacks.append(self)  # type: ignore[attr-defined]
        self.mine.acquire()
        try:
            run.trainer.fit(run.learner, datamodule=run.data)
        finally:
            self.over = True
            other.mine.release()

    def on_train_start(self, *_: Any) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        self.seconds.append(0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        # From the other's last stretch to here: also what happened at the end of the last epoch.
        self.seconds[-1] += time.perf_counter() - self.last
        self.other.mine.release()
        if not self.other.over:
            self.mine.acquire()
        self.last = time.perf_counter()


def source() -> Source:
    """As many samples as many Alices with a mini-batch each have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (MANY * BATCH_SIZE, 1, 28, 28), dtype=torch.uint8, generator=generator)
    rows = TensorDataset(x, torch.randint(10, (len(x),), generator=generator))
    return Source(rows, TensorDataset(*rows[:BATCH_SIZE]), 10)


def make(scheme: str, network: str, num_alices: int, epochs: int, output_dir: str) -> Run:
    typed = [f"schedule={scheme}", f"num_alices={num_alices}", f"data.batch_size={BATCH_SIZE}"]
    typed += ["data.val_fraction=0", "trainer.limit_val_batches=null", "metric=null"]
    length = [f"trainer.max_epochs={epochs}", f"output_dir={output_dir}/{num_alices}"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", [f"+experiment={NETWORKS[network]}", *typed, *length])
    cfg.data.source = {"_target_": f"{__name__}.source"}
    return build(cfg)


def seconds(scheme: str, network: str, epochs: int, output_dir: str) -> None:
    """Print how long an epoch takes with many Alices, and how much longer than with one."""
    one, many = Turns(), Turns()
    runs = [make(scheme, network, num_alices, epochs, output_dir) for num_alices in (1, MANY)]
    one.mine.release()
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(one.fit, runs[0], many), threads.submit(many.fit, runs[1], one)]:
            done.result()
    ratios = [b / a for a, b in zip(one.seconds[1:], many.seconds[1:], strict=True)]
    print("ratios", *(f"{ratio:.2f}" for ratio in ratios))
    print(median(one.seconds[1:]), median(many.seconds[1:]), median(ratios))


def memory(scheme: str, network: str, num_alices: int, output_dir: str) -> None:
    """Train for two epochs and print this process's peak of resident memory in MiB."""
    run = make(scheme, network, num_alices, 2, output_dir)
    run.trainer.fit(run.learner, datamodule=run.data)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_a_process(*arguments: object) -> list[float]:
    """Return the numbers in the last line that this script prints when it is called with these arguments."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def compare(schemes: list[str], network: str, epochs: int) -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, Lightning {pl.__version__}")
    print(f"{'an epoch, peak memory':<24}{'1 Alice':>20}{f'{MANY} Alices':>20}")
    times, memories = [], []
    for scheme in schemes:
        one, many, ratio = in_a_process("seconds", scheme, "--network", network, "--epochs", epochs)
        (least,), (most,) = (in_a_process("memory", scheme, "--network", network, "--alices", k) for k in (1, MANY))
        print(f"{scheme:<24}{one:8.2f} s {least:6.0f} MiB{many:8.2f} s {most:6.0f} MiB", flush=True)
        times.append(f"{scheme} {ratio:.2f}")
        memories.append(f"{scheme} {most / least:.2f}")
    print(f"{network}, {MANY} Alices/1, time: {', '.join(times)}; peak memory: {', '.join(memories)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", default="compare", choices=("compare", "seconds", "memory"))
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--network", default="lenet", choices=NETWORKS)
    parser.add_argument("--epochs", type=int, default=4, help="one of them warms up")
    parser.add_argument("--alices", type=int, default=MANY, help="whose memory is measured")
    options = parser.parse_args()
    with TemporaryDirectory() as output_dir:
        if options.what == "compare":
            compare(options.schemes, options.network, options.epochs)
        elif options.what == "seconds":
            seconds(options.schemes[0], options.network, options.epochs, output_dir)
        else:
            memory(options.schemes[0], options.network, options.alices, output_dir)

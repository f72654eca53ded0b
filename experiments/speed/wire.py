"""What a wire between processes adds to a mini-batch: gloo, and gRPC with mutual TLS, on loopback.

    python experiments/speed/wire.py

Two networks: the tutorial's (784-128-640-10, cut behind 640), where a mini-batch of 64 computes little and sends 160 kB
there and back, and VGG-16 cut behind its first convolution (without batch norm, linear layers 512 wide), which sends
16 MiB there and back. Each as a whole mini-batch, and in 4 micro-batches. The data are random numbers of MNIST's and
CIFAR-10's shapes.

splitlearn trains as it does from the command line, with one process per party (engine=processes), and for comparison
all parties in one process (engine=simulated), but without logger, progress bar and checkpoints. A ratio is the time
of a step between processes over what it cannot do without: what its parties computed, plus the *floor*, the time that
the step's payloads take there and back between two processes over a plain TCP socket. Below 1 is possible, since
parties may compute at the same time. The second ratio, in brackets, takes for the computing a step in one process,
where nobody has to wake up and no loop runs twice: it says how much slower a step becomes.

A shared machine changes its speed from minute to minute, so the runs of a round come one behind the other, a ratio is
taken within a round, and what is printed is the median over the rounds. The first epoch of a run warms up. Each party
has one thread unless `--threads` says otherwise, as many as the run in one process.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import socket
import time
import warnings
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.utils.data import TensorDataset

from splitlearn.data import Source
from splitlearn.train import CONF, train

# Here, and not below, since the processes of the parties import this module.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore")

BATCH_SIZE = 64
PROCESSES = ("engine=processes", "engine.save_every_n_steps=1000000")  # no snapshots
WIRES = {
    "simulated": ["engine=simulated"],
    "gloo": [*PROCESSES, "wire=gloo"],
    "grpc": [*PROCESSES, "wire=grpc"],
}
MICRO_BATCHES = (1, 4)


class Network(NamedTuple):
    """A network to cut: its configuration, the shape of its images, and how many epochs of how many steps it trains."""

    typed: tuple[str, ...]
    shape: tuple[int, ...]
    steps: int
    epochs: int


NETWORKS = {
    "mlp": Network(("+experiment=mnist_2party",), (1, 28, 28), 300, 4),
    "vgg16": Network(
        ("+experiment=cifar10_vgg16_2party", "model.batch_norm=false", "data.augment=null"), (3, 32, 32), 2, 2
    ),
}
QUICK = {"mlp": {"steps": 100, "epochs": 2}, "vgg16": {"steps": 1, "epochs": 2}}


class Run(NamedTuple):
    """What a mini-batch took: seconds, payload bytes in each direction, and each party's seconds by what they go to."""

    seconds: float
    num_bytes: dict[str, float]
    parties: dict[str, dict[str, float]]


def source(shape: tuple[int, ...], num_rows: int) -> Source:
    """Random images; the processes of the parties make the same ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (num_rows, *shape), dtype=torch.uint8, generator=generator)
    rows = TensorDataset(x, torch.randint(10, (num_rows,), generator=generator))
    return Source(rows, TensorDataset(*rows[:BATCH_SIZE]), 10)


def configuration(network: Network, wire: str, micro_batches: int, output_dir: str) -> DictConfig:
    typed = [*network.typed, *WIRES[wire], f"micro_batches={micro_batches}", f"output_dir={output_dir}"]
    typed += [f"data.batch_size={BATCH_SIZE}", "data.val_fraction=0", "metric=null", "scheduler=none"]
    typed += ["logger=none", "~callbacks.checkpoint", "trainer.enable_checkpointing=false"]
    typed += [f"trainer.max_epochs={network.epochs}", "trainer.enable_progress_bar=false"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", typed)
    num_rows = network.steps * BATCH_SIZE
    cfg.data.source = {"_target_": f"{__name__}.source", "shape": list(network.shape), "num_rows": num_rows}
    return cfg


def one_run(network: Network, wire: str, micro_batches: int) -> Run:
    """Train through the real program and read in its results.json what a mini-batch took."""
    with TemporaryDirectory() as output_dir:
        cfg = configuration(network, wire, micro_batches, output_dir)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            train(cfg)
        return per_step(json.loads((Path(output_dir) / "results.json").read_text()))


def per_step(results: dict[str, Any]) -> Run:
    """Seconds are those behind the first epoch."""
    first, last = results["epochs"][0], results["epochs"][-1]
    steps, before = last["step"] - first["step"], first.get("party_seconds", {})
    num_bytes = {pair: sum(kinds.values()) / last["step"] for pair, kinds in results["bytes"].items()}
    parties = {
        party: {what: (spent - before[party][what]) / steps for what, spent in account.items()}
        for party, account in last.get("party_seconds", {}).items()
    }
    return Run((last["seconds"] - first["seconds"]) / steps, num_bytes, parties)


def floor(there: int, back: int, parts: int) -> float:
    """The median seconds that so many bytes take to another process and as an answer back, over plain TCP, in parts."""
    context, times = multiprocessing.get_context("forkserver"), max(10, min(1000, 2**26 // (there + back)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = (server.getsockname()[1], there // parts, back // parts, parts, times)
        other = context.Process(target=answer, args=arguments)
        other.start()
        stream, _ = server.accept()
    with stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent, memory = bytes(there // parts), memoryview(bytearray(back // parts))
        seconds = [ask(stream, sent, memory, parts) for _ in range(times)]
    other.join()
    return median(seconds[times // 5 :])


def ask(stream: socket.socket, sent: bytes, memory: memoryview, parts: int) -> float:
    start = time.perf_counter()
    for _ in range(parts):
        stream.sendall(sent)
    for _ in range(parts):
        receive(stream, memory)
    return time.perf_counter() - start


def answer(port: int, there: int, back: int, parts: int, times: int) -> None:
    """What the other process does: takes all parts, and sends as many back."""
    memory, sent = memoryview(bytearray(there)), bytes(back)
    with socket.create_connection(("127.0.0.1", port)) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(times):
            for _ in range(parts):
                receive(stream, memory)
            for _ in range(parts):
                stream.sendall(sent)


def receive(stream: socket.socket, memory: memoryview) -> None:
    while len(memory):
        memory = memory[stream.recv_into(memory) :]


def one_round(network: Network, micro_batches: int, turn: int) -> dict[str, Run]:
    """A run over each wire; every other round in the opposite order. The floor is a run with nothing to compute."""
    order = list(WIRES) if turn % 2 == 0 else list(reversed(WIRES))
    runs = {wire: one_run(network, wire, micro_batches) for wire in order}
    num_bytes = runs["simulated"].num_bytes
    there, back = (round(count) for count in num_bytes.values())
    return {**runs, "floor": Run(floor(there, back, micro_batches), num_bytes, {})}


def ratio(runs: dict[str, Run], wire: str) -> float:
    computed = sum(account["computing"] for account in runs[wire].parties.values())
    return runs[wire].seconds / (computed + runs["floor"].seconds)


def ratio_to_one_process(runs: dict[str, Run], wire: str) -> float:
    return runs[wire].seconds / (runs["simulated"].seconds + runs["floor"].seconds)


def measure(networks: dict[str, Network], rounds: int) -> dict[tuple[str, int], list[dict[str, Run]]]:
    """Return the rounds of each network and number of micro-batches; what is compared is measured close together."""
    measured = defaultdict(list)
    for turn in range(rounds):
        for name, network in networks.items():
            for micro_batches in MICRO_BATCHES:
                measured[name, micro_batches].append(one_round(network, micro_batches, turn))
                print_round(name, micro_batches, measured[name, micro_batches][-1])
    return measured


def print_round(name: str, micro_batches: int, runs: dict[str, Run]) -> None:
    times = "  ".join(f"{what} {1000 * run.seconds:.2f}" for what, run in runs.items())
    print(f"{name:<6} M={micro_batches}  ms a step: {times}", flush=True)


def print_table(measured: dict[tuple[str, int], list[dict[str, Run]]]) -> None:
    """Milliseconds per mini-batch, and where they went at each party."""
    print(f"\n{'ms a mini-batch':<20}" + "".join(f"{what:>12}" for what in (*WIRES, "floor")))
    for (name, micro_batches), rounds in measured.items():
        times = [1000 * median(runs[what].seconds for runs in rounds) for what in (*WIRES, "floor")]
        print(f"{f'{name}, M={micro_batches}':<20}" + "".join(f"{ms:12.2f}" for ms in times))
        for wire, party in [(wire, party) for wire, run in rounds[0].items() for party in run.parties]:
            print(f"    {wire}, {party:<8}{account([runs[wire].parties[party] for runs in rounds])}")


def account(rounds: list[dict[str, float]]) -> str:
    return "".join(f"  {what} {1000 * median(spent[what] for spent in rounds):.2f}" for what in rounds[0])


def print_ratios(measured: dict[tuple[str, int], list[dict[str, Run]]]) -> None:
    ratios = []
    for (name, micro_batches), rounds in measured.items():
        found = []
        for wire in ("gloo", "grpc"):
            ours, strict = (median(f(runs, wire) for runs in rounds) for f in (ratio, ratio_to_one_process))
            found.append(f"{wire} {ours:.2f} ({strict:.2f})")
        ratios.append(f"{name} M={micro_batches}: {', '.join(found)}")
    print("step/(compute + TCP floor) (compute of one process):", "; ".join(ratios))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each party, and of the run in one process")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs, not how fast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    networks = {name: NETWORKS[name] for name in options.networks}
    if options.quick:
        networks = {name: network._replace(**QUICK[name]) for name, network in networks.items()}
    measured = measure(networks, options.rounds)
    print(f"{torch.get_num_threads()} threads a process, torch {torch.__version__}, {os.cpu_count()} cores")
    print_table(measured)
    print_ratios(measured)

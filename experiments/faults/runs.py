"""Runs of three parties in one command, and what their processes take of the host (Linux: from /proc)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PARTIES = ("bob", "alice0", "alice1")
RUN = (sys.executable, "-m", "splitlearn.train", "+experiment=digits_2party", "num_alices=2")


def start(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen([*RUN, *overrides, f"hydra.run.dir={folder}"], stdout=log, stderr=log)


def outcome(folder: Path) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """Test, and the last weights: in a run of processes each party's own."""
    paths = [*folder.glob("checkpoints/last.ckpt"), *folder.glob("*/checkpoints/last.ckpt")]
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    return json.loads((folder / "results.json").read_text())["test"], states


def equal(alone: Path, among: Path) -> bool:
    """Whether the test is the simulator's, and so are, to the bit, all its weights: the last Alice's bottom, too."""
    (test, [weights]), (others_test, states) = outcome(alone), outcome(among)
    found = [any(torch.equal(w, state[name]) for state in states if name in state) for name, w in weights.items()]
    return test == others_test and all(found)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def below(pid: int) -> list[int]:
    """The process and all that descend from it."""
    return [pid, *(each for child in children(pid) for each in below(child))]


def playing(pid: int) -> list[int]:
    """The processes of the parties: the command's server of forks starts them."""
    return [each for child in children(pid) for each in children(child)]


def status(pid: int, field: str) -> int:
    """A number of /proc/PID/status, memory in MB; 0 when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    words = next((line.split()[1:] for line in lines if line.startswith(f"{field}:")), ["0"])
    return int(words[0]) // (1024 if words[-1] == "kB" else 1)


def descriptors(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


def newest_step(folder: Path) -> int:
    """The step of the newest snapshot that all have."""
    kept = [{int(path.stem.partition("-step")[2]) for path in folder.glob(f"{p}/snapshots/*.ckpt")} for p in PARTIES]
    return max(set.intersection(*kept), default=0)

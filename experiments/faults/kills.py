"""Parties killed at random moments, also before the first mini-batch; or stopped by SIGTERM, and gone on with.

Counts the runs that hang, and those whose end is the simulator's to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wire", default="gloo", help="gloo or grpc")
    parser.add_argument("--kills", type=int, default=20, help="runs, each with one kill")
    parser.add_argument("--signal", default="SIGKILL", help="SIGKILL or SIGTERM")
    parser.add_argument("--within", type=float, default=8, help="seconds from the parties' start to the latest kill")
    parser.add_argument("--seconds", type=float, default=120, help="after which a run is taken to hang")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="of the run, e.g. trainer.max_epochs=5")
    args = parser.parse_args()
    asked = ["logger=none", *args.more]
    engine = ["engine=processes", f"wire={args.wire}", "engine.on_failure=wait", "engine.save_every_n_steps=20"]
    draw, found = random.Random(args.seed), Counter[str]()
    with TemporaryDirectory() as name:
        alone = Path(name) / "alone"
        assert runs.start(alone, *asked).wait() == 0, (Path(name) / "alone.log").read_text()
        for number in range(args.kills):
            folder = Path(name) / str(number)
            how, step = killed(folder, [*asked, *engine], draw, args)
            if how == "ended":
                how = "equal" if runs.equal(alone, folder) else "NOT EQUAL"
            found[how] += 1
            print(f"{number}: killed with step {step} in all snapshots: {how}", flush=True)
            if how != "equal":
                print((Path(name) / f"{number}.log").read_text()[-1500:])
    print(dict(found))


def killed(folder: Path, asked: list[str], draw: random.Random, args: argparse.Namespace) -> tuple[str, int]:
    """Run, and signal a party at a random moment; one that was stopped goes on. Return how it ended, and when."""
    with runs.start(folder, *asked) as run:
        while run.poll() is None and len(runs.playing(run.pid)) < len(runs.PARTIES):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, args.within))
        step, players = runs.newest_step(folder), runs.playing(run.pid)
        if players:
            os.kill(draw.choice(players), signal.Signals[args.signal])
        code = ended(run, args.seconds)
    if code is not None and code != 0 and args.signal != "SIGKILL":  # all were stopped, as they should be
        ckpt = [f"ckpt={folder}"] if runs.newest_step(folder) else []
        with runs.start(folder, *asked, *ckpt) as again:
            code = ended(again, args.seconds)
    return "HANGS" if code is None else "ended" if code == 0 else f"exit code {code}", step


def ended(run: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return the exit code; None when the run does not end in that time, and then end it."""
    try:
        return run.wait(seconds)
    except subprocess.TimeoutExpired:
        run.kill()
        return None


if __name__ == "__main__":
    main()

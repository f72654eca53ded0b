"""Many mini-batches on a wire while a party is killed time and again, with engine.on_failure=wait.

Prints memory, descriptors and threads of each party's process over time, and whether the end is the simulator's.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wire", default="gloo", help="gloo or grpc")
    parser.add_argument("--mini-batches", type=int, default=20000)
    parser.add_argument("--every", type=int, default=2000, help="mini-batches between two kills")
    parser.add_argument("--seconds", type=float, default=3600, help="after which the run is ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="of the run, e.g. schedule=splitfed_v2")
    args = parser.parse_args()
    endless = ["trainer.max_epochs=-1", "scheduler=none"]  # a cosine would need to know the end
    asked = [f"trainer.max_steps={args.mini_batches}", *endless, "logger=none", *args.more]
    with TemporaryDirectory() as name:
        alone, among = Path(name) / "alone", Path(name) / "among"
        assert runs.start(alone, *asked).wait() == 0, (Path(name) / "alone.log").read_text()
        engine = ["engine=processes", f"wire={args.wire}", "engine.on_failure=wait", "engine.save_every_n_steps=200"]
        code, kills = soaked(among, [*asked, *engine], args)
        print(f"{kills} kills; exit code {code}")
        if code != 0:
            print((Path(name) / "among.log").read_text()[-2000:])
        print("equal to the simulator's:", code == 0 and runs.equal(alone, among))


def soaked(folder: Path, asked: list[str], args: argparse.Namespace) -> tuple[int | None, int]:
    """Run, and kill a party whenever so many mini-batches more are in all snapshots; return exit code and kills."""
    draw, began, told, due, kills = random.Random(args.seed), time.monotonic(), 0.0, args.every, 0
    with runs.start(folder, *asked) as run:
        while run.poll() is None and time.monotonic() < began + args.seconds:
            players, step = runs.playing(run.pid), runs.newest_step(folder)
            if time.monotonic() > told + 10 and players:
                told = time.monotonic()
                print(f"{told - began:5.0f} s, step {step}: {', '.join(map(account, players))}", flush=True)
            if args.mini_batches > step >= due and len(players) == len(runs.PARTIES):
                os.kill(draw.choice(players), signal.SIGKILL)
                due, kills = due + args.every, kills + 1
            time.sleep(0.2)
        code = run.poll()
        run.kill()
    return code, kills


def account(pid: int) -> str:
    return f"{runs.status(pid, 'VmRSS')} MB {runs.descriptors(pid)} fds {runs.status(pid, 'Threads')} threads"


if __name__ == "__main__":
    main()

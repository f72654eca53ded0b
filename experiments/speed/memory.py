"""How much memory a run takes: splitlearn through Lightning, and the unsplit network by hand, a process each.

python experiments/speed/memory.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
from tempfile import TemporaryDirectory

STEPS = 938


def by_hand() -> None:
    from loops import by_hand

    for _, _ in zip(range(STEPS), by_hand(), strict=False):
        pass


def split() -> None:
    from run import measure

    with TemporaryDirectory() as output_dir:
        measure(epochs=1, output_dir=output_dir, against=())


def peak(loop: str) -> float:
    """Peak resident memory in MiB of a process that runs one epoch of `loop`."""
    done = subprocess.run([sys.executable, __file__, loop], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1024


if __name__ == "__main__":
    if sys.argv[1:]:
        {"by_hand": by_hand, "split": split}[sys.argv[1]]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    else:
        data = 60_000 * 784 * 4 / 2**20
        hand, ours = peak("by_hand"), peak("split")
        print(f"by hand {hand:.0f} MiB, splitlearn {ours:.0f} MiB, the data {data:.0f} MiB")
        print(f"splitlearn/(by hand + data) {ours / (hand + data):.2f}")

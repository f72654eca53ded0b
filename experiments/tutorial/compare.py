"""Hold the run by hand beside the run through Lightning: `python compare.py BY_HAND.json LIGHTNING.json`."""

import json
import sys
from pathlib import Path


def compare(by_hand: Path, lightning: Path) -> None:
    """Print the training losses of both runs. SystemExit unless losses and bytes are equal, to the bit."""
    ours, theirs = (json.loads(path.read_text()) for path in (by_hand, lightning))
    if len(ours["epochs"]) != len(theirs["epochs"]):
        sys.exit(f"{len(ours['epochs'])} epochs by hand, {len(theirs['epochs'])} epochs through Lightning")
    losses = [(a["train/loss"], b["train/loss"]) for a, b in zip(ours["epochs"], theirs["epochs"], strict=True)]
    print(f"epoch  {'by hand':<22} through Lightning")
    for epoch, (a, b) in enumerate(losses):
        print(f"{epoch:>5}  {a!r:<22} {b!r}")
    unequal = [epoch for epoch, (a, b) in enumerate(losses) if a != b]
    print(f"equal to the bit: {len(losses) - len(unequal)} of {len(losses)} epochs")
    if unequal:
        sys.exit(f"the losses differ in epoch {', '.join(map(str, unequal))}")
    if ours["bytes"] != theirs["bytes"]:
        sys.exit(f"other bytes crossed: {ours['bytes']} by hand, {theirs['bytes']} through Lightning")


if __name__ == "__main__":
    compare(*map(Path, sys.argv[1:]))

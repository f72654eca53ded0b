"""What the parties tell each other before the first mini-batch, and what follows from it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from splitlearn.engines.snapshots import newest_common
from splitlearn.errors import InputError
from splitlearn.layout import Party
from splitlearn.star import Greeting

COMPARED = ("version", "torch", "layout", "model", "num_alices", "schedule", "data")
TYPES = {
    **{"config": dict, "snapshots": dict, "common": list, "nonce": str, "threads": int},
    **{"run": str | None, "certificate": str | None, "gpu": str | None},
}


def check_greeting(ours: Greeting, theirs: Greeting, hub: Party) -> None:
    """Raises InputError that names the first difference, or what is no greeting."""
    party = theirs["party"]
    for key in (*COMPARED, "resumes"):
        if ours[key] != theirs.get(key):
            raise InputError(f"`{key}` is {ours[key]} at {hub} and {theirs.get(key)} at {party}: they must be the same")
    for key, kind in TYPES.items():
        if key not in theirs or not isinstance(theirs[key], kind):
            raise InputError(f"`{key}` of {party} is {str(theirs.get(key, 'missing'))[:80]}, which is no greeting")
    for key in sorted({*ours["config"], *theirs["config"]}):
        mine, others = ours["config"].get(key), theirs["config"].get(key)
        if mine != others:
            raise InputError(f"`{key}` is {mine} at {hub} and {others} at {party}: all must be started with the same")


def agree(greetings: Mapping[Party, Greeting], known: str | None) -> tuple[str, int]:
    """Return the run that all belong to, and the step that they go on from, 0 for its start.

    Raises InputError where somebody lacks what the others go on from.
    """
    runs = {greeting["run"] for greeting in greetings.values() if greeting["run"]} | ({known} - {None})
    offers = [
        {run: steps for run, steps in greeting["snapshots"].items() if not runs or run in runs}
        for greeting in greetings.values()
    ]
    resumes = any(greeting["resumes"] for greeting in greetings.values())
    if not runs and not resumes:
        return uuid.uuid4().hex, 0
    found = newest_common(offers)
    if found is not None:
        return found
    lacking = [party for party, offer in zip(greetings, offers, strict=True) if not offer]
    if resumes or any(run in greeting["common"] for greeting in greetings.values() for run in runs):
        raise InputError(
            f"there is no step of which all have a snapshot ({', '.join(lacking) or 'nobody'} has none of this run): "
            "start each with the folder of the run, by `ckpt=FOLDER` or the `hydra.run.dir` that it had"
        )
    return str(next(iter(runs))), 0


def warn_of_threads(greetings: Mapping[Party, Greeting]) -> None:
    """How many threads add up a sum decides about its last bits."""
    threads = {party: greeting["threads"] for party, greeting in greetings.items()}
    if len(set(threads.values())) > 1:
        told = ", ".join(f"{party} {number}" for party, number in threads.items())
        rank_zero_warn(f"threads differ ({told}), and so may the last bits of what they compute: set OMP_NUM_THREADS")

"""What the parties tell each other before the first mini-batch, and what follows from it."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from splitlearn.certificates import check_certificate
from splitlearn.data.own_table import hashed
from splitlearn.errors import InputError, outside
from splitlearn.federation.forms import GREETING, PROGRAM, SHOWN, WELCOME, are_texts, check_form, is_run
from splitlearn.federation.snapshots import newest_common
from splitlearn.federation.streams import DifferenceError, Greeting
from splitlearn.layout import Party

MOST_IDS = 100_000  # that are compared one by one; their hashes are 1.4 MB
DIGEST = re.compile("[0-9a-f]{8,64}")  # of which two tell nobody anything


def check_greeting(
    ours: Greeting, theirs: Greeting, hub: Party, ca: bytes | None = None, names: Sequence[str] = ()
) -> None:
    """Raises InputError for what is no greeting, and DifferenceError with the first difference.

    `ca` is that of the hub, PEM, where parties have certificates; `names` are the ids of the hub's own file, if any.
    The configuration comes before the data, since a digest of these has no words.
    """
    both = Both(ours, theirs, hub)
    check_form(PROGRAM, theirs, f"the greeting of {both.party}")
    for key in PROGRAM:
        both.compare(key, ours[key], theirs[key], "install the same at both")
    check_form(GREETING, theirs, f"the greeting of {both.party}")
    for key in sorted({*ours["config"], *theirs["config"]}):
        both.compare(key, ours["config"].get(key), theirs["config"].get(key), "all must be started with the same")
    _check_proof(ours, theirs, ca)
    starts = {True: "behind a run (`ckpt`)", False: "anew"}
    both.compare("start", starts[ours["resumes"]], starts[theirs["resumes"]], "give all the same `ckpt`, or none")
    both.compare_ids(names)
    both.compare_data()  # before what follows from it: other classes make another model
    for key in ("layout", "model", "num_alices", "schedule"):
        both.compare(key, ours[key], theirs[key], "they must be the same")
    both.compare("data", ours["data"], theirs["data"], "the data must be the same at both")


class Both(NamedTuple):
    """Two greetings, `ours` of the hub, and theirs."""

    ours: Greeting
    theirs: Greeting
    hub: Party

    @property
    def party(self) -> Party:
        return str(self.theirs["party"])

    def compare(self, key: str, mine: object, others: object, cure: str) -> None:
        """Raises DifferenceError unless both values are the same."""
        if mine == others:
            return
        here, there = _beginning_alike(str(mine), str(others))
        raise DifferenceError(f"`{outside(key, SHOWN)}` is {here} at {self.hub} and {there} at {self.party}: {cure}")

    def compare_data(self) -> None:
        """Raises DifferenceError with the first difference in what all must have alike; a digest is not shown."""
        cure = "give both the same data by `data.root`"
        reordered = self.ours["alike"].get("rows", 0) == self.theirs["alike"].get("rows", 1)
        for key, mine in self.ours["alike"].items():
            others = self.theirs["alike"].get(key, mine)  # of what only one of both has, nothing is to be compared
            if mine != others and DIGEST.fullmatch(mine):
                how = "the same rows, but in another order: " if reordered else ""
                fault = f"`{outside(key, SHOWN)}` is not the same at {self.hub} and {self.party}"
                raise DifferenceError(f"{fault}: {how}{cure}")
            self.compare(key, mine, others, cure)

    def compare_ids(self, names: Sequence[str]) -> None:
        """Raises DifferenceError where files of one's own have other rows: it asks how many each lacks."""
        mine, others = self.ours["file"], self.theirs["file"]
        if mine is None or others is None or mine["ids"] == others["ids"]:
            return
        told = f"{mine['number']} at {self.hub} and {others['number']} at {self.party}"
        fault = f"the ids of the rows differ ({told})"
        cure = "bring all files to the same ids"
        if max(mine["number"], others["number"]) > MOST_IDS:
            raise DifferenceError(f"{fault}: {cure}")
        key = secrets.token_bytes(16)

        def explain(answer: object) -> str:
            if not are_texts(answer):
                return f"{fault}: {cure}"
            here, there = set(hashed(names, key)), set(answer)  # type: ignore[call-overload]
            return (
                f"{fault}: {self.hub} lacks {len(there - here)} of those of {self.party}, who lacks "
                f"{len(here - there)} of those of {self.hub}: {cure}"
            )

        raise DifferenceError(f"{fault}: {cure}", ask=key.hex(), explain=explain)


def answer_with(names: Sequence[str]) -> Callable[[Any], list[str]]:
    """Return what answers the question of `compare_ids`: hashes of one's own ids by the hub's key."""

    def answer(ask: Any) -> list[str]:
        if not is_run(ask):
            raise InputError(f"the hub asks for ids by the key {outside(ask, SHOWN)}, which has no sense")
        return hashed(names, bytes.fromhex(ask))

    return answer


def check_columns(greetings: Mapping[Party, Greeting]) -> None:
    """Raises InputError where a column stands in two parties' files, unless it is one file that both have."""
    files = {party: greeting["file"] for party, greeting in greetings.items() if greeting["file"] is not None}
    for first, second in combinations(files, 2):
        twice = [name for name in files[first]["columns"] if name in files[second]["columns"]]
        if twice and files[first]["digest"] != files[second]["digest"]:
            raise InputError(
                f"column {outside(twice[0], SHOWN)} stands in the files of {first} and of {second}, and may mean "
                "something else at each: remove it from the file of who does not own it, or give it another name"
            )


def check_initial(greetings: Mapping[Party, Greeting]) -> None:
    """Raises InputError where those who hand weights on to each other would start from other ones."""
    told = {party: greeting["initial"] for party, greeting in greetings.items() if greeting["initial"] is not None}
    first = next(iter(told), "")
    for party, digest in told.items():
        if digest != told[first]:
            raise InputError(
                f"{first} and {party} start from other weights, and hand them on to each other: give both the same "
                "parts by `init`"
            )


def check_welcome(welcome: Greeting, ours: Greeting, parties: Sequence[Party]) -> None:
    """Raises InputError for what is no welcome to who has greeted by `ours`; `parties` are all, the hub first."""
    hub = parties[0]
    check_form(WELCOME, welcome, f"the welcome of {hub}")
    present = [party for party in parties if party not in welcome["gone"]]
    if welcome["parties"] != present or not {hub, ours["party"]} <= {*present}:
        told = outside(", ".join(welcome["parties"]), SHOWN)
        raise InputError(f"`parties` of the welcome of {hub} is {told}, and must be {', '.join(present)}")
    for key, form in (("certificates", GREETING["certificate"]), ("nonces", GREETING["nonce"])):
        each = welcome.get(key)
        if not isinstance(each, dict) or {*each} != {*present} or not all(map(form, each.values())):
            raise InputError(f"`{key}` of the welcome of {hub} must have one for each of {', '.join(present)}")


def _check_proof(ours: Greeting, theirs: Greeting, ca: bytes | None) -> None:
    """The number used once and the certificate, by which Alices seal what they hand on."""
    party, certificate = theirs["party"], theirs["certificate"]
    if (certificate is None) != (ca is None) or len(theirs["nonce"]) != len(ours["nonce"]):
        raise InputError(f"`certificate` and `nonce` of {party} must be there with wire=grpc and TLS, and only then")
    if ca is not None:
        check_certificate(certificate.encode(), ca, party)


def _beginning_alike(mine: str, others: str) -> tuple[str, str]:
    """Return both as they may be shown; of what is long, from shortly before the first difference on."""
    if max(len(mine), len(others)) > SHOWN:
        same = next((i for i, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b), SHOWN)
        start = max(0, same - SHOWN // 4)
        mine, others = (f"{'...' * (start > 0)}{text[start:]}" for text in (mine, others))
    return outside(mine, SHOWN), outside(others, SHOWN)


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

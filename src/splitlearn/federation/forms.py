"""What must be so of what another party tells before it is used: a greeting, or the hub's welcome."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from splitlearn.errors import InputError, outside
from splitlearn.federation.streams import Greeting

SHOWN = 120  # characters of a value that another party gave
LARGEST_COUNT = 2**40
RUN_ID = re.compile("[0-9a-f]{32}")


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_run(value: object) -> bool:
    return isinstance(value, str) and RUN_ID.fullmatch(value) is not None


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def are_steps(value: object) -> bool:
    """The steps of each run of which there are snapshots."""
    return isinstance(value, dict) and all(
        is_run(run) and isinstance(steps, list) and all(map(is_count, steps)) for run, steps in value.items()
    )


def is_file(value: object) -> bool:
    """A party's own file: a digest of its ids, their number, its columns, and a digest of it all."""
    return isinstance(value, dict) and all(
        fits(value.get(key))
        for key, fits in (("ids", is_text), ("number", is_count), ("columns", are_texts), ("digest", is_text))
    )


Form = Mapping[str, Callable[[Any], bool]]
PROGRAM: Form = {"version": is_text, "torch": is_text}
GREETING: Form = {
    "resumes": lambda value: isinstance(value, bool),
    **dict.fromkeys(("layout", "model", "num_alices", "schedule", "data"), is_text),
    "config": lambda value: isinstance(value, dict),
    "alike": lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
    "file": lambda value: value is None or is_file(value),
    "initial": lambda value: value is None or is_text(value),
    "run": lambda value: value is None or is_run(value),
    "snapshots": are_steps,
    "common": lambda value: isinstance(value, list) and all(map(is_run, value)),
    "nonce": lambda value: value == "" or is_run(value),
    "threads": is_count,
    "gpu": lambda value: value is None or is_text(value),
    "certificate": lambda value: value is None or is_text(value),
}
WELCOME: Form = {"parties": are_texts, "run": is_run, "step": is_count, "gone": are_texts}


def check_form(form: Form, message: Greeting, whose: str) -> None:
    """Raises InputError for what is missing, or not as it must be; `whose` it is, in words."""
    for key, fits in form.items():
        if key not in message or not fits(message[key]):
            raise InputError(f"`{key}` of {whose} is {outside(message.get(key, 'missing'), SHOWN)}, which has no sense")

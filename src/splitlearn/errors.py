"""What can be said to a user in one line, without a stack trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """What the user gave does not fit. The message names the value, the rule and the cure."""


@contextmanager
def told_if_full(path: str | Path, key: str = "hydra.run.dir") -> Iterator[None]:
    """Raises InputError where `path` cannot be written, be the disk full or the folder another's; `key` moves it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): make room, or take a folder of your own, {key}=..."
        ) from error


CURE = "lower `optimizer.lr` or set `trainer.gradient_clip_val`"  # of a loss that diverges


def check_whole(name: str, value: object, also: str = "") -> None:
    """Raises InputError for a value that is no whole number of at least 1; `also` tells what else it may be."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"`{name}` (={value}) must be a whole number of at least 1{also}")


LONGEST = 600  # characters of a message; gRPC drops one of more than some kilobytes


def outside(text: object, most: int = LONGEST) -> str:
    """Return what came from outside as a log may show it: cut, and with what moves a cursor or ends a line escaped."""
    text = str(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown + "..." * (len(text) > most)


class DivergedError(RuntimeError):
    """The loss, or what it is made of, is not a finite number."""


class UnsentError(DivergedError):
    """What `party` is about to send is not finite; who knows the mini-batch tells why."""

    def __init__(self, message: str, party: str) -> None:
        super().__init__(message)
        self.party = party

"""What a run costs, counted where it happens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from splitlearn.layout import Party

KINDS = (
    *("activation", "gradient", "label", "weights", "weight_gradient", "optimizer_state", "metric", "control"),
    "prediction",
)


class Ledger:
    """Bytes by sender, receiver and kind of message; and the training passes, from which FLOPs are worked out.

    `num_bytes` maps `(src, dst, kind)` to the bytes that went that way so far, `passes` maps `(taker, num_rows)` to
    the passes, forward and backward, of as many rows in the turns of that Alice.
    """

    def __init__(self) -> None:
        self.num_bytes: dict[tuple[Party, Party, str], int] = {}
        self.passes: dict[tuple[Party, int], int] = {}
        self.diary: Callable[[Party, Party, str, int], None] | None = None  # told each message, in order

    def add(self, src: Party, dst: Party, kind: str, num_bytes: int) -> None:
        key = (src, dst, kind)
        self.num_bytes[key] = self.num_bytes.get(key, 0) + num_bytes
        if self.diary is not None:
            self.diary(src, dst, kind, num_bytes)

    def add_pass(self, taker: Party, num_rows: int) -> None:
        key = (taker, num_rows)
        self.passes[key] = self.passes.get(key, 0) + 1

    def table(self, merge: bool = False) -> dict[str, dict[str, int]]:
        """Return `{"alice0->bob": {"activation": bytes, ...}, ...}`, summed over the Alices as `alice*` to `merge`."""
        table: dict[str, dict[str, int]] = {}
        for (src, dst, kind), num_bytes in self.num_bytes.items():
            pair = f"{merged(src)}->{merged(dst)}" if merge else f"{src}->{dst}"
            kinds = table.setdefault(pair, {})
            kinds[kind] = kinds.get(kind, 0) + num_bytes
        return table

    def hear(self, table: dict[str, dict[str, int]], teller: Party, listener: Party) -> None:
        """Take over what `teller` has counted of its own messages, but for those with `listener`, who counts too."""
        told = {key: count for key, count in _counts(table).items() if teller in key[:2] and listener not in key[:2]}
        self.num_bytes.update(told)

    def load(self, table: dict[str, dict[str, int]]) -> None:
        """Take the counts of an earlier `table()`, e.g. from a checkpoint."""
        self.num_bytes = _counts(table)


@cache
def is_alice(party: Party) -> bool:
    return party.startswith("alice") and party[5:].isdecimal()


@cache
def merged(party: Party) -> Party:
    """All Alices are `alice*`."""
    return "alice*" if is_alice(party) else party


def _counts(table: dict[str, dict[str, int]]) -> dict[tuple[Party, Party, str], int]:
    return {(*_split(pair), kind): num_bytes for pair, kinds in table.items() for kind, num_bytes in kinds.items()}


def _split(pair: str) -> tuple[Party, Party]:
    src, _, dst = pair.partition("->")
    return src, dst

"""The labels that a user's files hold as text: in which order they are numbered."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from decimal import Decimal, InvalidOperation

from splitlearn.data.csv_file import NUMBER


def in_order(labels: Iterable[str]) -> list[str]:
    """Return the different labels, by number where all are whole numbers, or else as text sorts.

    So labels 0 to 11 are the classes 0 to 11, which weights by class and `ignore_index` are given for.
    """
    classes = sorted(set(labels))
    return sorted(classes, key=Decimal) if are_whole(classes) else classes


def are_whole(labels: Collection[str]) -> bool:
    """Whether all labels are whole numbers, in any spelling."""
    return all(value is not None and value == value.to_integral_value() for value in map(as_number, labels))


def as_number(text: str) -> Decimal | None:
    """Return the number that `text` is, to its last digit, or None where it is none."""
    with suppress(InvalidOperation):  # an exponent beyond all reason
        return Decimal(text) if NUMBER.fullmatch(text) else None
    return None

"""The labels and ids that a user's files hold as text: what is none, what is one in two spellings, and their order."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from unicodedata import category, normalize

from splitlearn.data.csv_file import NUMBER

MISSING = {"", "na", "n/a", "<na>", "nan", "null", "none"}  # as programs write that there is nothing
QUOTES = "\"'`\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb"
WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")  # of ids: 1.1 and 1.10 may be two, and 12e4 is a code


def in_order(labels: Iterable[str]) -> list[str]:
    """Return the different labels, by number where all are whole numbers, or else as text sorts.

    So labels 0 to 11 are the classes 0 to 11, which weights by class and `ignore_index` are given for.
    """
    classes = sorted(set(labels))
    return sorted(classes, key=Decimal) if are_whole(classes) else classes


def are_whole(labels: Collection[str]) -> bool:
    """Whether all labels are whole numbers, in any spelling."""
    return all(value is not None and value == value.to_integral_value() for value in map(_number, labels))


def require_label(where: str, column: str, text: str) -> None:
    """Raises ValueError, saying `where`, for a label that is none."""
    if is_missing(text):
        found, cure = (f", but `{text}`", ", or call the class otherwise") if text else ("", "")
        raise ValueError(f"{where}: column {column} has no label{found}; fill it in, or remove the line{cure}")


def is_missing(text: str) -> bool:
    """Whether `text` is what programs write where there is nothing."""
    return _bare(text).casefold() in MISSING


def require_one_spelling(places: Mapping[str, str], what: str, numbers: re.Pattern[str] = NUMBER) -> None:
    """Raises ValueError where two texts are one in two spellings; `places` says where each stands first.

    One are equal numbers, of those that `numbers` matches, and texts that differ by Unicode's composition, by what is
    blank or not seen, or by quotes around them.
    """
    first: dict[str | Decimal, str] = {}
    for text, where in places.items():
        key = _number(bare := _bare(text), numbers)
        other = first.setdefault(bare if key is None else key, text)
        if other != text:
            one, two = _told_apart(text, other)
            rule = f"is `{two}` of {places[other]} in another spelling"
            raise ValueError(f"{where}: {what} `{one}` {rule}: write them alike, or call one otherwise if they are two")


def warn_of_case(places: Mapping[str, str], what: str) -> None:
    """Warn of texts that differ in upper and lower case alone: of the first pair, and how many more there are."""
    first: dict[str, str] = {}
    pairs = [(text, other) for text in places if (other := first.setdefault(_bare(text).casefold(), text)) != text]
    if pairs:
        text, other = pairs[0]
        rule = f"differs from `{other}` of {places[other]} in upper and lower case alone"
        more = f", as {len(pairs) - 1} more do" if len(pairs) > 1 else ""
        warnings.warn(f"{places[text]}: {what} `{text}` {rule}{more}: write them alike if they are one", stacklevel=3)


def _bare(text: str) -> str:
    """Return the text composed, with single blanks, without what is not seen and without quotes around it."""
    if text.isascii() and text.isalnum():  # as most of a million ids are
        return text
    if not text.isprintable():
        text = "".join(character for character in text if category(character) != "Cf")
    text = " ".join(normalize("NFC", text).split())
    while len(text) > 1 and text[0] in QUOTES and text[-1] in QUOTES:
        text = text[1:-1].strip()
    return text


def _number(text: str, numbers: re.Pattern[str] = NUMBER) -> Decimal | None:
    """Return the number that `text` is, to its last digit, or None where it is none."""
    if numbers.fullmatch(text):
        with suppress(InvalidOperation):  # an exponent beyond all reason
            return Decimal(text)
    return None


def _told_apart(*texts: str) -> list[str]:
    """Return the texts, by their code points where they would look the same."""
    seen = {" ".join(normalize("NFC", text).split()) for text in texts}
    return [ascii(text)[1:-1] for text in texts] if len(seen) == 1 or not all(map(str.isprintable, texts)) else [*texts]

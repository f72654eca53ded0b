"""The CSV files of a user: strict text, every line with the place where it stands."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path

import torch

LARGEST = torch.finfo(torch.float32).max
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # float() would take 1_000 and ١٢ as well


def lines_of(
    path: Path, group: str, key: str, encoding: str = "utf-8", delimiter: str = ","
) -> Iterator[tuple[str, list[str]]]:
    """Yield the header of a CSV, then the fields of each line that is not empty; before each, where it stands.

    `group` and `key` are those of the configuration that names the file. FileNotFoundError where the file is not there;
    ValueError for what is not text of this encoding, for a name in the header that is empty or comes twice, and for a
    line that is shorter or longer than the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{group}.{key}` (={path}) is not a file: name a CSV with a header")
    delimiter = "\t" if delimiter == "\\t" else delimiter  # a shell and Hydra leave the two characters as they are
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n':
        raise ValueError(f'`{group}.delimiter` (={delimiter!r}) must be one character, e.g. ";" or "\\t"')
    lines = csv.reader(StringIO(_text(path, group, encoding), newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        _check_header(f"{path}, line 1", header)
        yield f"{path}, line 1", header
        for fields in filter(None, lines):
            where = f"{path}, line {lines.line_num}"
            if len(fields) != len(header):
                raise ValueError(f"{where}: {len(fields)} fields, but the header has {len(header)}; mend the line")
            yield where, [text.strip() for text in fields]
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}; mend or remove the line") from None


def _check_header(where: str, header: Sequence[str]) -> None:
    if "" in header:
        which = f"column {header.index('') + 1} of {len(header)} in the header has no name"
        raise ValueError(f"{where}: {which}; name it, or leave it out (pandas: `to_csv(index=False)`)")
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise ValueError(f"{where}: column {twice[0]} comes twice in the header; each must have a name of its own")


def other_delimiter(header: Sequence[str], group: str) -> str:
    """Return the advice to name another delimiter where a header of one field shows it, or nothing."""
    found = [mark for mark in ";\t|," if len(header) == 1 and mark in header[0]]
    return (
        f"; it seems to be separated by {found[0]!r}: say '{group}.delimiter=\"{_shown(found[0])}\"'" if found else ""
    )


def number(where: str, column: str, text: str) -> float:
    """Return the number that `text` is; ValueError, saying `where`, for what float32 cannot hold."""
    if not text:
        raise ValueError(f"{where}: column {column} has no value; fill it in, or remove its line or column")
    if not NUMBER.fullmatch(text) or not abs(value := float(text)) <= LARGEST:
        rule = f"`{text}` is not a number of float32, in column {column}"
        comma = ": numbers are written with a point" if NUMBER.fullmatch(text.replace(",", ".")) else ""
        raise ValueError(f"{where}: {rule}{comma}; mend it, or remove its line or column, by `data.drop`, say")
    return value


def _text(path: Path, group: str, encoding: str) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig" if codecs.lookup(str(encoding)).name == "utf-8" else encoding)
    except LookupError as error:
        raise ValueError(f"`{group}.encoding` (={encoding}): {error}; take utf-8, cp1252 or utf-16, say") from None
    except UnicodeDecodeError as error:
        where = f"{path}, line {data[: error.start].count(10) + 1}"
        rule = f"byte {data[error.start]:#04x} is not {encoding}"
        raise ValueError(f"{where}: {rule}; save the file as UTF-8, or name its own in `{group}.encoding`") from None
    for mark, name in (("\0", "a NUL"), ("\N{REPLACEMENT CHARACTER}", "U+FFFD, which stands for a lost character,")):
        if mark in text:
            where = f"{path}, line {text[: text.index(mark)].count(chr(10)) + 1}"
            cure = f"mend it, or name the file's own `{group}.encoding`, e.g. utf-16"
            raise ValueError(f"{where}: {name} is no text; {cure}")
    return text


def _shown(mark: str) -> str:
    return "\\t" if mark == "\t" else mark

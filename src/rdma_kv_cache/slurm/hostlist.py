# SPDX-License-Identifier: Apache-2.0
"""Slurm's host lists (`p[0-2,5],d1`), also where no scontrol is there to expand them."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_NAMES = 1 << 16
"""Slurm's own limit; a slip of the pen must not fill the memory."""

_PIECE = re.compile(r"\[(?P<ranges>[^\[\]]*)\]|(?P<plain>[^\[\],\s]+)")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_NUMBERED = re.compile(r"(.*?)([0-9]+)", re.DOTALL)
_NAME = re.compile(r"[^\[\],\s]+")


def expand(text: str) -> list[str]:
    """Return the names that `text` stands for, in its order; zeros in front are kept.

    A name may hold several brackets: `r[0-1]n[08-10]` are six. Raises ValueError, naming the spot.
    """
    names: list[str] = []
    position = 0
    while position < len(text):
        choices, position = _one_host(text, position)
        count = 1
        for choice in choices:
            count *= len(choice)
        if len(names) + count > MAX_NAMES:
            raise _wrong(text, position, f"more than {MAX_NAMES} names")
        names += map("".join, product(*choices))
        if position < len(text):
            position += 1  # the comma
            if position == len(text):
                raise _wrong(text, position, "a name is missing after the comma")
    return names


def compress(names: Iterable[str]) -> str:
    """Return a host list that `expand` turns into `names` again, in the same order.

    Neighbours with one prefix share a bracket. Raises ValueError for what is no host name.
    """
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no host name")
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None:
            groups.append((name, []))
            continue
        prefix, number = numbered.groups()
        if not groups or groups[-1][0] != prefix or not groups[-1][1]:
            groups.append((prefix, [(number, number)]))
            continue
        ranges = groups[-1][1]
        first, last = ranges[-1]
        if number == str(int(last) + 1).zfill(len(first)):
            ranges[-1] = (first, number)
        else:
            ranges.append((number, number))
    return ",".join(prefix + _bracket(ranges) for prefix, ranges in groups)


def _bracket(ranges: list[tuple[str, str]]) -> str:
    texts = [first if first == last else f"{first}-{last}" for first, last in ranges]
    if not texts:
        return ""
    is_plain = len(texts) == 1 and "-" not in texts[0]
    return texts[0] if is_plain else f"[{','.join(texts)}]"


def _one_host(text: str, position: int) -> tuple[list[list[str]], int]:
    """Read up to a comma outside brackets: what may stand at each place, and where it ends."""
    choices: list[list[str]] = []
    while position < len(text) and text[position] != ",":
        piece = _PIECE.match(text, position)
        if piece is None:
            raise _wrong(text, position, _why(text, position))
        plain = piece["plain"]
        choices.append([plain] if plain else _numbers(text, position + 1, piece["ranges"]))
        position = piece.end()
    if not choices:
        raise _wrong(text, position, "a name is missing before the comma")
    return choices, position


def _numbers(text: str, position: int, ranges: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _wrong(text, position, f"{part!r} is neither a number nor a range like 0-3")
        first, last = match[1], match[2] or match[1]
        count = int(last) - int(first) + 1
        if count < 1:
            raise _wrong(text, position, f"the range {part} runs backwards")
        if len(numbers) + count > MAX_NAMES:
            raise _wrong(text, position, f"more than {MAX_NAMES} names")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        position += len(part) + 1
    return numbers


def _why(text: str, position: int) -> str:
    if text[position].isspace():
        return "a blank"
    if text[position] == "]":
        return "] without ["
    inner = text[position + 1 :]
    return "a bracket within a bracket" if "[" in inner.partition("]")[0] else "[ without ]"


def _wrong(text: str, position: int, what: str) -> ValueError:
    return ValueError(f"host list {text!r}, character {position + 1}: {what}")

# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a job, in words that name the place and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MISSING: Any = object()
_MAX_VALUE_CHARS = 80


@dataclass(frozen=True)
class Problem:
    """One wrong value: where it came from, its dotted key, what is wrong and what to do."""

    source: str
    key: str
    message: str
    remedy: str
    value: Any = MISSING

    def __str__(self) -> str:
        shown = "" if self.value is MISSING else f" = {_short(self.value)}"
        place = f"{self.source}: {self.key}{shown}" if self.key else self.source
        return f"{place}: {self.message}. {self.remedy}."


class JobError(ValueError):
    """The job cannot be used; `problems` holds everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 3] + "..."

# SPDX-License-Identifier: Apache-2.0
"""Which engine a request goes to. Pure functions of the engines' loads and a turn counter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Policy = Callable[[Sequence[int], int], int]
"""(requests in flight of each candidate, turn counter) -> index of the chosen candidate."""


def round_robin(loads: Sequence[int], turn: int) -> int:
    """Take the candidates one after the other."""
    return turn % len(loads)


def least_loaded(loads: Sequence[int], turn: int) -> int:
    """Take the candidate with the fewest requests in flight; ties go round."""
    lowest = min(loads)
    idle = [index for index, load in enumerate(loads) if load == lowest]
    return idle[turn % len(idle)]


POLICIES: Mapping[str, Policy] = {"round_robin": round_robin, "least_loaded": least_loaded}

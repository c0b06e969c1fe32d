# SPDX-License-Identifier: Apache-2.0
"""What came out of a run."""

from __future__ import annotations

from dataclasses import dataclass

TIMED_OUT = 124  # as timeout(1)
DIED = 125


@dataclass(frozen=True)
class GuestRun:
    """Exit codes and outputs by node."""

    rc: tuple[int, ...]  # of the command; 124: timed out, 125: the guest died
    output: tuple[str, ...]
    console: tuple[str, ...]  # the end of what the kernel and boot.sh said
    ready_s: tuple[float | None, ...]  # from the guest's start until it had its rails
    killed: frozenset[int]  # on purpose
    wall_s: float

    @property
    def exit_code(self) -> int:
        """The first failure, else 0. That a node died counts unless another has killed it."""
        expected = self.killed if len(self.killed) < len(self.rc) else ()
        failures = (rc for node, rc in enumerate(self.rc) if rc != DIED or node not in expected)
        return next((rc for rc in failures if rc), 0)

    def check(self) -> GuestRun:
        """Itself; raises AssertionError with all that was said if the exit code is not 0."""
        assert self.exit_code == 0, self.report()
        return self

    def report(self) -> str:
        """Exit codes, outputs, and the consoles of the guests that were lost."""
        outputs = (f"--- node {node}\n{text}" for node, text in enumerate(self.output))
        summary = f"exit codes {list(self.rc)} after {self.wall_s:.1f} s"
        return "\n".join([summary, *outputs, *self.lost()])

    def lost(self) -> list[str]:
        """The consoles of the guests that timed out or died unexpectedly."""
        return [
            f"--- console of node {node}\n{self.console[node]}"
            for node, rc in enumerate(self.rc)
            if rc in (TIMED_OUT, DIED) and node not in self.killed
        ]

# SPDX-License-Identifier: Apache-2.0
"""The stage of the faults: a survivor with two peers, one of which something happens to."""

from __future__ import annotations

import itertools
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.engine.node import Node
from tests.verbs.lab import CONNECT_TIMEOUT_S, PEER_TIMEOUT_S, Lab, LabNode, connect
from tests.verbs.traffic import TrafficNode

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.verbs.traffic import Report

#: Beyond peer_timeout_s: what a loaded host and requests through files add.
SLACK_S = 7.0
#: A write that is on its way would land in much less.
SETTLE_S = 1.0
FLOWING = 3  # writes done, and signals received


class Outcome(NamedTuple):
    """What one run of a fault came to."""

    saw: str  # the text that the user is given
    seconds: float  # from the fault until the test had the text
    landed: int = 0  # bytes, after the fence
    problems: tuple[str, ...] = ()


class Stage:
    """The survivor and the bystander in guest 0; victims come and go in the others."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._greetings = itertools.count()
        self.survivor = lab.start(0, TrafficNode)
        self.bystander = lab.start(0, Node)
        self.survivor.call("connect_bystander", self.bystander.call("invite"))
        self.bystander.call("connect", self.survivor.call("invite_bystander"))
        self.survivor.call("next_event", "CONNECTED")
        self.bystander.call("next_event", "CONNECTED")

    def meet(self, guest: int = 1, *, connected: bool = True, **config: Any) -> LabNode:
        """A new victim, connected to the survivor."""
        self.survivor.call("renew")
        victim = self.lab.start(guest, TrafficNode, **config)
        if connected:
            connect(self.survivor, victim)
        return victim

    def watch(self, victim: LabNode, *, survivor: bool = True, other: bool = True) -> None:
        """Lets those write that shall; the other ones just watch."""
        self.survivor.call("begin", survivor)
        victim.call("begin", other)

    def meet_in_traffic(self, guest: int = 1, **writers: bool) -> LabNode:
        """A new victim; returns when writes and signals flow."""
        victim = self.meet(guest)
        self.watch(victim, **writers)
        self.wait_for_flow(victim, **writers)
        return victim

    def wait_for_flow(self, victim: LabNode, *, survivor: bool = True, other: bool = True) -> None:
        """Returns when those who write have some more writes done."""
        for node in [self.survivor] * survivor + [victim] * other:
            wanted = node.call("progress")[0] + FLOWING
            deadline = time.monotonic() + PEER_TIMEOUT_S + SLACK_S
            while node.call("progress")[0] < wanted:
                assert time.monotonic() < deadline, "nothing flows"

    def lose(
        self,
        fault: Callable[[], Any],
        victim: LabNode | None = None,
        revive: Callable[[], Any] | None = None,
    ) -> Outcome:
        """Does it to a victim in traffic, and checks all that must hold afterwards.

        `victim` is given where it lives on, after `revive`.
        """
        start = time.monotonic()
        try:
            fault()
            report = self._report(self.survivor)
            seconds = time.monotonic() - start
        finally:
            if revive is not None:
                revive()
        problems = list(report.wrong)
        if victim is not None:
            problems += self._report(victim).wrong
        time.sleep(SETTLE_S)
        landed = 0
        for node in [self.survivor] if victim is None else [self.survivor, victim]:
            landed += node.call("landed_after_fence")
            problems += [f"late {kind}" for kind in node.call("late_events")]
        problems += self._greet_bystander()
        return Outcome(plain(report.reason), seconds, landed, tuple(problems))

    def fence(self, victim: LabNode) -> Outcome:
        """As lose(), where it is the survivor that closes the peer."""
        outcome = self.lose(lambda: self.survivor.call("fence"), victim)
        return outcome._replace(saw="(the other side) " + plain(self._report(victim).reason))

    def _report(self, node: LabNode) -> Report:
        limit = max(PEER_TIMEOUT_S, CONNECT_TIMEOUT_S) + SLACK_S
        report: Report | None = node.call("report", limit)
        assert report is not None, f"no PEER_LOST within {limit} s"
        return report

    def _greet_bystander(self) -> list[str]:
        greeting = next(self._greetings)
        self.survivor.call("greet_bystander", greeting)
        heard = self.bystander.call("next_event", "IMM").imm
        return [] if heard == greeting else [f"the bystander heard {heard}, not {greeting}"]


def plain(text: str) -> str:
    """The text without what differs from run to run."""
    text = re.sub(r"peer (victim|peer-of-\d+): ", "", text)
    text = re.sub(r"QP \d+", "QP N", text)
    return re.sub(r"0x[0-9a-f]{6,}", "0xADDRESS", text)

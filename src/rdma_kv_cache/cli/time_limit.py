# SPDX-License-Identifier: Apache-2.0
"""What `serve` does from Slurm's warning (SIGUSR1) to the time limit of its job."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from rdma_kv_cache.cli import common

if TYPE_CHECKING:
    from types import FrameType

    from rdma_kv_cache.cluster.launch import Cluster
    from rdma_kv_cache.slurm.chain import Handover

# The drain takes at most half a minute and the engines' end a quarter, before Slurm kills.
RESERVE_S = 50.0
POLL_S = 1.0
LINGER_S = 60.0
"""How long requests are sent on after the service has moved, for clients that know the old URL."""


class TimeLimit:
    """Signal handlers of the main thread; they raise common.Terminated when serving must end.

    `warning_s`: how long before the limit the warning comes, at least. With a `handover` the warning
    makes it call its successor, and a successor that serves makes this job hand over and end.
    """

    def __init__(self, cluster: Cluster, warning_s: float, handover: Handover | None) -> None:
        self._cluster = cluster
        self._warning_s = warning_s
        self._handover = handover
        self._end_at = 0.0
        self._has_handed_over = False

    def watch(self) -> None:
        """Take over SIGUSR1 and SIGALRM."""
        signal.signal(signal.SIGALRM, self._look)
        signal.signal(signal.SIGUSR1, self._warned)

    def _warned(self, _number: int, _frame: FrameType | None) -> None:
        if self._end_at:
            return
        left = max(self._warning_s - RESERVE_S, 0.0)
        self._end_at = time.monotonic() + left
        common.say(f"The job's time limit is near: it serves {left:.0f} s more.")
        if self._handover is not None:
            self._call_successor(self._handover)
        signal.setitimer(signal.ITIMER_REAL, 0.01, POLL_S)

    def _call_successor(self, handover: Handover) -> None:
        from rdma_kv_cache.slurm.chain import release_fallback
        from rdma_kv_cache.slurm.programs import SlurmError

        if handover.fallback is None:
            common.say(f"No successor: the chain has its {handover.link.length} (--chain)")
            return
        try:
            release_fallback(handover.fallback)
        except SlurmError as error:
            common.say(f"The successor {handover.fallback} starts when this job ends: {error}")
            return
        common.say(f"The successor, job {handover.fallback}, may start")

    def _look(self, _number: int, _frame: FrameType | None) -> None:
        if self._handover is not None and not self._has_handed_over:
            self._hand_over(self._handover)
        if time.monotonic() >= self._end_at:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise common.Terminated(0 if self._has_handed_over else common.EXIT_TIME_LIMIT)

    def _hand_over(self, handover: Handover) -> None:
        current = handover.moved_to()
        if current is None:
            return
        self._has_handed_over = True
        self._cluster.run_dir.write_handover(current.url)
        self._end_at = min(self._end_at, time.monotonic() + LINGER_S)
        common.say(f"Job {current.job_id} serves now, at {current.url}")

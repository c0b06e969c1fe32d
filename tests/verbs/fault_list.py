# SPDX-License-Identifier: Apache-2.0
"""The faults: what is done, and what the user must be told."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.verbs.lab import PEER_TIMEOUT_S
from tests.verbs.stage import SLACK_S, Outcome, Stage, plain

if TYPE_CHECKING:
    from collections.abc import Callable

SHORT_CUT_S = 2.0
FILL_S = 0.5
DETECTED_S = PEER_TIMEOUT_S + SLACK_S
#: What is not a matter of silence is told at once.
AT_ONCE_S = SLACK_S


class Fault(NamedTuple):
    """How to do it, and what to expect."""

    run: Callable[[Stage], Outcome]
    says: str  # a regular expression for what the user sees
    within_s: float = AT_ONCE_S


def process_killed(stage: Stage) -> Outcome:
    victim = stage.meet_in_traffic()
    return stage.lose(lambda: victim.signal(signal.SIGKILL))


def process_stopped(stage: Stage) -> Outcome:
    victim = stage.meet_in_traffic()
    outcome = stage.lose(
        lambda: victim.signal(signal.SIGSTOP), victim, lambda: victim.signal(signal.SIGCONT)
    )
    victim.end()
    return outcome


def node_frozen(stage: Stage) -> Outcome:
    victim = stage.meet_in_traffic()
    guests = stage.lab.guests
    outcome = stage.lose(lambda: guests.stop(1), victim, lambda: guests.cont(1))
    victim.end()
    return outcome


def link_cut(stage: Stage) -> Outcome:
    victim = stage.meet_in_traffic()
    guests = stage.lab.guests
    outcome = stage.lose(lambda: guests.link(1, on=False), victim, lambda: guests.link(1, on=True))
    victim.end()
    return outcome


def link_cut_and_healed(stage: Stage) -> Outcome:
    victim = stage.meet_in_traffic()
    stage.lab.guests.link(1, on=False)
    time.sleep(SHORT_CUT_S)
    stage.lab.guests.link(1, on=True)
    start = time.monotonic()
    stage.wait_for_flow(victim)
    seconds = time.monotonic() - start
    outcome = stage.fence(victim)
    victim.end()
    return outcome._replace(saw="nothing: it resumes", seconds=seconds)


def peer_closed(stage: Stage) -> Outcome:
    victim = stage.meet_in_traffic()
    outcome = stage.fence(victim)
    victim.end()
    return outcome


def bad_rkey(stage: Stage) -> Outcome:
    victim = stage.meet()
    victim.call("fence_memory")
    outcome = stage.lose(lambda: stage.watch(victim, other=False), victim)
    victim.end()
    return outcome


def target_deregistered(stage: Stage) -> Outcome:
    victim = stage.meet_in_traffic(other=False)
    outcome = stage.lose(lambda: victim.call("fence_memory"), victim)
    victim.end()
    return outcome


def source_deregistered(stage: Stage) -> Outcome:
    victim = stage.meet_in_traffic(survivor=False)
    guests = stage.lab.guests

    def deregister() -> None:
        guests.link(1, on=False)  # so that writes are surely outstanding
        try:
            time.sleep(FILL_S)
            victim.call("fence_memory")
        finally:
            guests.link(1, on=True)

    outcome = stage.lose(deregister, victim)
    victim.end()
    return outcome


def memlock_too_small(stage: Stage) -> Outcome:
    start = time.monotonic()
    text = stage.lab.ask(1, "start_as_user", 2 << 20, 1 << 20, {})
    return Outcome(plain(text), time.monotonic() - start)


def no_active_port(stage: Stage) -> Outcome:
    stage.lab.ask(1, "shell", "ip link set eth0 down")
    try:
        return refused(stage)
    finally:
        stage.lab.ask(1, "shell", "ip link set eth0 up")


def empty_gid_index(stage: Stage) -> Outcome:
    return refused(stage, gid_index=7)


def refused(stage: Stage, **config: Any) -> Outcome:
    start = time.monotonic()
    try:
        stage.lab.start(1, **config).end()
    except RuntimeError as error:
        return Outcome(plain(str(error)), time.monotonic() - start)
    raise AssertionError("the engine started")


def link_local_gid(stage: Stage) -> Outcome:
    return unconnectable(stage, gid_index=0)


def unreachable_gid(stage: Stage) -> Outcome:
    # rxe takes every IPv4 address for one on the link, so that no missing route stops it.
    neighbour = "10.99.0.1 lladdr 52:54:00:00:00:99 dev eth0"
    stage.lab.ask(0, "shell", f"ip neighbour replace {neighbour} nud permanent")
    stage.lab.ask(1, "shell", "ip address add 10.99.0.1/24 dev eth0; sleep 0.5")
    try:
        return unconnectable(stage, gid_index=2)
    finally:
        stage.lab.ask(0, "shell", f"ip neighbour delete {neighbour}")
        stage.lab.ask(1, "shell", "ip address delete 10.99.0.1/24 dev eth0")


def unconnectable(stage: Stage, **config: Any) -> Outcome:
    victim = stage.meet(connected=False, **config)
    stage.watch(victim, survivor=False, other=False)
    survivor = stage.survivor

    def meet() -> None:
        survivor.call("connect", victim.call("invite"))
        victim.call("connect", survivor.call("invite"))

    outcome = stage.lose(meet, victim)
    victim.end()
    return outcome


def power_cut(stage: Stage, guest: int) -> Outcome:
    """Can be done to a guest once."""
    stage.meet_in_traffic(guest)
    return stage.lose(lambda: stage.lab.guests.kill(guest))


#: Those that leave the guest as it was.
FAULTS = {
    "peer process killed in mid-transfer": Fault(process_killed, "control connection: .*"),
    "peer process stopped (SIGSTOP)": Fault(process_stopped, "no heartbeat", DETECTED_S),
    "peer node frozen (QEMU SIGSTOP)": Fault(node_frozen, "peer_timeout_s", DETECTED_S),
    "link cut": Fault(link_cut, "retry|no heartbeat", DETECTED_S),
    "link cut and healed": Fault(link_cut_and_healed, "resumes", DETECTED_S),
    "close_peer() in mid-transfer": Fault(peer_closed, r"close_peer\(\) was called"),
    "QP error by a bad rkey": Fault(bad_rkey, "remote access error.*rkey"),
    "registration of the target torn down": Fault(target_deregistered, "remote access error"),
    "registration of the source torn down": Fault(source_deregistered, "deregistered while writes"),
    "memlock too small": Fault(memlock_too_small, "limits.conf.*LimitMEMLOCK", DETECTED_S),
    "no ACTIVE port": Fault(no_active_port, "no RDMA port can be used:.*DOWN"),
    "GID index out of the table": Fault(empty_gid_index, "empty GID 7; set gid_index"),
    "link-local GID against an IPv4 one": Fault(link_local_gid, "set devices and gid_index"),
    "GID that packets do not reach": Fault(unreachable_gid, "compare GIDs", DETECTED_S),
}
POWER_CUT = Fault(lambda stage: power_cut(stage, 2), "retry|no heartbeat", DETECTED_S)

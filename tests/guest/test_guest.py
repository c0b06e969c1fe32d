# SPDX-License-Identifier: Apache-2.0
"""Guests boot with working verbs, and what is done to them happens."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.guest import Guests, run_guests, why_not

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.verbs

LIMIT_S = 90.0

DESCRIBE = """
cd /sys/class/infiniband/rxe0/ports/1
cat state gids/1 gid_attrs/types/1 /proc/sys/kernel/hostname
ulimit -l
echo $GUEST_NODE $GUEST_NODES $GUEST_RAILS $GUEST_IP $GUEST_PEER "$NOTE"
exit 7
"""

# The server's port is in a network of the guests' own.
PINGPONG = """
pingpong() { ibv_rc_pingpong -d rxe$rail -g 1 -n 20 -p $((18515 + rail)) $1; }
for rail in 0 1; do
  if [ $GUEST_NODE = 0 ]; then pingpong
  else until pingpong 10.$((77 + rail)).0.1; do sleep 0.2; done
  fi
done
"""

WATCH_CARRIER = """
until [ -e /io/end ]; do cat /sys/class/net/eth0/carrier; sleep 0.2; done
"""

KILL_AND_CRASH = """
[ $GUEST_NODE = 0 ] || sleep 60
echo kill 1 >> /io/ctl
sleep 1
echo c > /proc/sysrq-trigger
"""


@pytest.fixture(params=["qemu", "uml"])
def uml(request: pytest.FixtureRequest) -> bool:
    """Whether the guests are User-Mode Linux; skips what cannot start here."""
    chosen: bool = request.param == "uml"
    if reason := why_not(uml=chosen):
        pytest.skip(reason)
    return chosen


@pytest.fixture
def qemu() -> None:
    """Skips if QEMU guests cannot start here."""
    if reason := why_not():
        pytest.skip(reason)


def until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_guest_has_an_active_port_and_returns_the_exit_code(uml: bool) -> None:
    run = run_guests(DESCRIBE, uml=uml, env={"NOTE": "it's 5 $"}, timeout_s=LIMIT_S)

    assert run.rc == (7,), run.report()
    assert run.exit_code == 7
    assert run.output[0].splitlines() == [
        "4: ACTIVE",
        "0000:0000:0000:0000:0000:ffff:0a4d:0001",
        "RoCE v2",
        "guest0",
        "unlimited",
        "0 1 1 10.77.0.1 10.77.0.1 it's 5 $",
    ]
    with pytest.raises(AssertionError, match="exit codes \\[7\\]"):
        run.check()


def test_two_nodes_talk_over_two_rails(uml: bool) -> None:
    run = run_guests(PINGPONG, nodes=2, rails=2, uml=uml, timeout_s=LIMIT_S).check()

    for output in run.output:
        assert output.count("20 iters in") == 2
        for rail in (0, 1):
            for node in (0, 1):
                assert f"GID ::ffff:10.{77 + rail}.0.{node + 1}\n" in output


def test_a_killed_and_a_crashed_guest_have_died(uml: bool) -> None:
    run = run_guests(KILL_AND_CRASH, nodes=2, uml=uml, timeout_s=LIMIT_S)

    assert run.rc == (125, 125), run.report()
    assert run.killed == {1}
    assert run.exit_code == 125
    assert "sysrq: Trigger a crash" in run.console[0]
    assert "console of node 0" in run.report()
    assert "console of node 1" not in run.report()


@pytest.mark.usefixtures("qemu")
def test_host_cuts_a_link_and_stops_and_kills_a_node() -> None:
    with Guests(WATCH_CARRIER, nodes=2, timeout_s=LIMIT_S) as guests:
        guests.wait_for_output(0, "1\n")
        guests.wait_for_output(1, "1\n")
        guests.link(0, on=False)
        guests.wait_for_output(0, "0\n")
        guests.link(0, on=True)
        guests.wait_for_output(0, "0\n1\n")

        guests.stop(1)
        time.sleep(0.5)  # for a write that is under way
        seen = guests.read_output(1)
        time.sleep(1)
        assert guests.read_output(1) == seen
        guests.cont(1)
        until(lambda: guests.read_output(1) != seen, "node 1 does not go on")

        guests.kill(1)
        (guests.folder.path / "end").touch()
        run = guests.wait().check()
    assert run.rc == (0, 125)
    assert "0" not in run.output[1]


def test_the_time_limit_ends_a_guest(uml: bool) -> None:
    run = run_guests("sleep 60", uml=uml, timeout_s=1)

    assert run.rc == (124,)
    assert run.wall_s < 10


def test_guests_die_with_their_parent(uml: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lane = ["--uml"] if uml else []
    # User-Mode Linux has to be up: one of its helper processes is what would stay.
    sign = folder / ("node0.ready" if uml else "node0.console")
    argv = [sys.executable, "-m", "tests.guest", *lane, "-d", str(folder), "--", "sleep 60"]
    with subprocess.Popen(argv) as parent:
        until(sign.exists, "the guest does not start", LIMIT_S)
        assert processes_with(folder)
        parent.kill()
    until(lambda: not processes_with(folder), "guests outlive their parent")


def processes_with(path: Path) -> list[str]:
    """The command lines that name the path."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_text()
        except OSError:  # has ended meanwhile
            continue
        if str(path) in line:
            found.append(line)
    return found

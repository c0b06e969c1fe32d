# SPDX-License-Identifier: Apache-2.0
"""Runs a command in each of some throw-away guests that have real kernel verbs.

Every guest has RoCE devices rxe<rail> on eth<rail>, GID index 1 = ::ffff:10.<77+rail>.0.<node+1>.
Its root is this host's own, read-only, under an overlay in memory: virtual environments, build
trees and rdma-core are just there. The folder /io is shared by the guests and the host.
The command sees GUEST_NODE, GUEST_NODES, GUEST_RAILS, GUEST_IP and GUEST_PEER (the next node).
"""

from __future__ import annotations

import argparse
import logging
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.guest.host import GuestUnavailableError
from tests.guest.run import POLL_S, Guests

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from tests.guest.result import GuestRun

EXAMPLES = """\
examples:
  python -m tests.guest -- ibv_devinfo -v
  python -m tests.guest -v -- 'ctest --test-dir build/native-none -L verbs'
  python -m tests.guest -n 2 -- bash -c 'echo $GUEST_NODE talks to $GUEST_PEER'
  python -m tests.guest -n 2 -r 2 -t 600 -- bash two_nodes.sh
  in a guest: echo kill 1 >> /io/ctl      also: stop 1, cont 1, link 1 off, link 1 on, link 1 off RAIL

exit status: the command's, the first over the nodes that is not 0; 124: timed out; 125: a guest
died that was not killed by another; 2: no guest can start here.
"""


class Printer:
    """Copies the guests' output to stdout in whole lines, with the node before each if several."""

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        self._files = files
        self._rest = [b""] * len(files)

    def copy(self, *, last: bool = False) -> None:
        """Copies what is new; also a line without an end if it is the last time."""
        for node, file in enumerate(self._files):
            *lines, rest = (self._rest[node] + file.read()).split(b"\n")
            if last and rest:
                lines.append(rest)
            self._rest[node] = rest
            prefix = b"[%d] " % node if len(self._files) > 1 else b""
            sys.stdout.buffer.writelines(prefix + line + b"\n" for line in lines)
        sys.stdout.buffer.flush()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.guest",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-n", dest="nodes", type=int, default=1, help="guests (1)")
    add("-r", dest="rails", type=int, default=1, help="RoCE devices a guest (1)")
    add(
        "-m", dest="memory_mib", type=int, default=1024, metavar="MIB", help="memory a guest (1024)"
    )
    add("-s", dest="smp", type=int, help="CPUs a guest (2 for a single guest, else 1)")
    add("-t", dest="timeout_s", type=float, default=300.0, metavar="SECONDS", help="limit (300)")
    add("-d", dest="folder", type=Path, help="keep the run's files, /io in the guests, here")
    add("--uml", action="store_true", help="User-Mode Linux guests: see build_uml.sh")
    add("-v", dest="verbose", action="store_true", help="say what is done to guests, and figures")
    add("command", nargs="+", metavar="CMD", help="arguments, or one string for the shell")
    return parser


def run(options: argparse.Namespace) -> GuestRun:
    """Runs the command and shows its output."""
    command = options.command[0] if len(options.command) == 1 else options.command
    names = ("nodes", "rails", "memory_mib", "smp", "timeout_s", "folder", "uml")
    with Guests(command, **{name: getattr(options, name) for name in names}) as guests:
        files = [guests.folder.output(node).open("rb") for node in range(options.nodes)]
        printer = Printer(files)
        while guests.running():
            printer.copy()
            time.sleep(POLL_S)
        printer.copy(last=True)
        return guests.wait()


def main() -> int:
    """Returns the exit status."""
    options = parser().parse_args()
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, format="guest: %(message)s")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        result = run(options)
    except (GuestUnavailableError, OSError, ValueError) as error:
        print(f"guest: {error}", file=sys.stderr)
        return 2
    for console in result.lost():
        print(console, file=sys.stderr)
    if options.verbose:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"guest: exit codes {list(result.rc)}, rails after {list(result.ready_s)} s, "
            f"{result.wall_s:.1f} s wall, {used.ru_utime + used.ru_stime:.1f} s CPU",
            file=sys.stderr,
        )
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Runs a command on the controller of a throw-away Slurm of several nodes, on this one machine.

Every node, the controller `ctl` included, has a hostname, an address (10.77.0.x), processes, /tmp,
/root and /dev/shm of its own; all other files are this machine's, and so shared. Nodes p* have the
feature prefill, all others decode; each has 4 CPUs and 4 GPUs that are character devices without
a driver. The command sees SLURM_CONF, and SLURM_LAB, the lab's folder.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.slurm.host import LabUnavailableError
from tests.slurm.lab import NODES, Lab, LabError, feature_of

if TYPE_CHECKING:
    from typing import TextIO

POLL_S = 0.1

EXAMPLES = """\
examples:
  python -m tests.slurm -- sinfo -N -l
  python -m tests.slurm -n p0,d0,d1 -- srun -N3 hostname
  python -m tests.slurm --accounting --set MinJobAge=10 -- bash
  on the controller: echo crash d1 >> $SLURM_LAB/orders    also: boot d1, cut d1, heal d1,
  stop_slurmd d1, start_slurmd d1

exit status: the command's; 2: no Slurm can start here, or it did not start.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-n", dest="nodes", default=",".join(NODES), help=f"names of the nodes ({','.join(NODES)})")
    add("--accounting", action="store_true", help="with MariaDB and slurmdbd, for sacct")
    add(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a line of slurm.conf, in place of the lab's own of that key",
    )
    add("command", nargs="+", metavar="CMD", help="arguments of the command")
    return parser


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    nodes = {name: feature_of(name) for name in options.nodes.split(",")}
    settings = dict(setting.split("=", 1) for setting in options.settings)
    with Lab(nodes, accounting=options.accounting, settings=settings) as lab:
        control_file = lab.folder / "orders"
        control_file.touch()
        with control_file.open() as orders, lab.popen(*options.command) as process:
            try:
                return wait(process, lab, orders)
            finally:
                process.kill()


def wait(process: subprocess.Popen[str], lab: Lab, orders: TextIO) -> int:
    """Obeys the control file until the command ends."""
    line = ""
    while True:
        while part := orders.readline():
            line += part
            if line.endswith("\n"):
                lab.obey(line)
                line = ""
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            continue


def main() -> int:
    """Returns the exit status."""
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return run(options)
    except (LabUnavailableError, LabError, OSError, ValueError) as error:
        print(f"slurm lab: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

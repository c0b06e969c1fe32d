# SPDX-License-Identifier: Apache-2.0
"""Accounting for a lab: MariaDB behind a Unix socket and slurmdbd, on the controller."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from tests.slurm import conf
from tests.slurm.machine import LabError, poll

if TYPE_CHECKING:
    from pathlib import Path

    from tests.slurm.lab import Lab

START_TIMEOUT_S = 60.0


def start_accounting(lab: Lab) -> None:
    """Returns when slurmdbd answers; slurmctld makes itself known to it. Raises LabError."""
    own = lab.folder / conf.CONTROLLER
    socket = own / "mysql.sock"
    _start_database(lab, own, socket)
    slurmdbd_conf = lab.folder / "etc" / "slurmdbd.conf"
    slurmdbd_conf.touch(mode=0o600)  # slurmdbd takes no other
    slurmdbd_conf.write_text(conf.slurmdbd_conf(lab.folder))
    lab.check("slurmdbd", env={"MYSQL_UNIX_PORT": str(socket)})
    ask = ("sacctmgr", "--noheader", "show", "cluster")
    if not poll(lambda: lab.run(*ask).returncode == 0, START_TIMEOUT_S):
        said = lab.run(*ask).stderr
        raise LabError(f"slurmdbd does not answer: {said}{_tail(own / 'slurmdbd.log')}")


def _start_database(lab: Lab, own: Path, socket: Path) -> None:
    common = ["--no-defaults", "--user=root", f"--datadir={own / 'mysql'}"]
    lab.check(
        "mariadb-install-db",
        *common,
        "--auth-root-authentication-method=socket",
        "--skip-test-db",
    )
    log = own / "mysql.log"
    with log.open("w") as output:
        process = lab.popen(
            "mariadbd",
            *common,
            f"--socket={socket}",
            "--skip-networking",
            "--innodb-buffer-pool-size=32M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",  # slurmdbd asks for that much
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    poll(lambda: socket.exists() or process.poll() is not None, START_TIMEOUT_S)
    if process.poll() is not None or not socket.exists():
        raise LabError(f"mariadbd does not start: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:] if log.exists() else "no log"

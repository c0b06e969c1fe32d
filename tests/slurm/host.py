# SPDX-License-Identifier: Apache-2.0
"""What a lab needs of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache

# Slurm's daemons live in sbin, which is not on every user's PATH.
SEARCH_PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)

PACKAGE_OF = {
    "ip": "iproute2",
    "munged": "munge",
    "nsenter": "util-linux",
    "sbatch": "slurm-client",
    "setpriv": "util-linux",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "unshare": "util-linux",
}
ACCOUNTING_PACKAGE_OF = {
    "mariadb-install-db": "mariadb-server-core",
    "mariadbd": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",
    "slurmdbd": "slurmdbd slurm-wlm-mysql-plugin",
}

# Those of a node, plus a character device, which a fake GPU is.
TRY_NAMESPACES = "mount -t tmpfs lab /mnt && mknod /mnt/gpu c 240 0 && ip link add lab0 type bridge"


class LabUnavailableError(RuntimeError):
    """No lab can start on this machine; the text says why and what to do."""


@lru_cache
def why_not(*, accounting: bool = False) -> str | None:
    """Why no lab can start on this machine, for a skip; None if it can."""
    try:
        check(accounting=accounting)
    except LabUnavailableError as error:
        return str(error)
    return None


def check(*, accounting: bool = False) -> None:
    """Raises LabUnavailableError if no lab can start on this machine."""
    if os.geteuid() != 0:
        raise LabUnavailableError("a Slurm lab needs root, for namespaces and mounts")
    wanted = PACKAGE_OF | (ACCOUNTING_PACKAGE_OF if accounting else {})
    missing = [name for name in wanted if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        packages = " ".join(dict.fromkeys(wanted[name] for name in missing))
        raise LabUnavailableError(f"no {', '.join(missing)} (apt-get install {packages})")
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "sh", "-c", TRY_NAMESPACES],
        env={**os.environ, "PATH": SEARCH_PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode != 0:
        said = tried.stderr.strip() or f"exit code {tried.returncode}"
        raise LabUnavailableError(f"no namespaces with devices and bridges here: {said}")


NAMESPACES = ("--net", "--uts", "--mount", "--pid", "--ipc", "--fork")

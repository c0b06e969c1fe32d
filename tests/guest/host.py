# SPDX-License-Identifier: Apache-2.0
"""What the guests need of the host."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

# An unprivileged user's PATH has no sbin on Debian, where `ip` and `rdma` may live.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

PACKAGE_OF = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "bash": "bash",
    "busybox": "busybox-static",
    "dpkg": "dpkg",
    "ip": "iproute2",
    "qemu-system-x86_64": "qemu-system-x86",
    "rdma": "iproute2",
    "setpriv": "util-linux",
    "taskset": "util-linux",
    "unshare": "util-linux",
    "zstd": "zstd",
}


class GuestUnavailableError(RuntimeError):
    """This host cannot start a guest; the text says why and what to do."""


def cache_folder() -> Path:
    """Where kernels are kept: GUEST_CACHE, else the user's cache."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GUEST_CACHE") or Path(user_cache) / "rdma-kv-cache" / "guest")


def command(name: str) -> str:
    """The path of a program, which must be installed."""
    path = shutil.which(name, path=SEARCH_PATH)
    if path is None:
        raise GuestUnavailableError(f"no {name} (apt-get install {PACKAGE_OF[name]})")
    return path


def require(*names: str) -> None:
    """Raises GuestUnavailableError for the first program that is not installed."""
    for name in names:
        command(name)


def require_x86_64() -> None:
    """Raises GuestUnavailableError on any other machine: the guest runs the host's programs."""
    system = os.uname()
    if (system.sysname, system.machine) != ("Linux", "x86_64"):
        raise GuestUnavailableError(f"guests need Linux on x86_64, not {system.machine}")


def tsc_khz() -> int:
    """The rate of the time stamp counter, from the bogomips: twice the MHz on x86."""
    match = re.search(r"^bogomips\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if match is None:
        raise GuestUnavailableError("/proc/cpuinfo has no bogomips line")
    return int(float(match[1]) * 500)

# SPDX-License-Identifier: Apache-2.0
"""Guests as User-Mode Linux kernels, built by build_uml.sh: processes run at the host's speed.

One CPU a guest, two guests at most, no `link`. AddressSanitizer and ThreadSanitizer do not start:
its processes have 39 bits of address space.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.guest import host
from tests.guest.lane import Lane
from tests.guest.machine import MTU, Spec, mac

if TYPE_CHECKING:
    from collections.abc import Sequence

INIT = Path(__file__).with_name("uml_init.sh")
SHM = Path("/dev/shm")

# The kernel's helper processes outlive it, unless a PID namespace ends with it. The shell is there
# because a panic aborts, which the first process of a namespace does not die of.
WRAPPER = ("--pid", "--fork", "--kill-child", "sh", "-c", 'ulimit -c 0; "$@"; exit', "sh")

# A cable holds the frames of some whole WRs; the kernel's default of 208 KiB does not.
CABLE_BYTES = 4 << 20


def kernel_path() -> Path:
    """Where build_uml.sh leaves the kernel."""
    return host.cache_folder() / "uml" / "linux"


class UmlLane(Lane):
    """One User-Mode Linux a node, two of them joined by a socket pair a rail."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.check()
        if spec.nodes > 2 or spec.smp > 1:
            raise ValueError("User-Mode Linux: one or two guests, with one CPU each")
        if set(str(folder)) & set(", \t"):
            raise ValueError(f"User-Mode Linux: no comma or space may be in the folder {folder}")
        super().__init__(spec, folder)
        # Both ends stay open here: with its peer's end closed the vector driver gets
        # ECONNREFUSED and stops for good, so a killed node has to look like a silent one.
        self._cables = [_cable() for _ in range(spec.rails if spec.nodes == 2 else 0)]

    @staticmethod
    def check() -> None:
        host.require_x86_64()
        host.require("setpriv", "taskset", "unshare", "bash", "ip", "rdma")
        if os.geteuid() != 0:
            raise host.GuestUnavailableError("not root, which a PID namespace needs")
        if not os.access(kernel_path(), os.X_OK):
            raise host.GuestUnavailableError(
                f"no User-Mode Linux kernel {kernel_path()} (tests/guest/build_uml.sh builds it)"
            )

    def start(self) -> None:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        (self.folder / "cpuinfo").write_text(first_cpu(cpuinfo, host.tsc_khz()))
        env = {**os.environ, "TMPDIR": str(_memory_folder(self.spec))}
        for node in range(self.spec.nodes):
            fds = [cable[node].fileno() for cable in self._cables]
            argv = [host.command("taskset"), "-c", str(_cpu(node))]
            argv += [host.command("unshare"), *WRAPPER, str(kernel_path())]
            argv += uml_arguments(self.spec, self.folder, node, fds)
            self.processes.append(self._spawn(f"node{node}", argv, fds, env))

    def set_link(self, node: int, rail: int, *, on: bool) -> None:
        """User-Mode Linux has no monitor that could do it."""
        raise ValueError("link: not with User-Mode Linux guests")

    def close(self) -> None:
        super().close()
        for cable in self._cables:
            for end in cable:
                end.close()


def uml_arguments(spec: Spec, folder: Path, node: int, cable_fds: Sequence[int]) -> list[str]:
    """Arguments of node's kernel, which inherits one socket a rail for its frames."""
    cables = [
        f"vec{rail}:transport=fd,fd={fd},mac={mac(node, rail)},mtu={MTU}"
        for rail, fd in enumerate(cable_fds)
    ]
    return [
        f"mem={spec.memory_mib}M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro",
        f"uml_dir={folder}/", "con=null", "con0=null,fd:1", "quiet", "panic=-1", *cables,
        f"GUEST_NODE={node}", f"GUEST_IO={folder}", "init=/bin/bash", "--", str(INIT),
    ]  # fmt: skip


def _cable() -> tuple[socket.socket, socket.socket]:
    cable = socket.socketpair(type=socket.SOCK_DGRAM)
    for end in cable:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CABLE_BYTES)
    return cable


def first_cpu(text: str, tsc_khz: int) -> str:
    """The host's first CPU, at the rate of the time stamp counter."""
    first = re.sub(r"^cpu MHz.*\n", "", text.split("\n\n")[0] + "\n", flags=re.MULTILINE)
    return f"{first}cpu MHz\t\t: {tsc_khz / 1000:.3f}\n\n"


def _cpu(node: int) -> int:
    """The host's CPU of a node. A switch to a process on another CPU is an interrupt to it: a
    guest that may use both does 65 to 118 us a system call, on one it does 37 to 56.
    """
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[(node + 1) % len(allowed)]


def _memory_folder(spec: Spec) -> Path:
    """Where the guests' memory files go: /dev/shm, if it is not as small as in most containers."""
    needed = spec.nodes * spec.memory_mib << 20
    fits = SHM.is_dir() and shutil.disk_usage(SHM).free > needed
    return SHM if fits else Path(tempfile.gettempdir())

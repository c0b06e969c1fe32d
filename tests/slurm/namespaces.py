# SPDX-License-Identifier: Apache-2.0
"""How a process gets into namespaces."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.slurm.host import NAMESPACES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLONE_NEWNET = 0x40000000


def new_in(keeper: int) -> list[str]:
    """Before a command: new namespaces for it, which end with the process `keeper`."""
    return ["nsenter", "--target", str(keeper), "--pid", "unshare", *NAMESPACES]


def enter(pid: int, folder: Path) -> list[str]:
    """Before a command: on the machine whose process 1 is `pid`, in a folder.

    The command dies with the process that this starts. Without --root a chroot would be left.
    """
    return [
        *("nsenter", "--target", str(pid), "--net", "--uts", "--mount", "--pid", "--ipc", "--root"),
        *("setpriv", "--pdeathsig", "KILL", "env", f"--chdir={folder}"),
    ]


def enter_network(pid: int) -> list[str]:
    """Before a command: in the network of the machine only."""
    return ["nsenter", "--target", str(pid), "--net"]


@contextmanager
def network_of(pid: int) -> Iterator[None]:
    """This thread is in the network of the process meanwhile, and so are sockets it makes."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        try:
            _set_network(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _set_network(home)
    finally:
        os.close(home)


def _set_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")

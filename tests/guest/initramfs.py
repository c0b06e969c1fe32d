# SPDX-License-Identifier: Apache-2.0
"""The initramfs: busybox, the modules and init.sh, as an uncompressed cpio archive."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from tests.guest.host import GuestUnavailableError, command

if TYPE_CHECKING:
    from collections.abc import Iterable

INIT = Path(__file__).with_name("init.sh")

DIRECTORIES = ("bin", "modules")


def build(modules: Iterable[Path]) -> bytes:
    """The archive; init.sh loads the modules in the given order."""
    files = [*modules]
    order = "".join(f"{file.name}\n" for file in files)
    return archive(
        [
            *((name, stat.S_IFDIR | 0o755, b"") for name in DIRECTORIES),
            ("init", stat.S_IFREG | 0o755, INIT.read_bytes()),
            ("bin/busybox", stat.S_IFREG | 0o755, busybox()),
            ("modules/order", stat.S_IFREG | 0o644, order.encode()),
            *((f"modules/{file.name}", stat.S_IFREG | 0o644, file.read_bytes()) for file in files),
        ]
    )


def busybox() -> bytes:
    """The host's busybox, which has to be static: the initramfs has no libraries."""
    data = Path(command("busybox")).read_bytes()
    if b"/ld-linux" in data:
        raise GuestUnavailableError("busybox is not static (apt-get install busybox-static)")
    return data


def archive(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive of (name, mode, contents); Documentation/driver-api/early-userspace."""
    return b"".join(
        _entry(number, *entry)
        for number, entry in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1)
    )


def _entry(inode: int, name: str, mode: int, data: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, dev and rdev (4 numbers), namesize, check
    numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)

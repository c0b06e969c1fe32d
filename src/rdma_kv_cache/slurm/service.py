# SPDX-License-Identifier: Apache-2.0
"""A service that outlives its jobs: where it answers now, and the one key of all its jobs.

RUNS/NAME.service/current.json    which job serves, replaced by each successor when it is READY
                 /api.key         the key, made by the first job
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from rdma_kv_cache.config.replace_file import replace_file

if TYPE_CHECKING:
    from pathlib import Path

CURRENT_FILE = "current.json"
KEY_FILE = "api.key"
KEY_BYTES = 32


class Current(msgspec.Struct, frozen=True):
    """The job that serves."""

    job_id: int
    url: str
    run_dir: str
    generation: int = 0
    """How many jobs served before it."""


@dataclass(frozen=True)
class Service:
    """The folder of a service; `open_service` makes it."""

    folder: Path

    def key(self) -> str:
        """Return the service's API key, which the first caller makes. Raises OSError."""
        path = self.folder / KEY_FILE
        temporary = self.folder / f".{KEY_FILE}.{secrets.token_hex(4)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(f"rkv-{secrets.token_urlsafe(KEY_BYTES)}\n")
            # A link, not a rename: of two first callers one must lose.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        return path.read_text().strip()

    def current(self) -> Current | None:
        """Return the job that serves; None before the first one does."""
        try:
            return msgspec.json.decode((self.folder / CURRENT_FILE).read_bytes(), type=Current)
        except (OSError, msgspec.DecodeError):
            return None

    def publish(self, current: Current) -> None:
        """Move the service to another job; a reader sees the old or the new one. Raises OSError."""
        data = msgspec.json.format(msgspec.json.encode(current)) + b"\n"
        replace_file(self.folder / CURRENT_FILE, data)


def open_service(runs: Path, name: str) -> Service:
    """Return the service `name`, its folder made if need be. Raises OSError."""
    folder = runs / f"{name}.service"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Service(folder)

# SPDX-License-Identifier: Apache-2.0
"""Writes a file so that a reader, on whatever node, sees the old or the new one, never a half."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`. Raises OSError, and leaves nothing behind then."""
    # A fixed temporary name would let two writers mix their bytes.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

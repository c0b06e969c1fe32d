# SPDX-License-Identifier: Apache-2.0
"""How the host asks the agents in the guests: numbered files in the folder that all share."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

POLL_S = 0.03


def request_path(folder: Path, node: int, number: int) -> Path:
    """Of the `number`th request to a node."""
    return folder / f"{node}.{number}.request"


def answer_path(folder: Path, node: int, number: int) -> Path:
    """Of the answer to it."""
    return folder / f"{node}.{number}.answer"


def publish(path: Path, content: Any) -> None:
    """Writes a file that appears whole or not at all."""
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(pickle.dumps(content))
    unfinished.replace(path)


def collect(path: Path) -> Any:
    """Reads a published file, which is then gone."""
    content = pickle.loads(path.read_bytes())
    path.unlink()
    return content

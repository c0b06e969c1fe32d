# SPDX-License-Identifier: Apache-2.0
"""Prompt files, and the command as a user runs it."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from rdma_kv_cache.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def request_line(name: str, **changes: Any) -> dict[str, Any]:
    """A valid line whose custom_id and prompt are `name`."""
    line = {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": name, "max_tokens": 4},
    }
    return {**line, **changes}


@dataclass
class Batch:
    """A prompt file in a folder of its own, and its output."""

    folder: Path
    prompts: Path = field(init=False)
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = self.folder / "prompts.jsonl"
        self.out = self.folder / "answers.jsonl"
        self.progress = self.folder / "answers.jsonl.progress.jsonl"

    def write(self, *lines: dict[str, Any] | str | bytes) -> None:
        """Write the prompt file; what is not a dict is written as it is."""
        data = b"".join(_encode(line) + b"\n" for line in lines)
        self.prompts.write_bytes(gzip.compress(data) if self.prompts.suffix == ".gz" else data)

    def command(self, url: str, *options: str) -> list[str]:
        """The command line."""
        return ["batch", str(self.prompts), "-o", str(self.out), "--url", url, *options]

    def run(self, url: str, *options: str) -> Result:
        """Run the command in this process."""
        return CliRunner().invoke(main, self.command(url, *options))

    def answers(self) -> list[dict[str, Any]]:
        """The lines of the output file."""
        return [json.loads(line) for line in self.out.read_text().splitlines()]


def _encode(line: dict[str, Any] | str | bytes) -> bytes:
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()

# SPDX-License-Identifier: Apache-2.0
"""Every file of a run, and the state that the orchestrator keeps there for its launcher."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import msgspec

from rdma_kv_cache.config.replace_file import replace_file

JobState = Literal["STARTING", "READY", "DRAINING", "FAILED", "DONE"]


class EngineStatus(msgspec.Struct, frozen=True):
    """One engine in `state.json`; `pid` is the vLLM server's, 0 while there is none."""

    name: str
    role: str
    url: str = ""
    state: str = "STARTING"
    incarnation: int = 0
    restarts: int = 0
    pid: int = 0


class RunState(msgspec.Struct, frozen=True):
    """`state.json`: what rank 0 (`pid` on `host`) says of the run."""

    state: JobState
    stage: str = ""
    reason: str = ""
    url: str = ""
    api_key_file: str = ""
    pid: int = 0
    host: str = ""
    engines: list[EngineStatus] = []


class RunDir:
    """The run folder. Paths are absolute, so that ranks with another working folder agree."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.state_file = self.path / "state.json"
        self.api_key_file = self.path / "api.key"
        self.events_file = self.path / "events.jsonl"
        self.handover_file = self.path / "handover.url"
        self.batch_file = self.path / "batch.json"
        """How far the run's batch is."""
        self.logs = self.path / "logs"
        self.launcher_log = self.logs / "launcher.log"
        """What the ranks and their launcher say."""

    def create(self) -> None:
        """Make the folder (0700 if it is new: it holds the API key) and its `logs`.

        What an earlier run left of that kind is removed: it would be taken for this run's.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.state_file.unlink(missing_ok=True)
        self.api_key_file.unlink(missing_ok=True)
        self.handover_file.unlink(missing_ok=True)
        self.batch_file.unlink(missing_ok=True)

    def engine_log(self, engine: str) -> Path:
        """Return where the vLLM of `engine` writes."""
        return self.logs / f"{engine}.log"

    def write_api_key(self, key: str) -> Path:
        """Write the API key, readable by the owner alone."""
        replace_file(self.api_key_file, key.encode() + b"\n", 0o600)
        return self.api_key_file

    def read_api_key(self) -> str | None:
        """Return the API key; None if the run has none."""
        try:
            return self.api_key_file.read_text().strip()
        except FileNotFoundError:
            return None

    def write_handover(self, url: str) -> None:
        """Tell the run's orchestrator to send new requests on to `url`."""
        replace_file(self.handover_file, url.encode() + b"\n", 0o600)

    def read_handover(self) -> str:
        """Return where new requests go; "" while this run serves them itself."""
        try:
            return self.handover_file.read_text().strip()
        except OSError:
            return ""

    def write_state(self, state: RunState) -> None:
        """Replace `state.json`; a reader sees the old or the new one, never a half."""
        replace_file(
            self.state_file, msgspec.json.format(msgspec.json.encode(state)) + b"\n", 0o644
        )

    def append_event(self, **event: object) -> None:
        """Add a line of JSON to `events.jsonl`, with the time (Unix, s)."""
        line = msgspec.json.encode({"time": round(time.time(), 3), **event}) + b"\n"
        # One write, so that a reader never sees half a line.
        descriptor = os.open(self.events_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def read_state(self) -> RunState | None:
        """Return the run's state, None before there is one.

        Raises ValueError (msgspec.ValidationError) if the file is not a state.
        """
        try:
            return msgspec.json.decode(self.state_file.read_bytes(), type=RunState)
        except FileNotFoundError:
            return None

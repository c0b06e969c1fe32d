# SPDX-License-Identifier: Apache-2.0
"""Run folders as jobs leave them, Slurm's programs as scripts on PATH, and a small service."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from rdma_kv_cache.cluster.run_dir import EngineStatus, RunDir, RunState
from rdma_kv_cache.slurm import records

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "rkv-test"
JOB_FILE = "model: {name: test/model}\nprefill: {engines: 2}\n"
ENGINES = [
    EngineStatus("prefill-0", "prefill", "http://p0:1", "READY"),
    EngineStatus("decode-0", "decode", "http://d0:2", "READY"),
]


def submit(
    runs: Path,
    job_id: int,
    *,
    name: str = "serve",
    kind: records.Kind = "serve",
    predecessor: int | None = None,
) -> Path:
    """Leave what `rdma-kv submit` leaves; return the job's folder."""
    folder = records.job_folder(runs, name, job_id)
    record = records.Record(
        job_id=job_id,
        name=name,
        kind=kind,
        folder=str(folder),
        job_file="/jobs/serve.yaml",
        submitted=1_790_000_000.0 + job_id,
        predecessor=predecessor,
    )
    records.write(record)
    return folder


def start(folder: Path, state: RunState | None = None, attempt: int = 0) -> RunDir:
    """Leave what the batch script and rank 0 leave; return the run folder."""
    run = RunDir(folder / f"attempt-{attempt}")
    run.create()
    (run.path / "job.yaml").write_text(JOB_FILE)
    if state is not None:
        run.write_state(state)
    return run


def ready(url: str = "", host: str = "p0", **changes: Any) -> RunState:
    """The state of a run that serves at `url`."""
    fields = {"state": "READY", "stage": "serving", "url": url, "host": host, "engines": ENGINES}
    return RunState(**{**fields, **changes})


class FakeSlurm:
    """squeue, sacct and scancel on PATH: scripts that print a file and note their arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        folder.mkdir()
        self.set("squeue")
        self.set("scancel")
        self.set("sacct", error="sacct: error: Slurm accounting storage is disabled")

    def set(self, program: str, *lines: str, error: str = "", then: str = "") -> None:
        """Have `program` print `lines`, or fail with `error`; `then` is a further line of shell."""
        (self.folder / f"{program}.out").write_text("".join(f"{line}\n" for line in lines))
        script = self.folder / program
        script.write_text(
            "#!/bin/sh\n"
            f'echo "{program} $*" >> {self.calls_file}\n'
            f"cat {self.folder}/{program}.out\n"
            f"{then}\n" + (f"echo '{error}' >&2\nexit 1\n" if error else "")
        )
        script.chmod(0o755)

    def calls(self, program: str) -> list[str]:
        """The arguments of each call of `program`."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [
            line.removeprefix(program).strip() for line in lines if line.startswith(f"{program} ")
        ]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """An empty runs folder."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's programs, with an empty queue and accounting off."""
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    return fake


class Service:
    """An HTTP service that answers what it is told; `pages` maps a path to (status, body)."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.pages: dict[str, tuple[int, str]] = {}
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = pages.get(self.path, (404, "{}"))
                needs_key = self.path not in ("/ready", "/health")
                if needs_key and self.headers["Authorization"] != f"Bearer {KEY}":
                    status, body = 401, "{}"
                with contextlib.suppress(ConnectionError):  # a client that has heard enough
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://{host}:{self._server.server_port}"

    def serve(self, metrics: str = "") -> None:
        """Answer as a run of one prefill and one decode engine that serves."""
        engines = [
            {
                "name": e.name,
                "role": e.role,
                "host": e.url[7:9],
                "state": "READY",
                "incarnation": "7",
            }
            for e in ENGINES
        ]
        self.pages["/ready"] = (200, '{"ready": true, "pairs": 1}')
        self.pages["/nodes"] = (200, json.dumps({"state": "READY", "engines": engines}))
        self.pages["/metrics"] = (200, metrics)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    """A service that answers 404 until it is told otherwise."""
    with contextlib.closing(Service()) as running:
        yield running


@pytest.fixture
def closed_url() -> str:
    """A URL at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"

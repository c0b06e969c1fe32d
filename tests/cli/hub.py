# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face hub on loopback that holds one model, for tests of downloads."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`downloaded` are the files that were asked for, in order."""

    daemon_threads = True

    def __init__(self, model: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.files = files
        self.downloaded: list[str] = []

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        model, files = self.server.model, self.server.files
        download = f"/{model}/resolve/{COMMIT}/"
        if path.startswith(download) and path.removeprefix(download) in files:
            name = path.removeprefix(download)
            if body:
                self.server.downloaded.append(name)
            self._send(200, files[name], body=body)
        elif path in (f"/api/models/{model}/revision/{at}" for at in ("main", COMMIT)):
            siblings = [{"rfilename": name} for name in files]
            self._send_json({"id": model, "sha": COMMIT, "siblings": siblings}, body=body)
        elif path in (f"/api/models/{model}/tree/{at}" for at in ("main", COMMIT)):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in files.items()
            ]
            self._send_json(tree, body=body)
        else:
            self._send(404, b'{"error": "Repository not found"}', body=body)

    def _send_json(self, content: object, *, body: bool) -> None:
        self._send(200, json.dumps(content).encode(), body=body)

    def _send(self, status: int, data: bytes, *, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running_hub(model: str, files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A hub that serves meanwhile."""
    with Hub(model, files) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()

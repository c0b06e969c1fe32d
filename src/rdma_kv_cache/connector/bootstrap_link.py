# SPDX-License-Identifier: Apache-2.0
"""The worker's end of the bootstrap socket to its engine rank."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from rdma_kv_cache.connector.log import get_logger
from rdma_kv_cache.protocol.bootstrap import FromWorker, ToWorker
from rdma_kv_cache.protocol.codec import FrameReader, ProtocolError, decode, encode, frame

if TYPE_CHECKING:
    from collections.abc import Callable

logger = get_logger(__name__)

READ_BYTES = 1 << 16


class BootstrapLink:
    """Sends to the rank and calls `on_message` for what comes back, on its own thread.

    Raises ConnectionError naming the socket if the rank is not there.
    """

    def __init__(self, path: str, timeout_s: float, on_message: Callable[[ToWorker], None]) -> None:
        self._on_message = on_message
        self._send_lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise ConnectionError(
                f"connect({path}): {error}; the engine rank that started this vLLM is gone"
            ) from error
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, name="rkv-bootstrap", daemon=True)

    def start(self) -> None:
        """Begin to read; messages that arrived before are not lost."""
        self._thread.start()

    def send(self, message: FromWorker) -> None:
        """Send one message. A rank that is gone is only logged: it takes this process with it."""
        with self._send_lock:
            try:
                self._socket.sendall(frame(encode(message)))
            except OSError as error:
                logger.warning("bootstrap socket: send %s: %s", type(message).__name__, error)

    def close(self) -> None:
        """Close the socket and end the thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=1)
        self._socket.close()

    def _read(self) -> None:
        reader = FrameReader()
        try:
            while data := self._socket.recv(READ_BYTES):
                for body in reader.feed(data):
                    self._on_message(decode(body, ToWorker))
        except (OSError, ProtocolError) as error:
            logger.warning("bootstrap socket: %s", error)

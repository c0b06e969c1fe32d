# SPDX-License-Identifier: Apache-2.0
"""Runs in every guest of a Lab and does there what the host asks for."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from tests.engine.node import PROCESSES, Node, RemoteNode
from tests.verbs.requests import POLL_S, answer_path, collect, publish, request_path

NOBODY = 65534


class Agent:
    """The public methods are what can be asked for."""

    def __init__(self, folder: Path, node: int) -> None:
        self._folder = folder
        self._node = node
        self._processes: dict[int, RemoteNode] = {}

    def serve(self) -> None:
        """Answers requests until the guest ends."""
        number = 0
        while True:
            path = request_path(self._folder, self._node, number)
            if not path.exists():
                time.sleep(POLL_S)
                continue
            threading.Thread(target=self._answer, args=(number, *collect(path))).start()
            number += 1

    def _answer(self, number: int, action: str, args: tuple[Any, ...]) -> None:
        try:
            outcome = True, getattr(self, action)(*args)
        except Exception as error:  # noqa: BLE001 - handed to the host
            outcome = False, error
        publish(answer_path(self._folder, self._node, number), outcome)

    def start(
        self, kind: type[Node], incarnation: int, nbytes: int, config: dict[str, Any]
    ) -> None:
        """Starts a process with one engine."""
        config = {"bind_host": os.environ["GUEST_IP"], **config}
        process = self._processes[incarnation] = RemoteNode(
            incarnation, nbytes, kind=kind, **config
        )
        process.wait_until_started()

    def call(self, incarnation: int, method: str, args: tuple[Any, ...]) -> Any:
        """Calls a method of its Node."""
        return self._processes[incarnation].call(method, *args)

    def signal(self, incarnation: int, number: int) -> None:
        """Signals it."""
        os.kill(self._processes[incarnation].process.pid or 0, number)

    def end(self, incarnation: int) -> None:
        """Kills it, if it was not killed before."""
        self._processes.pop(incarnation).kill()

    def shell(self, command: str) -> str:
        """Output of a command, which must succeed."""
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr}")
        return done.stdout

    def start_as_user(self, nbytes: int, memlock: int, config: dict[str, Any]) -> str:
        """What a process without privileges is told when it registers memory."""
        with PROCESSES.Pool(1) as pool:
            return pool.apply(_register_as_user, (nbytes, memlock, config))


def _register_as_user(nbytes: int, memlock: int, config: dict[str, Any]) -> str:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
    os.setuid(NOBODY)
    try:
        Node(1, nbytes, **config).close()
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    Agent(Path("/io"), int(os.environ["GUEST_NODE"])).serve()

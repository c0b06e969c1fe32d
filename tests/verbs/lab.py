# SPDX-License-Identifier: Apache-2.0
"""Engines in guests, driven from the host as if they were here."""

from __future__ import annotations

import itertools
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.engine.node import Node
from tests.guest import Guests
from tests.verbs.requests import POLL_S, answer_path, collect, publish, request_path

if TYPE_CHECKING:
    import signal

    from typing_extensions import Self

#: An emulated CPU is 12 to 25 times slower than the host's, most of the tests' time is not CPU.
GUEST_ENVIRONMENT = {"RKV_TEST_BACKEND": "verbs", "RKV_TEST_PATIENCE": "5"}
ANSWER_S = 120.0
#: All retries of a QP fit into it with an ACK timeout of 1.07 s each. With 0.07 s, an emulated
#: Soft-RoCE lost 3 of 8 connections under load, with 1.07 s none of 16.
PEER_TIMEOUT_S = 8.0
CONNECT_TIMEOUT_S = 12.0
BUFFER_BYTES = 2 << 20


class Pending:
    """A request that is being answered."""

    def __init__(self, lab: Lab, node: int, number: int, text: str) -> None:
        self._lab = lab
        self._node = node
        self._path = answer_path(lab.folder, node, number)
        self._text = text

    def result(self, timeout_s: float = ANSWER_S) -> Any:
        """The answer; raises what the request raised."""
        deadline = time.monotonic() + timeout_s
        while not self._path.exists():
            if time.monotonic() > deadline or not self._lab.guests.running():
                output = self._lab.guests.read_output(self._node)
                raise TimeoutError(f"node {self._node}: no answer to {self._text}\n{output}")
            time.sleep(POLL_S)
        fine, value = collect(self._path)
        if not fine:
            raise value
        return value


class LabNode:
    """A Node in a process of its own in a guest."""

    def __init__(self, lab: Lab, guest: int, incarnation: int) -> None:
        self.lab = lab
        self.guest = guest
        self.incarnation = incarnation

    def call(self, method: str, *args: Any, timeout_s: float = ANSWER_S) -> Any:
        """Runs a method of the Node; raises what it raised."""
        pending = self.lab.begin(self.guest, "call", self.incarnation, method, args)
        return pending.result(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        """Signals its process."""
        self.lab.ask(self.guest, "signal", self.incarnation, int(number))

    def end(self) -> None:
        """Ends its process, if that still runs."""
        self.lab.ask(self.guest, "end", self.incarnation)


class Lab:
    """Guests with an agent in each, as a context manager."""

    def __init__(self, nodes: int = 1, rails: int = 1, timeout_s: float = 300.0) -> None:
        self.guests = Guests(
            [sys.executable, "-m", "tests.verbs.agent"],
            nodes=nodes, rails=rails, timeout_s=timeout_s, env=GUEST_ENVIRONMENT,
        )  # fmt: skip
        self._requests = [itertools.count() for _ in range(nodes)]
        self._incarnations = itertools.count(1)

    def __enter__(self) -> Self:
        self.guests.__enter__()
        self.folder = self.guests.folder.path
        return self

    def __exit__(self, *_: object) -> None:
        self.guests.__exit__()

    def begin(self, guest: int, action: str, *args: Any) -> Pending:
        """Asks a guest's agent for something."""
        number = next(self._requests[guest])
        publish(request_path(self.folder, guest, number), (action, args))
        return Pending(self, guest, number, f"{action}{args}")

    def ask(self, guest: int, action: str, *args: Any) -> Any:
        """Asks a guest's agent for something and waits until it is done."""
        return self.begin(guest, action, *args).result()

    def start(
        self, guest: int, kind: type[Node] = Node, nbytes: int = BUFFER_BYTES, **config: Any
    ) -> LabNode:
        """Starts a Node with a new incarnation; raises what its constructor raised."""
        node = LabNode(self, guest, next(self._incarnations))
        timeouts = {"peer_timeout_s": PEER_TIMEOUT_S, "connect_timeout_s": CONNECT_TIMEOUT_S}
        config = {**timeouts, **config}
        self.ask(guest, "start", kind, node.incarnation, nbytes, config)
        return node


def connect(near: LabNode, far: LabNode) -> None:
    """Connects both and waits until both are usable."""
    near.call("connect", far.call("invite"))
    far.call("connect", near.call("invite"))
    near.call("next_event", "CONNECTED")
    far.call("next_event", "CONNECTED")

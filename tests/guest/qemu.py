# SPDX-License-Identifier: Apache-2.0
"""Guests as QEMU machines: the distribution's kernel on emulated CPUs."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.guest import host, initramfs, kernel
from tests.guest.lane import Lane
from tests.guest.machine import Boot, Spec, qemu_arguments, switch_arguments

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

QEMU = "qemu-system-x86_64"
QMP_TIMEOUT_S = 5.0


class QemuLane(Lane):
    """One QEMU a node.

    The network is made of socket pairs that the QEMUs inherit: one cable between two nodes, or
    one from each of more nodes to a switch. Nothing touches the host's own network.
    """

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.check()
        super().__init__(spec, folder)
        chosen = kernel.prepare(host.cache_folder())
        archive = folder / "initramfs.cpio"
        archive.write_bytes(initramfs.build(chosen.modules))
        self._boot = Boot(chosen.image, archive, folder, host.tsc_khz())
        self._monitors: list[Monitor] = []
        self._switch: subprocess.Popen[bytes] | None = None

    @staticmethod
    def check() -> None:
        """Also fetches the kernel."""
        host.require_x86_64()
        host.require(QEMU, "setpriv", "bash", "ip", "rdma")
        initramfs.busybox()
        kernel.prepare(host.cache_folder())

    def start(self) -> None:
        nodes = self.spec.nodes
        rails = [_wire(nodes) for _ in range(self.spec.rails if nodes > 1 else 0)]
        try:
            if nodes > 2:
                self._start_switch([rail.switch_ends for rail in rails])
            for node in range(nodes):
                self._start_node(node, [rail.node_ends[node] for rail in rails])
        finally:
            # A dead node's socket has to be closed, or its peer's frames would pile up in it.
            for rail in rails:
                for end in rail.node_ends + rail.switch_ends:
                    end.close()

    def _start_node(self, node: int, cables: list[socket.socket]) -> None:
        ours, theirs = socket.socketpair()
        self._monitors.append(Monitor(ours))
        with theirs:
            fds = [cable.fileno() for cable in cables]
            arguments = qemu_arguments(self.spec, self._boot, node, theirs.fileno(), fds)
            argv = [host.command(QEMU), *arguments]
            self.processes.append(self._spawn(f"node{node}", argv, [theirs.fileno(), *fds]))

    def _start_switch(self, ports: list[list[socket.socket]]) -> None:
        fds = [[port.fileno() for port in rail] for rail in ports]
        argv = [host.command(QEMU), *switch_arguments(fds)]
        self._switch = self._spawn("switch", argv, [fd for rail in fds for fd in rail])

    def set_link(self, node: int, rail: int, *, on: bool) -> None:
        self._monitors[node].execute("set_link", name=f"rail{rail}", up=on)

    def close(self) -> None:
        super().close()
        for monitor in self._monitors:
            monitor.close()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()


class Rail(NamedTuple):
    """The sockets of one rail, in the order of the nodes."""

    node_ends: list[socket.socket]
    switch_ends: list[socket.socket]


def _wire(nodes: int) -> Rail:
    if nodes == 2:
        return Rail([*socket.socketpair(type=socket.SOCK_DGRAM)], [])
    pairs = [socket.socketpair(type=socket.SOCK_DGRAM) for _ in range(nodes)]
    return Rail([near for near, _ in pairs], [far for _, far in pairs])


class Monitor:
    """QEMU's machine protocol (QMP) over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(QMP_TIMEOUT_S)
        self._answers = connection.makefile("rb")
        self._negotiated = False

    def execute(self, command: str, **arguments: object) -> None:
        """Runs one command; raises RuntimeError if QEMU refuses it or does not answer."""
        if not self._negotiated:
            self._negotiated = True
            self.execute("qmp_capabilities")
        try:
            answer = self._ask({"execute": command, "arguments": arguments})
        except OSError as error:
            raise RuntimeError(f"QEMU {command}: {error} (guest stopped or ended?)") from error
        if "error" in answer:
            raise RuntimeError(f"QEMU {command} {arguments}: {answer['error']['desc']}")

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while line := self._answers.readline():
            answer: dict[str, Any] = json.loads(line)
            if "return" in answer or "error" in answer:  # else an event or the greeting
                return answer
        raise ConnectionResetError("connection closed")

    def close(self) -> None:
        """Closes the connection."""
        self._answers.close()
        self._socket.close()

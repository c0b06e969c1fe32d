# SPDX-License-Identifier: Apache-2.0
"""perftest's programs, in two processes on one device."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.verbs_peers import Device

MIB = 1 << 20
TIMEOUT_S = 120
START_S = 20.0
#: 4.096 us * 2^18 = 1.07 s. With the default of 14 (67 ms) Soft-RoCE retransmits when its host is
#: busy; perftest's retry_cnt of 7 means "for ever" to it, hence the time limit of every run.
QP_TIMEOUT = 18
#: One run moves about as much.
RUN_BYTES = 24 * MIB
RUN_MESSAGES = 6144
RUN_SINGLE_MESSAGES = 512

#: What may be better than the defaults (peak measured too, one WR a post, a CQE for 100 WRs, one
#: QP), by the batch that it is compared with. Of two QPs each has half the depth.
SETTINGS: dict[int, tuple[str, ...]] = {
    1: ("-t 1", "-t 1 -N"),
    128: ("-t 128", "-t 128 -N", "-t 128 -N -l 16", "-t 128 -N -l 64 -Q 64", "-t 64 -N -l 16 -q 2"),
    4096: (
        *("-t 128 -N", "-t 128 -N -l 64 -Q 64", "-t 1024 -N", "-t 1024 -N -l 64 -Q 64"),
        "-t 512 -N -l 64 -q 2",
    ),
}
#: Deeper than this costs time only: 256 MiB are 3 s of Soft-RoCE in an emulated guest.
MAX_OUTSTANDING_BYTES = 256 * MIB


def depth_of(setting: str) -> int:
    """WRs outstanding on a QP."""
    options = setting.split()
    return int(options[options.index("-t") + 1])


def settings(batch: int, nbytes: int) -> list[str]:
    """Settings to compare a batch of blocks with."""
    return [s for s in SETTINGS[batch] if depth_of(s) * nbytes <= MAX_OUTSTANDING_BYTES]


def listening(port: int) -> bool:
    """Whether a process waits for connections there (proc_net_tcp.rst: state 0A is LISTEN)."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
                return True
    return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def run(program: str, device: Device, options: list[str]) -> list[float]:
    """The figures of the last line of its table."""
    port = free_port()
    command = [
        *("timeout", str(TIMEOUT_S), program, "-F", "-u", str(QP_TIMEOUT), "-p", str(port)),
        *("-d", device.name, "-x", str(device.gid_index), *options),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:  # type: ignore[call-overload]
        deadline = time.monotonic() + START_S
        while not listening(port):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise RuntimeError(f"the server of {' '.join(command)} does not start")
            time.sleep(0.02)
        client = subprocess.run(
            [*command, device.address], capture_output=True, text=True, check=False
        )
        if client.returncode != 0:
            server.kill()
            raise RuntimeError(f"{' '.join(command)}: {client.stdout}{client.stderr}")
    size = options[options.index("-s") + 1]
    rows = [line.split() for line in client.stdout.splitlines()]
    return [float(field) for field in next(row for row in reversed(rows) if row[:1] == [size])]


def bandwidth(device: Device, nbytes: int, setting: str) -> float:
    """Bytes per second of ib_write_bw, average."""
    depth = depth_of(setting)
    most = RUN_SINGLE_MESSAGES if depth == 1 else RUN_MESSAGES
    batches = -(-min(RUN_BYTES // nbytes, most) // depth)  # so that every -l and -Q divides it
    options = ["-s", str(nbytes), "-n", str(batches * depth), *setting.split()]
    return run("ib_write_bw", device, options)[3] * MIB


def latency(device: Device, nbytes: int, messages: int) -> tuple[float, float]:
    """Seconds of ib_write_lat: median and 99th percentile of half round trips."""
    figures = run("ib_write_lat", device, ["-s", str(nbytes), "-n", str(messages)])
    return figures[4] / 1e6, figures[7] / 1e6


def version() -> str:
    """perftest's version. Raises FileNotFoundError where it is not installed."""
    text = subprocess.run(["ib_write_bw", "--version"], capture_output=True, text=True, check=False)
    return text.stdout.strip().removeprefix("Version: ")

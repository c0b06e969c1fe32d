# SPDX-License-Identifier: Apache-2.0
"""The vLLM server of an engine: its command line, its environment, its process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdma_kv_cache.cluster import guardian
from rdma_kv_cache.cluster.gpus import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rdma_kv_cache.config import JobConfig, Role

KILL_TIMEOUT_S = guardian.SWEEP_LIMIT_S + 2.0
CONNECTOR = "RDMAConnector"
CONNECTOR_MODULE = "rdma_kv_cache.connector.rdma_connector"


@dataclass(frozen=True)
class EngineSpec:
    """What one start of an engine has of its own; the rest is in the job."""

    engine: str
    role: Role
    incarnation: int
    host: str
    port: int
    bootstrap_socket: str

    @property
    def url(self) -> str:
        """Where the server will answer."""
        return f"http://{self.host}:{self.port}"


def served_names(model: str) -> list[str]:
    """Return the names that clients may use for `model`: a folder's last component and itself."""
    path = Path(model)
    return [path.name, model] if path.is_absolute() else [model]


def kv_transfer_config(job: JobConfig, spec: EngineSpec) -> dict[str, Any]:
    """Return the value of vLLM's --kv-transfer-config. It holds nothing secret."""
    rdma = job.rdma
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_producer" if spec.role == "prefill" else "kv_consumer",
        "engine_id": spec.engine,
        "kv_load_failure_policy": rdma.load_failure_policy,
        "kv_connector_extra_config": {
            "bootstrap_socket": spec.bootstrap_socket,
            "incarnation": str(spec.incarnation),
            "bind_host": spec.host,
            "backend": rdma.backend,
            "devices": "auto" if rdma.devices == "auto" else ",".join(rdma.devices),
            "gid_index": -1 if rdma.gid_index == "auto" else rdma.gid_index,
            "traffic_class": rdma.traffic_class,
            "service_level": rdma.service_level,
            "block_size": rdma.block_size,
            "queue_depth": rdma.queue_depth,
            "qps_per_peer": rdma.qps_per_peer,
            "peer_timeout_s": rdma.peer_timeout_s,
            "connect_timeout_s": rdma.connect_timeout_s,
            "transfer_timeout_s": rdma.transfer_timeout_s,
            "cancel_timeout_s": rdma.cancel_timeout_s,
            "lease_s": rdma.lease_s,
            "checksum": rdma.checksum,
            "piecewise_graphs": spec.role == "prefill",
            "link": rdma.link,
            "trace_file": rdma.trace_file,
        },
    }


def vllm_command(job: JobConfig, spec: EngineSpec) -> list[str]:
    """Return the command line of the engine's vLLM; `vllm_args` of its group come last and win."""
    model = job.model
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model.name, "--served-model-name", *served_names(model.name)),
        *("--host", spec.host, "--port", str(spec.port)),
        *("--max-model-len", str(model.max_model_len)),
        *("--tensor-parallel-size", str(job.tp_size(spec.role))),
        *("--dtype", model.dtype),
        *("--gpu-memory-utilization", str(model.gpu_memory_utilization)),
    ]
    if model.block_size is not None:
        command += ["--block-size", str(model.block_size)]
    if job.rdma.kv_buffer is not None:
        command += ["--kv-cache-memory-bytes", str(job.rdma.kv_buffer)]
    command += ["--enable-per-request-metrics"]
    command += ["--kv-transfer-config", json.dumps(kv_transfer_config(job, spec))]
    return [*command, *job.group(spec.role).vllm_args]


def vllm_environment(
    job: JobConfig,
    spec: EngineSpec,
    base: Mapping[str, str],
    api_key: str,
    gpus: Sequence[str] = (),
) -> dict[str, str]:
    """Return `base` with what the engine's vLLM needs; the group's own variables win.

    `gpus` are what CUDA shows it, its own first; none leaves the choice to what `base` says.

    The key travels in the environment, which only the user's own processes can read.
    """
    environment = {
        **base,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if gpus:
        environment[VARIABLE] = ",".join(gpus)
    if Path(job.model.name).is_absolute():
        environment["HF_HUB_OFFLINE"] = "1"
    return {**environment, **job.group(spec.role).env, "VLLM_API_KEY": api_key}


def free_port(host: str) -> int:
    """Return a port of `host` that is free now; another process may take it before it is used."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_port_taken(host: str, port: int) -> bool:
    """Whether a server cannot bind `port` now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


class VllmProcess:
    """A running server with all processes below it, in a process group of its own.

    It ends with this process, however that ends. Start it from a thread that lives as long as
    the process (the kernel's "parent" is the thread that forked): the main thread.
    """

    def __init__(self, process: asyncio.subprocess.Process, pid: int) -> None:
        self._process = process
        self.pid = pid

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], log_file: Path
    ) -> VllmProcess:
        """Start `command`; its output is appended to `log_file`."""
        with log_file.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *guardian.guarded(command, os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )
        assert process.stdout is not None
        line = await process.stdout.readline()
        return cls(process, int(line.split()[1]) if line else 0)

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended yet."""
        return self._process.returncode is None

    @property
    def outcome(self) -> str:
        """How the server ended, in words."""
        code = self._process.returncode
        return "is running" if code is None else describe_exit(code)

    async def wait(self) -> str:
        """Wait for the server's end, by itself or not; return how it ended."""
        code = await self._process.wait()
        # Nothing of the group is left, unless the guardian itself was killed.
        self._kill_group()
        return describe_exit(code)

    async def terminate_and_reap(self, grace_s: float) -> str:
        """End the server and everything below it; return how it ended.

        SIGTERM first; after `grace_s` SIGKILL to all. Takes at most grace_s + KILL_TIMEOUT_S.
        """
        if not self.is_running:
            return await self.wait()
        self._send(signal.SIGTERM)
        try:
            return f"{await asyncio.wait_for(self.wait(), grace_s)} after SIGTERM"
        except asyncio.TimeoutError:
            self._send(guardian.KILL_ALL)
        try:
            await asyncio.wait_for(self.wait(), KILL_TIMEOUT_S)
        except asyncio.TimeoutError:
            self._kill_group()
            return f"did not end within {KILL_TIMEOUT_S:g} s of SIGKILL"
        return f"killed, it ignored SIGTERM for {grace_s:g} s"

    def _send(self, number: signal.Signals) -> None:
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            return  # it ended by itself; wait() says how

    def _kill_group(self) -> None:
        if self.pid == 0:  # it was never started
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def describe_exit(code: int) -> str:
    """Return a guardian's exit code in words."""
    number = -code if code < 0 else code - 128
    if number > 0:
        try:
            return f"ended by {signal.Signals(number).name}"
        except ValueError:
            pass  # a program's own code above 128
    return f"exited with code {code}"

# SPDX-License-Identifier: Apache-2.0
"""What vLLM is started with, pinned by a golden file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rdma_kv_cache.cluster.vllm_process import (
    EngineSpec,
    served_names,
    vllm_command,
    vllm_environment,
)
from rdma_kv_cache.config import JobConfig

GOLDEN = Path(__file__).parent / "vllm_command.golden"

JOB = JobConfig.model_validate(
    {
        "model": {
            "name": "/models/SmolLM2-135M-Instruct",
            "max_model_len": 2048,
            "gpu_memory_utilization": 0.5,
            "tensor_parallel_size": 2,
            "dtype": "bfloat16",
            "block_size": 32,
        },
        "prefill": {"vllm_args": ("--enforce-eager", "--max-num-seqs", "8")},
        "decode": {"env": {"VLLM_CPU_OMP_THREADS_BIND": "1", "VLLM_API_KEY": "mine"}},
        "rdma": {"kv_buffer": "256MiB", "checksum": True, "load_failure_policy": "fail"},
    }
)
PREFILL = EngineSpec("prefill-0", "prefill", 2**63 - 1, "127.0.0.1", 8100, "/tmp/rkv-x/bootstrap")
DECODE = EngineSpec("decode-1", "decode", 7, "10.0.0.2", 8200, "/tmp/rkv-y/bootstrap")


def render(command: list[str]) -> str:
    """One argument a line; the interpreter's path differs between machines."""
    lines = ["PYTHON", *command[1:]]
    return "\n".join(lines) + "\n"


def test_command_lines_are_as_recorded() -> None:
    text = render(vllm_command(JOB, PREFILL)) + "\n" + render(vllm_command(JOB, DECODE))
    assert text == GOLDEN.read_text()


def test_optional_flags_are_left_to_vllm() -> None:
    command = vllm_command(JobConfig.model_validate({"model": {"name": "org/model"}}), PREFILL)
    assert "--block-size" not in command
    assert "--kv-cache-memory-bytes" not in command


def test_incarnations_keep_all_their_bits() -> None:
    command = vllm_command(JOB, PREFILL)
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert int(config["kv_connector_extra_config"]["incarnation"]) == 2**63 - 1


def test_the_connector_reads_what_the_rank_writes() -> None:
    settings = pytest.importorskip("rdma_kv_cache.connector.settings")
    command = vllm_command(JOB, DECODE)
    config = json.loads(command[command.index("--kv-transfer-config") + 1])

    class KVTransferConfig:
        engine_id = config["engine_id"]
        kv_connector_extra_config = config["kv_connector_extra_config"]

    read = settings.Settings.from_kv_transfer_config(KVTransferConfig)
    assert (read.engine, read.incarnation, read.bind_host) == ("decode-1", 7, "10.0.0.2")
    assert read.checksum is True


def test_names_that_clients_may_use() -> None:
    assert served_names("/models/SmolLM2-135M") == ["SmolLM2-135M", "/models/SmolLM2-135M"]
    assert served_names("HuggingFaceTB/SmolLM2-135M") == ["HuggingFaceTB/SmolLM2-135M"]


def test_environment() -> None:
    base = {"PATH": "/bin", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    found = vllm_environment(JOB, DECODE, base, "derived")
    assert found == {
        "PATH": "/bin",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "1",
        "VLLM_API_KEY": "derived",
    }
    hub_model = JobConfig.model_validate({"model": {"name": "org/model"}})
    assert "HF_HUB_OFFLINE" not in vllm_environment(hub_model, PREFILL, base, "derived")


def test_nothing_secret_on_the_command_line() -> None:
    assert "derived" not in " ".join(vllm_command(JOB, DECODE))

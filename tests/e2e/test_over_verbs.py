# SPDX-License-Identifier: Apache-2.0
"""The whole product on real kernel verbs: a batch job in a guest with Soft-RoCE.

A User-Mode Linux guest, because vLLM's start is minutes of CPU at a process's full speed. Its one
CPU is shared by the orchestrator and both engines, hence the long deadlines.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml

from tests.e2e.conftest import BLOCK, ENGINE_ARGS, MAX_TOKENS
from tests.guest import run_guests, why_not
from tests.support.vllm_server import MODEL

if TYPE_CHECKING:
    from tests.e2e.conftest import Reference

# The guest took 234 s of CPU, and 351 s where other work competed for the two cores.
LIMIT_S = 1500.0
pytestmark = [pytest.mark.e2e, pytest.mark.verbs, pytest.mark.timeout(LIMIT_S + 300)]

BACKEND = os.environ.get("RKV_TEST_BACKEND", "verbs")
LENGTHS = (1, 31, 32, 33, 100, 255, 256, 257, 333, 600)
LAYERS_AND_BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 4
KV_BYTES = 256 << 20
# Two engines used 5.5 GiB, files in the guest's page cache 0.8 GiB.
MEMORY_MIB = 8000

# What counts the bytes of each transport in the guest, and bytes a count: packets of the path MTU.
COUNTERS = {
    "verbs": ("/sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts", 4096),
    "tcp": ("/sys/class/net/lo/statistics/tx_bytes", 1),
}


def why_not_here() -> str | None:
    """Why this host cannot run the guest, for a skip; None if it can."""
    if psutil.virtual_memory().available < MEMORY_MIB << 20:
        return f"needs {MEMORY_MIB} MiB of free memory"
    return why_not(uml=True)


def write_prompts(path: Path, reference: Reference) -> int:
    """OpenAI Batch lines for prompts of LENGTHS; returns their number of tokens."""
    prompts = [reference.of_length(tokens)[0] for tokens in LENGTHS]
    with path.open("w") as file:
        for prompt in prompts:
            body = {
                "model": MODEL.name, "prompt": prompt, "max_tokens": MAX_TOKENS,
                "temperature": 0, "ignore_eos": True,
            }  # fmt: skip
            line = {"custom_id": str(len(prompt)), "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")
    return sum(map(len, prompts))


def write_job(path: Path) -> None:
    """Both engines on the guest's only CPU, with deadlines for that."""
    group = {"vllm_args": ENGINE_ARGS, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0"}}
    job: dict[str, Any] = {
        "model": {
            "name": str(MODEL), "max_model_len": 2048, "dtype": "float32", "block_size": BLOCK,
        },
        "prefill": group,
        "decode": group,
        "rdma": {
            "backend": BACKEND, "kv_buffer": KV_BYTES, "checksum": True,
            "peer_timeout_s": 30, "connect_timeout_s": 60, "cancel_timeout_s": 30,
            "lease_s": 60,
        },
        "orchestrator": {
            "engine_start_timeout_s": LIMIT_S, "heartbeat_s": 2, "health_timeout_s": 60,
            # A second try would hide what the first one failed of.
            "max_restarts": 0,
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(job))


def batch_command(prompts: Path, job: Path) -> str:
    """Shell lines: the batch, between two looks at what each transport has carried."""
    rdma_kv = Path(sys.executable).with_name("rdma-kv")
    batch = [str(rdma_kv), "batch", str(prompts), "-o", "/io/answers.jsonl", "--config", str(job)]
    batch += ["--run-dir", "/io/run", "--concurrency", "4"]
    look = shlex.join(["cat", *(path for path, _ in COUNTERS.values())])
    return f"{look} > /io/before && {shlex.join(batch)} && {look} > /io/after"


def carried(folder: Path) -> dict[str, int]:
    """Bytes that each transport carried during the batch."""
    before, after = (map(int, (folder / name).read_text().split()) for name in ("before", "after"))
    return {
        name: (end - begin) * unit
        for (name, (_, unit)), begin, end in zip(COUNTERS.items(), before, after, strict=True)
    }


def test_batch_equals_one_engine(reference: Reference, tmp_path: Path) -> None:
    if reason := why_not_here():
        pytest.skip(reason)
    prompts, job, folder = tmp_path / "prompts.jsonl", tmp_path / "job.yaml", tmp_path / "io"
    kv_bytes = LAYERS_AND_BYTES_PER_TOKEN * write_prompts(prompts, reference)
    write_job(job)

    run = run_guests(
        batch_command(prompts, job),
        uml=True, memory_mib=MEMORY_MIB, timeout_s=LIMIT_S, folder=folder,
    ).check()  # fmt: skip

    print(run.output[0])
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    texts = [answer["response"]["body"]["choices"][0]["text"] for answer in answers]
    assert texts == [reference.of_length(tokens)[1] for tokens in LENGTHS]
    figures = dict(re.findall(r"^(KV [\w ]*\w) {2,}(\S+)", run.output[0], re.MULTILINE))
    assert figures["KV transfers"] == str(len(LENGTHS))
    assert figures["KV transfers failed"] == "0"
    bytes_of = carried(folder)
    assert bytes_of.pop(BACKEND) > 0.9 * kv_bytes
    assert all(other < 0.1 * kv_bytes for other in bytes_of.values()), bytes_of

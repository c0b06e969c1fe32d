# SPDX-License-Identifier: Apache-2.0
"""The whole product as heterogeneous Slurm jobs: one prefill node, two decode nodes, real vLLM.

The nodes are namespaces of this machine; all three engines share its cores.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.e2e.conftest import BLOCK, ENGINE_ARGS, MAX_TOKENS
from tests.slurm import Lab, why_not
from tests.slurm.machine import poll
from tests.support.vllm_server import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.conftest import Reference

START_S = 420.0
BATCH_S = 900.0
PROMPTS = 48
pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.timeout(START_S + BATCH_S + 300)]

RDMA_KV = Path(sys.executable).with_name("rdma-kv")
BATCH_SBATCH = Path(__file__).parents[2] / "sbatch" / "batch.sbatch"
STREAM = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key=open(sys.argv[2]).read().strip())
prompt, tokens = [int(t) for t in sys.argv[3].split(",")], int(sys.argv[4])
model = client.models.list().data[0].id
parts = [
    chunk.choices[0].text
    for chunk in client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )
]
print(len(parts))
print("".join(parts), end="")
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """p0 sorts behind d0 and d1, against the order of the components."""
    if reason := why_not():
        pytest.skip(reason)
    with Lab({"p0": "prefill", "d0": "decode", "d1": "decode"}) as running:
        yield running


@pytest.fixture
def place(lab: Lab, request: pytest.FixtureRequest) -> Path:
    """A folder that all nodes see, with the job file."""
    folder = lab.shared / request.node.name
    folder.mkdir()
    (folder / "job.yaml").write_text(yaml.safe_dump(job_file()))
    return folder


def job_file() -> dict[str, Any]:
    """Checksum mode on; deadlines for three engines on two cores."""

    def group(nodes: int, **slurm: str) -> dict[str, Any]:
        # Of two engines bound to one core one was left without CPU for a minute.
        env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        return {"engines": nodes, "nodes": nodes, "vllm_args": ENGINE_ARGS, "env": env, **slurm}

    return {
        "model": {
            "name": str(MODEL), "max_model_len": 2048, "dtype": "float32", "block_size": BLOCK,
        },
        "prefill": group(1, constraint="prefill", gres="gpu:prefill:1"),
        "decode": group(2, constraint="decode", gres="gpu:decode:1"),
        "rdma": {"kv_buffer": 512 << 20, "checksum": True, "lease_s": 60, "peer_timeout_s": 20},
        "orchestrator": {"health_timeout_s": 30, "engine_start_timeout_s": START_S},
        "slurm": {"time": "40", "signal_s": 60},
    }  # fmt: skip


def shortest(reference: Reference) -> list[int]:
    """Indices of those prompts: three engines share two cores."""
    order = sorted(range(len(reference.prompts)), key=lambda i: len(reference.prompts[i]))
    return sorted(order[:PROMPTS])


def write_prompts(path: Path, reference: Reference) -> None:
    """The shortest PROMPTS prompts, as OpenAI Batch lines in the reference's order."""
    with path.open("w") as file:
        for index in shortest(reference):
            prompt = reference.prompts[index]
            body = {
                "model": MODEL.name, "prompt": prompt, "max_tokens": MAX_TOKENS,
                "temperature": 0, "ignore_eos": True,
            }  # fmt: skip
            line = {"custom_id": str(index), "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**line, "body": body}) + "\n")


def rdma_kv(lab: Lab, place: Path, *arguments: str) -> str:
    """Runs a command on the login node."""
    return lab.check(RDMA_KV, *arguments, cwd=place, env={"HOME": str(place)}, timeout_s=60)


def submit(lab: Lab, place: Path, *arguments: str) -> dict[str, Any]:
    """`rdma-kv submit`; the job's record."""
    own = ["--config", "job.yaml", "--runs", "runs", "--json"]
    record: dict[str, Any] = json.loads(rdma_kv(lab, place, "submit", *arguments, *own))
    return record


def submit_by_sbatch(lab: Lab, place: Path, *arguments: str) -> tuple[int, Path]:
    """sbatch/batch.sbatch with this lab's constraints; the job's number and folder."""
    job = lab.submit(
        "--constraint=prefill", "--gres=gpu:prefill:1", ":",
        "--nodes=2", "--constraint=decode", "--gres=gpu:decode:1", BATCH_SBATCH, *arguments,
        cwd=place, env={"HOME": str(place), "RDMA_KV": str(RDMA_KV)},
    )  # fmt: skip
    return job, place / "rdma-kv-runs" / f"rdma-kv-batch-{job}"


def output(folder: Path) -> str:
    """What the job of this folder wrote, for a failing test."""
    texts = [folder.with_name(folder.name + ".out"), folder / "latest" / "logs" / "launcher.log"]
    return "\n".join(path.read_text()[-4000:] for path in texts if path.exists())


def test_batch_equals_one_engine(reference: Reference, lab: Lab, place: Path) -> None:
    write_prompts(place / "prompts.jsonl", reference)
    job, folder = submit_by_sbatch(lab, place, "job.yaml", "prompts.jsonl", "answers.jsonl")
    states = lab.wait_for(job, "COMPLETED", "FAILED", timeout_s=START_S + BATCH_S)
    print(output(folder))
    assert set(states.values()) == {"COMPLETED"}
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    texts = [answer["response"]["body"]["choices"][0]["text"] for answer in answers]
    assert texts == [reference.texts[index] for index in shortest(reference)]
    said = folder.with_name(folder.name + ".out").read_text()
    figures = dict(re.findall(r"^(KV [\w ]*\w) {2,}(\S+)", said, re.MULTILINE))
    assert figures["KV transfers"] == str(len(texts))
    assert figures["KV transfers failed"] == "0"


def test_serving_streams_until_it_is_stopped(reference: Reference, lab: Lab, place: Path) -> None:
    record = submit(lab, place, "serve")
    job = str(record["job_id"])

    def status() -> dict[str, Any]:
        view: dict[str, Any] = json.loads(
            rdma_kv(lab, place, "status", job, "--json", "--runs", "runs")
        )
        return view

    assert poll(lambda: status()["state"] not in ("PENDING", "STARTING"), START_S, every_s=3.0)
    view = status()
    assert view["state"] == "READY", output(Path(record["folder"]))
    prompt, text = reference.of_length(333)
    said = lab.check(
        sys.executable, "-c", STREAM, view["url"], view["api_key_file"],
        ",".join(map(str, prompt)), str(MAX_TOKENS), cwd=place, timeout_s=120,
    )  # fmt: skip
    chunks, _, streamed = said.partition("\n")
    assert streamed == text
    assert int(chunks) > 1
    rdma_kv(lab, place, "stop", job, "--runs", "runs")
    lab.wait_for(record["job_id"], "COMPLETED", "CANCELLED", timeout_s=90)
    assert status()["state"] == "DONE"

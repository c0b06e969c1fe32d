# SPDX-License-Identifier: Apache-2.0
"""The ranks of a job over several nodes, by every launcher, with stand-in engines."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from tests.slurm import standin

if TYPE_CHECKING:
    from tests.slurm import Lab

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

# Of the components prefill and decode: d sorts before p, and so against their order.
AGAINST = ("prefill", "decode")
WITH = ("decode", "prefill")
WRONG_MPI_S = 30.0


@pytest.mark.parametrize("order", [AGAINST, WITH], ids=["against", "with"])
@pytest.mark.parametrize("launcher", ["srun", "mpiexec"])
def test_engines_come_up_on_the_nodes_of_their_component(
    lab: Lab, launcher: str, order: tuple[str, str]
) -> None:
    prefill, decode = order
    job = standin.submit(
        lab,
        lab.shared / f"ranks-{launcher}-{prefill}",
        prefill={"engines": 1, "constraint": prefill, "gres": f"gpu:{prefill}:1"},
        decode={"engines": 2, "nodes": 2, "constraint": decode, "gres": f"gpu:{decode}:1"},
        slurm={"launcher": launcher},
    )
    state = job.wait("READY", "FAILED")
    assert state.state == "READY", job.logs()
    hosts = {engine.name: engine.url.split("//")[1].split(":")[0] for engine in state.engines}
    names = {lab.address(node): node for node in lab.nodes}
    nodes = {engine: names[address] for engine, address in hosts.items()}
    assert nodes["prefill-0"][0] == prefill[0]
    assert sorted(nodes[name] for name in ("decode-0", "decode-1")) == [
        f"{decode[0]}0", f"{decode[0]}1"
    ]  # fmt: skip
    job.stop()
    lab.wait_for(job.job_id, "COMPLETED")
    assert job.state().state == "DONE"
    events = [json.loads(line) for line in job.run.events_file.read_text().splitlines()]
    states = [event["state"] for event in events if event["event"] == "run"]
    assert [states[-3], states[-2], states[-1]] == ["READY", "DRAINING", "DONE"]
    assert {e["engine"] for e in events if e["event"] == "engine" and e["state"] == "READY"} == {
        "prefill-0", "decode-0", "decode-1"
    }  # fmt: skip


def test_a_wrong_mpi_is_named_soon(lab: Lab) -> None:
    job = standin.submit(lab, lab.shared / "wrong-mpi", slurm={"mpi": "none"})
    began = time.monotonic()
    states = lab.wait_for(job.job_id, "FAILED", "COMPLETED", timeout_s=WRONG_MPI_S)
    assert "FAILED" in states.values()
    assert "slurm.mpi" in job.logs()
    print(f"{time.monotonic() - began:.1f} s: {job.logs()}")

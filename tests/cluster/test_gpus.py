# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from rdma_kv_cache.cluster.gpus import (
    FIRST_NODE_VARIABLE,
    VARIABLE,
    gpus_of_engine,
    gpus_to_show,
    visible_gpus,
)
from rdma_kv_cache.config import JobConfig, JobError
from rdma_kv_cache.protocol.bootstrap import EngineHello

NOWHERE = Path("/nonexistent")


def hellos(*hosts: str, tp_size: int = 2) -> list[EngineHello]:
    """The orchestrator and prefill engines on the first host, the last engine is decode."""
    roles = ["orchestrator", *["prefill"] * (len(hosts) - 2), "decode"]
    return [
        EngineHello(f"{r}-{i}", r, h, i, tp_size)
        for i, (r, h) in enumerate(zip(roles, hosts, strict=True))
    ]


def job(**group: object) -> JobConfig:
    return JobConfig.model_validate(
        {"model": {"name": "m", "tensor_parallel_size": 2}, "prefill": {"engines": 2, **group}}
    )


def test_engines_of_a_host_share_its_gpus_in_rank_order() -> None:
    world = hellos("p0", "p0", "p0", "d0")
    visible = ["4", "5", "6", "7"]
    found = [gpus_of_engine(hello, world, job(), visible) for hello in world[1:]]
    assert found == [["4", "5"], ["6", "7"], ["4", "5"]]


def test_engines_that_meet_on_a_host_see_each_others_gpus_behind_their_own() -> None:
    together, apart = hellos("n0", "n0", "n0"), hellos("p0", "p0", "d0")
    visible = ["0", "1", "2", "3"]
    shown = [
        gpus_to_show(gpus_of_engine(hello, world, job(), visible), hello, world, visible)
        for world in (together, apart)
        for hello in world[1:]
    ]
    assert shown == [["0", "1", "2", "3"], ["2", "3", "0", "1"], ["0", "1"], ["0", "1"]]
    assert gpus_to_show([], together[1], together, visible) == []


def test_too_few_gpus_are_named() -> None:
    world = hellos("p0", "p0", "p0", "d0")
    with pytest.raises(
        JobError, match=r"host p0 has 2 GPU.*need 4: prefill-1 \(2\), prefill-2 \(2\)"
    ):
        gpus_of_engine(world[1], world, job(), ["0", "1"])


def test_engines_of_two_tp_sizes_share_a_host() -> None:
    world = hellos("n0", "n0", "n0")
    world[2] = EngineHello("decode-2", "decode", "n0", 2, 1)
    found = [gpus_of_engine(hello, world, job(), ["0", "1", "2"]) for hello in world[1:]]
    assert found == [["0", "1"], ["2"]]


def test_no_choice_without_gpus_or_where_the_job_chooses() -> None:
    world = hellos("p0", "p0", "p0", "d0")
    assert gpus_of_engine(world[1], world, job(), []) == []
    assert gpus_of_engine(world[1], world, job(env={VARIABLE: "0"}), ["0"]) == []


def test_visible(tmp_path: Path) -> None:
    assert visible_gpus({VARIABLE: "GPU-a, GPU-b"}) == ["GPU-a", "GPU-b"]
    assert visible_gpus({VARIABLE: ""}, tmp_path) == []
    assert visible_gpus({FIRST_NODE_VARIABLE: "0,1"}) == ["0", "1"]
    assert visible_gpus({}, NOWHERE) == []
    for name in ("0000:3b:00.0", "0000:5e:00.0"):
        (tmp_path / name).mkdir()
    assert visible_gpus({}, tmp_path) == ["0", "1"]

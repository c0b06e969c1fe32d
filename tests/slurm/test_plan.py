# SPDX-License-Identifier: Apache-2.0
"""From a job to the components that Slurm is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rdma_kv_cache.config import JobConfig, JobError, load_job
from rdma_kv_cache.slurm.plan import gpus_in, plan
from rdma_kv_cache.slurm.time_limit import seconds

if TYPE_CHECKING:
    from collections.abc import Iterable

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def job(**sections: dict[str, Any]) -> JobConfig:
    return JobConfig.model_validate({"model": {"name": "org/model"}, **sections})


def problems(config: JobConfig) -> Iterable[str]:
    with pytest.raises(JobError) as caught:
        plan(config)
    return [str(problem) for problem in caught.value.problems]


def test_two_components_and_their_ranks() -> None:
    components = plan(
        job(
            prefill={"engines": 4, "nodes": 2, "constraint": "a100", "gres": "gpu:2"},
            decode={"engines": 3, "nodes": 3, "constraint": "h100"},
        )
    )
    prefill, decode = components
    assert (prefill.role, prefill.nodes, prefill.tasks) == ("prefill", 2, 5)
    assert (prefill.tasks_per_node, prefill.constraint, prefill.gres) == (3, "a100", "gpu:2")
    assert (decode.role, decode.nodes, decode.tasks, decode.tasks_per_node) == ("decode", 3, 3, 1)
    assert (decode.constraint, decode.gres) == ("h100", None)


def test_one_component() -> None:
    sections: dict[str, Any] = {
        "prefill": {"engines": 2, "gres": "gpu:4"},
        "decode": {"engines": 2},
    }
    (both,) = plan(job(**sections, slurm={"one_component": True}))
    assert (both.role, both.nodes, both.tasks, both.gres) == ("any", 2, 5, "gpu:4")
    (one,) = plan(job(**sections, slurm={"one_component": True, "nodes": 1}))
    assert (one.nodes, one.tasks_per_node) == (1, 5)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"prefill": {"nodes": 2}}, "prefill.nodes = 2: are more nodes than the 1 engine(s)"),
        (
            {"decode": {"engines": 4, "nodes": 2, "gres": "gpu:a100:1"}},
            "decode.gres = 'gpu:a100:1': gives a node 1 GPU(s), but up to 2 engine(s) of 1 GPU(s)",
        ),
        (
            {"model": {"name": "m", "tensor_parallel_size": 4}, "prefill": {"gres": "gpu:2"}},
            "but up to 1 engine(s) of 4 GPU(s)",
        ),
        ({"slurm": {"nodes": 2}}, "slurm.nodes = 2: is only for a job of one component"),
        (
            {
                "slurm": {"one_component": True},
                "prefill": {"constraint": "a"},
                "decode": {"constraint": "b"},
            },
            "decode.constraint = 'b': differs from prefill.constraint = 'a'",
        ),
        ({"slurm": {"time": "5"}}, "slurm.signal_s = 300: is not shorter than slurm.time = '5'"),
    ],
)
def test_what_cannot_work_is_told_before_it_queues(
    sections: dict[str, dict[str, Any]], words: str
) -> None:
    (line,) = problems(job(**sections))
    assert words in line
    assert line.endswith(".")


def test_the_orchestrator_needs_no_gpu() -> None:
    # Nine ranks on four nodes: 3, 2, 2 and 2, and the first of them is the orchestrator.
    assert plan(job(prefill={"engines": 8, "nodes": 4, "gres": "gpu:2"}))[0].tasks_per_node == 3


def test_engines_that_choose_their_gpu_may_share_it() -> None:
    shared = {"engines": 2, "gres": "gpu:1", "env": {"CUDA_VISIBLE_DEVICES": "0"}}
    assert plan(job(decode=shared))[1].tasks == 2


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_job_files_of_the_repository_fit(path: Path) -> None:
    assert len(plan(load_job(path, {"MODEL_NAME": "org/model"}))) == 2


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        (None, None),
        ("", None),
        ("nvme:1", None),
        ("gpu", 1),
        ("gpu:4", 4),
        ("gpu:a100", 1),
        ("gpu:a100:4", 4),
        ("gpu:a100:2,gpu:v100:1,nvme", 3),
        ("gres/gpu:2", 2),
        ("gpu:a100:2(S:0-1)", 2),
    ],
)
def test_gpus_in_a_gres(gres: str | None, count: int | None) -> None:
    assert gpus_in(gres) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-1", 176400), ("1-0:30", 88200),
     ("1-02:03:04", 93784)],
)  # fmt: skip
def test_time_limits(text: str, count: int) -> None:
    assert seconds(text) == count

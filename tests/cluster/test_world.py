# SPDX-License-Identifier: Apache-2.0
"""Real MPI worlds of small programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdma_kv_cache.cluster.world import LOOPBACK, address_towards
from tests.cluster.conftest import make_job

if TYPE_CHECKING:
    from tests.cluster.conftest import Mpi


def test_all_ranks_meet_and_exchange_bytes(mpi: Mpi) -> None:
    ranks = mpi.run(make_job(prefill={"engines": 1}, decode={"engines": 2}), 4, "exchange")
    assert [ranks[rank]["engine"] for rank in range(4)] == [
        "orchestrator",
        "prefill-0",
        "decode-0",
        "decode-1",
    ]
    assert [ranks[rank]["role"] for rank in range(4)] == [
        "orchestrator",
        "prefill",
        "decode",
        "decode",
    ]
    for name in ("url", "secret", "incarnations"):
        assert len({str(ranks[rank][name]) for rank in range(4)}) == 1
    assert len(bytes.fromhex(ranks[0]["secret"])) == 32
    assert ranks[0]["url"] == "http://127.0.0.1:1234"
    assert len(set(ranks[0]["incarnations"])) == 4
    assert ranks[0]["peers"] == []
    assert ranks[1]["peers"] == ["decode-0", "decode-1"]
    assert ranks[3]["peers"] == ["prefill-0"]
    assert ranks[2]["host"] == LOOPBACK
    # Rank r sends 1 + 1000 r copies of "from>to" to each engine.
    assert ranks[0]["received"] == {}
    received = {name: length for name, (length, _) in ranks[3]["received"].items()}
    assert received == {
        "orchestrator": len("orchestrator>decode-1"),
        "prefill-0": 1001 * len("prefill-0>decode-1"),
        "decode-0": 2001 * len("decode-0>decode-1"),
    }
    assert ranks[3]["received"]["decode-0"][1].startswith("decode-0>decode-1decode-0>")


def test_another_world_size_is_refused_by_every_rank(mpi: Mpi) -> None:
    ranks = mpi.run(make_job(), 2, "exchange")
    assert sorted(ranks) == [0, 1]
    for result in ranks.values():
        assert "2 rank(s), but the job file needs 3" in result["job_error"]
        assert "1 orchestrator + 1 prefill + 1 decode" in result["job_error"]
        assert "each process is a world of its own" not in result["job_error"]


def test_a_world_of_one_rank_names_the_wrong_launcher(mpi: Mpi) -> None:
    ranks = mpi.run(make_job(), 1, "exchange", launch=False)
    assert "each process is a world of its own" in ranks[0]["job_error"]
    assert "mpiexec beside this python" in ranks[0]["job_error"]
    assert "srun --mpi" in ranks[0]["job_error"]


def test_ranks_with_different_job_files_are_refused(mpi: Mpi) -> None:
    ranks = mpi.run(make_job(), 3, "other_tp")
    assert "rank 2 is (engine, role, TP size) ('decode-0', 'decode', 2)" in ranks[0]["job_error"]
    assert "different job files" in ranks[1]["job_error"]


def test_a_rank_killed_after_the_barrier_leaves_the_others_alive(mpi: Mpi) -> None:
    ranks = mpi.run(make_job(), 3, "die_after_barrier")
    assert sorted(ranks) == [0, 2]


def test_a_missing_rank_is_an_error_after_the_time_limit(mpi: Mpi) -> None:
    ranks = mpi.run(make_job(), 3, "one_rank_missing")
    for rank in (0, 2):
        assert "barrier before READY: not all 3 ranks came within 0.5 s" in ranks[rank]["error"]
        assert 0.4 < ranks[rank]["took_s"] < 2
        # The wait sleeps: it must leave the cores to the engines that are starting.
        assert ranks[rank]["cpu_s"] < 0.3 * ranks[rank]["took_s"]


def test_a_waiting_rank_can_be_told_to_stop(mpi: Mpi) -> None:
    ranks = mpi.run(make_job(), 3, "cancelled")
    for rank in (0, 2):
        assert "this rank is stopping" in ranks[rank]["error"]
        assert 0.2 < ranks[rank]["took_s"] < 1.5


def test_address_towards_a_host() -> None:
    assert address_towards("127.0.0.1") == LOOPBACK

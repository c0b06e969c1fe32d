# SPDX-License-Identifier: Apache-2.0
"""The policies as pure functions."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rdma_kv_cache.orchestrator.policy import POLICIES, least_loaded, round_robin

LOADS = st.lists(st.integers(0, 100), min_size=1, max_size=20)


@given(LOADS)
def test_round_robin_is_even(loads: list[int]) -> None:
    taken = Counter(round_robin(loads, turn) for turn in range(3 * len(loads)))
    assert taken == dict.fromkeys(range(len(loads)), 3)


@given(LOADS, st.integers(0, 1000))
def test_least_loaded_takes_a_lowest(loads: list[int], turn: int) -> None:
    assert loads[least_loaded(loads, turn)] == min(loads)


def test_least_loaded_breaks_ties_in_turn() -> None:
    assert [least_loaded([1, 0, 0, 2], turn) for turn in range(4)] == [1, 2, 1, 2]


def test_every_policy_of_the_job_file_exists() -> None:
    assert set(POLICIES) == {"round_robin", "least_loaded"}

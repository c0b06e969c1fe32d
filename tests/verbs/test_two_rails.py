# SPDX-License-Identifier: Apache-2.0
"""Transfers between two guests with two RoCE devices each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.verbs.exchange import exchange_pages, exchange_signals
from tests.verbs.lab import PEER_TIMEOUT_S, Lab, LabNode, connect
from tests.verbs.stage import SLACK_S

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.verbs, pytest.mark.timeout(300)]

BOTH = "rxe0,rxe1"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, rails=2) as lab:
        yield lab


def make_pair(lab: Lab, near_devices: str, far_devices: str) -> tuple[LabNode, LabNode]:
    near = lab.start(0, devices=near_devices)
    far = lab.start(1, devices=far_devices)
    connect(near, far)
    return near, far


def bytes_by_rail(node: LabNode) -> list[int]:
    stats = node.call("stats")
    return [stats[f"bytes_posted_rxe{rail}:1"] for rail in range(2)]


def test_both_rails_share_the_bytes(lab: Lab) -> None:
    pair = make_pair(lab, BOTH, BOTH)
    for seed in range(2):
        exchange_pages(*pair, seed)
    exchange_signals(*pair)
    for node in pair:
        posted = bytes_by_rail(node)
        assert min(posted) > 0.3 * sum(posted), posted
        text = node.call("description")
        assert "rxe0:1" in text
        assert "rxe1:1" in text
        node.end()


def test_a_rail_that_the_peer_lacks_stays_idle(lab: Lab) -> None:
    near, far = make_pair(lab, BOTH, "rxe1")
    exchange_pages(near, far, 7)
    assert bytes_by_rail(near)[0] == 0
    near.end()
    far.end()


def test_auto_leaves_the_second_of_equal_rails_to_others(lab: Lab) -> None:
    node = lab.start(0, devices="auto")
    assert "not used: rxe1:1 is as near, and left to others" in node.call("description")
    node.end()


def test_one_cut_rail_loses_the_peer_and_is_named(lab: Lab) -> None:
    near, far = make_pair(lab, BOTH, BOTH)
    lab.guests.link(1, on=False, rail=1)
    lost = near.call("next_event", "PEER_LOST", PEER_TIMEOUT_S + SLACK_S)
    assert "rxe1:1" in lost.reason
    # The control connection is on the other rail, and tells the peer at once.
    assert "rxe1:1" in far.call("next_event", "PEER_LOST").reason
    lab.guests.link(1, on=True, rail=1)
    near.end()
    far.end()

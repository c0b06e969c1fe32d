# SPDX-License-Identifier: Apache-2.0
"""Transfers between two guests."""

from __future__ import annotations

import itertools
import re
import time
from typing import TYPE_CHECKING

import pytest

from tests.verbs.exchange import exchange_pages, exchange_signals
from tests.verbs.lab import Lab, LabNode, connect

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.verbs, pytest.mark.timeout(300)]

LOSSY_S = 60.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2) as lab:
        yield lab


@pytest.fixture(scope="module")
def pair(lab: Lab) -> tuple[LabNode, LabNode]:
    near, far = lab.start(0), lab.start(1)
    connect(near, far)
    return near, far


def test_scattered_pages_both_ways(pair: tuple[LabNode, LabNode]) -> None:
    for seed in range(3):
        exchange_pages(*pair, seed)


def test_signals_keep_their_order(pair: tuple[LabNode, LabNode]) -> None:
    exchange_signals(*pair)


def test_what_it_uses_and_why_is_told(pair: tuple[LabNode, LabNode]) -> None:
    text = pair[1].call("description")
    assert re.fullmatch(
        r"rxe0:1 \(Ethernet, [\d.]+ Gb/s, software\): near is not set; "
        r"GID 1 = ::ffff:10\.77\.0\.2 \(RoCE v2.*\)",
        text,
    ), text


def test_lost_packets_are_repaired(lab: Lab, pair: tuple[LabNode, LabNode]) -> None:
    for guest in range(2):
        lab.ask(guest, "shell", "tc qdisc replace dev eth0 root netem loss 0.1%")
    deadline = time.monotonic() + LOSSY_S
    for seed in itertools.count(100):
        exchange_pages(*pair, seed)
        if all(dropped(lab, guest) > 0 for guest in range(2)):
            return
        assert time.monotonic() < deadline, "netem dropped nothing"


def dropped(lab: Lab, guest: int) -> int:
    """Packets that netem has dropped."""
    match = re.search(r"dropped (\d+)", lab.ask(guest, "shell", "tc -s qdisc show dev eth0"))
    assert match is not None
    return int(match[1])

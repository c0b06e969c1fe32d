# SPDX-License-Identifier: Apache-2.0
"""Transfers of scattered pages between two nodes in both directions, verified."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from tests.verbs.lab import BUFFER_BYTES

if TYPE_CHECKING:
    from tests.verbs.lab import LabNode

PAGE_BYTES = 4096
HALF = BUFFER_BYTES // 2


def exchange_pages(near: LabNode, far: LabNode, seed: int) -> None:
    """Both write the pages of their lower half, shuffled, into the other's upper half at once."""
    nodes = (near, far)
    source = random.Random(seed)
    pages = list(range(0, HALF, PAGE_BYTES))
    sent = [np.frombuffer(source.randbytes(HALF), np.uint8) for _ in nodes]
    targets = [source.sample(pages, len(pages)) for _ in nodes]
    for node, data in zip(nodes, sent, strict=True):
        node.call("load", 0, data.tobytes())
    for node, target in zip(nodes, targets, strict=True):
        node.call("write", pages, [HALF + at for at in target], [PAGE_BYTES] * len(pages))
        node.call("signal", seed)
    for node, data, target in zip(nodes, sent[::-1], targets[::-1], strict=True):
        assert node.call("next_event", "IMM").imm == seed
        expected = np.empty(HALF, np.uint8)
        for page, at in zip(pages, target, strict=True):
            expected[at : at + PAGE_BYTES] = data[page : page + PAGE_BYTES]
        assert node.call("dump", HALF, HALF) == expected.tobytes()
    for node in nodes:
        node.call("next_event", "TRANSFER_DONE")


def exchange_signals(near: LabNode, far: LabNode, count: int = 20) -> None:
    """Small writes with a signal each; their order is the order in which they arrive."""
    for imm in range(count):
        near.call("write", [imm], [imm], [PAGE_BYTES])
        near.call("signal", imm)
    assert [far.call("next_event", "IMM").imm for _ in range(count)] == list(range(count))

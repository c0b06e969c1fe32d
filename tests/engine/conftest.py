# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.node import Node, RemoteNode, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUFFER_BYTES = 8 << 20

Pair = tuple[Node, RemoteNode]


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    """Connected engines in two processes; keywords go to both configurations."""
    nodes: list[Pair] = []

    def make(nbytes: int = BUFFER_BYTES, *, connected: bool = True, **config: Any) -> Pair:
        pair = Node(11, nbytes, **config), RemoteNode(22, nbytes, **config)
        nodes.append(pair)
        if connected:
            connect(*pair)
        return pair

    yield make
    for near, far in nodes:
        far.kill()
        near.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Connected engines for tests that only transfer."""
    near, far = Node(11, BUFFER_BYTES), RemoteNode(22, BUFFER_BYTES)
    connect(near, far)
    yield near, far
    far.kill()
    near.close()

# SPDX-License-Identifier: Apache-2.0
"""Every wrong argument is refused with a text that names it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rdma_kv_cache._native import Engine, EngineConfig, probe_backends
from tests.engine.node import BACKEND, Node, make_config

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node(11, 4096)
    yield node
    node.close()


@pytest.fixture(scope="module")
def other() -> Iterator[Node]:
    other = Node(22, 4096)
    yield other
    other.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0), ("block_size", 1 << 30), ("queue_depth", 0), ("qps_per_peer", 17),
        ("qps_per_peer", -1), ("peer_timeout_s", 0.0), ("peer_timeout_s", float("nan")),
        ("connect_timeout_s", -1.0), ("spin_us", -2), ("bind_host", "0.0.0.0"), ("bind_host", ""),
        ("gid_index", 256), ("traffic_class", 256), ("service_level", 16), ("progress_cpu", -2),
    ],
)  # fmt: skip
def test_config_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        EngineConfig(**{field: value})


def test_unknown_and_unusable_backends() -> None:
    with pytest.raises(ValueError, match="must be one of auto, verbs, cuda_ipc, tcp"):
        Engine(EngineConfig(backend="carrier-pigeon"), 1)
    for backend in probe_backends():
        if backend.usable:
            engine = Engine(EngineConfig(backend=backend.name), 1)
            assert engine.backend == backend.name
            engine.close()
        else:
            with pytest.raises(RuntimeError, match=re.escape(backend.reason)):
                Engine(EngineConfig(backend=backend.name), 1)


def test_engine_arguments() -> None:
    with pytest.raises(ValueError, match="incarnation is 0"):
        Engine(make_config(), 0)
    with pytest.raises(RuntimeError, match="bind_host"):
        Engine(make_config(bind_host="203.0.113.1"), 1)


def test_memory_arguments(node: Node) -> None:
    for ptr, nbytes in [(0, 10), (4096, 0), (2**64 - 1, 2)]:
        with pytest.raises(ValueError, match="is no memory"):
            node.engine.register_memory(ptr, nbytes)
    # tcp has no use for it; verbs asks the driver, and then what is at this address.
    no_gpu_memory = "host memory only|install the NVIDIA driver|not the address of GPU memory"
    with pytest.raises((ValueError, RuntimeError), match=no_gpu_memory):
        node.engine.register_memory(node.base, 10, kind="cuda")


def test_descriptors_are_read_before_anything_is_sent(node: Node, other: Node) -> None:
    good = other.endpoint.descriptor
    memory = other.memory.descriptor
    for endpoint, regions, reason in [
        (b"", [], "descriptor is truncated at its magic"),
        (good[:-1], [], "descriptor is truncated at its backend part"),
        (good[: 4 + 2 + 2 + len(BACKEND) + 8 + 4], [], "truncated at its token"),
        (good + b"x", [], "1 bytes too long"),
        (b"HTTP" + good[4:], [], "not an endpoint descriptor"),
        (good[:4] + b"\x09\x00" + good[6:], [], "version 9; this engine speaks version 1"),
        (good.replace(BACKEND.encode(), b"x" * len(BACKEND), 1), [], "backend 'x+'"),
        (node.endpoint.descriptor, [], "this endpoint's own"),
        (good, [memory, memory[:-1]], "memory descriptor 1 is truncated"),
        (good, [good], "memory descriptor 0 is not a memory descriptor"),
        (good, [node.memory.descriptor], "incarnation 11, the endpoint of incarnation 22"),
    ]:
        with pytest.raises(ValueError, match=reason):
            node.engine.connect(node.endpoint.peer, endpoint, regions)
    with pytest.raises(ValueError, match="no peer 999"):
        node.engine.connect(999, good, [memory])


def test_write_needs_connect(node: Node) -> None:
    with pytest.raises(RuntimeError, match=r"connect\(\) was not called"):
        node.write([0], [0], [1])
    with pytest.raises(RuntimeError, match=r"connect\(\) was not called"):
        node.signal(1)


def test_write_arguments(node: Node, other: Node) -> None:
    peer = node.engine.create_endpoint("arguments").peer
    invitation = other.invite()
    node.engine.connect(peer, invitation.endpoint, invitation.memory)

    def write(src: list[int], dst: list[int], nbytes: list[int]) -> int:
        columns = [np.array(column, np.int64) for column in (src, dst, nbytes)]
        return node.engine.write(peer, *columns)

    ours, theirs = node.base, other.base
    for row, reason in [
        (([ours], [theirs], []), "1, 1 and 0 rows"),
        (([ours, ours], [theirs, theirs], [1, -5]), "row 1: nbytes is -5"),
        (([ours, ours + 4090], [theirs] * 2, [1, 7]), "row 1: local range"),
        (([ours, ours - 1], [theirs] * 2, [1, 7]), "row 1: local range"),
        (([ours, ours], [theirs, theirs + 4090], [1, 7]), "row 1: remote range"),
        (([ours], [-8], [16]), "row 0: remote range"),
    ]:
        with pytest.raises(ValueError, match=reason):
            write(*row)
    with pytest.raises(TypeError):
        node.engine.write(peer, *([np.array([0.5])] * 3))
    with pytest.raises(ValueError, match="src has 2 dimensions"):
        node.engine.write(peer, *([np.zeros((1, 1), np.int64)] * 3))
    with pytest.raises(ValueError, match="timeout_s"):
        node.engine.wait(-1)

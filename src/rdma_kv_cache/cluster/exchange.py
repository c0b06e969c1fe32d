# SPDX-License-Identifier: Apache-2.0
"""Bundles as signed bytes for the MPI exchange, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdma_kv_cache.protocol.bootstrap import Bundles
from rdma_kv_cache.protocol.codec import ProtocolError, sign, verify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rdma_kv_cache.cluster.links import Links
    from rdma_kv_cache.protocol.bootstrap import Bundle


def pack(links: Links, secret: bytes) -> dict[str, bytes]:
    """Return for each peer engine all that this engine's workers offer it, signed."""
    return {engine: sign(Bundles(links.offers(engine)), secret) for engine in links.peers}


def unpack(incoming: Mapping[str, bytes], secret: bytes) -> list[Bundle]:
    """Return all bundles of `incoming` (engine -> signed bytes).

    Raises ProtocolError naming the engine on bytes of another job or bundles of another engine.
    """
    received = []
    for engine, data in incoming.items():
        try:
            bundles: Bundles = verify(data, secret, Bundles)
        except ProtocolError as error:
            raise ProtocolError(f"endpoints of {engine}: {error}") from error
        for bundle in bundles.bundles:
            if bundle.sender.engine != engine:
                raise ProtocolError(f"{engine} sent a bundle of {bundle.sender}")
        received += bundles.bundles
    return received

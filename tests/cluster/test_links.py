# SPDX-License-Identifier: Apache-2.0
"""Peers, bundles and pair states of one engine; the signed form of its bundles."""

from __future__ import annotations

import pytest

from rdma_kv_cache.cluster.exchange import pack, unpack
from rdma_kv_cache.cluster.links import Links
from rdma_kv_cache.protocol.bootstrap import (
    Bundle,
    Bundles,
    EngineHello,
    PathInfo,
    PeerDown,
    PeerState,
    PeerUp,
    WorkerId,
)
from rdma_kv_cache.protocol.codec import ProtocolError, sign

SECRET = b"s" * 32
ME = EngineHello("prefill-0", "prefill", "host", 10, 2)
PEER = EngineHello("decode-0", "decode", "host", 20, 2)
REBORN = EngineHello("decode-0", "decode", "host", 21, 2)
OTHER = EngineHello("decode-1", "decode", "host", 30, 1)
MINE = [WorkerId("prefill-0", rank, 10) for rank in range(2)]
THEIRS = [WorkerId("decode-0", rank, 20) for rank in range(2)]


def offer_all(links: Links, peer: EngineHello) -> None:
    for mine, theirs in links.pairs(peer):
        assert links.offer(Bundle(mine, theirs, b"x"))


def test_offers_are_complete_when_every_pair_has_one() -> None:
    links = Links(ME, [PEER, OTHER])
    offer_all(links, PEER)
    assert not links.has_all_offers()
    offer_all(links, OTHER)
    assert links.has_all_offers()
    assert len(links.offers("decode-0")) == 4
    assert len(links.offers("decode-1")) == 2


def test_bundles_of_other_lives_are_dropped() -> None:
    links = Links(ME, [PEER])
    assert not links.offer(Bundle(MINE[0], WorkerId("decode-0", 0, 19), b"old peer"))
    assert not links.offer(Bundle(MINE[0], WorkerId("decode-0", 2, 20), b"no such TP rank"))
    assert not links.offer(Bundle(MINE[0], WorkerId("decode-9", 0, 20), b"unknown"))
    assert not links.receive(Bundle(THEIRS[0], WorkerId("prefill-0", 0, 9), b"for an old life"))
    assert not links.receive(Bundle(WorkerId("decode-0", 0, 19), MINE[0], b"of an old life"))
    assert links.receive(Bundle(THEIRS[0], MINE[0], b"good"))
    assert links.greeting(MINE[0]) == [
        PeerUp("decode-0", 20, 2),
        Bundle(THEIRS[0], MINE[0], b"good"),
    ]
    assert links.greeting(MINE[1]) == [PeerUp("decode-0", 20, 2)]


def test_paths_name_each_peer_engine_and_the_worst_of_its_pairs() -> None:
    links = Links(ME, [PEER, OTHER])
    fast = PathInfo("cuda_ipc", "cuda_ipc: same GPU")
    slow = PathInfo("tcp", "tcp: 127.0.0.1", "no peer access")
    links.report(PeerState(MINE[0], THEIRS[0], True, path=fast), 0.0)
    links.report(PeerState(MINE[0], THEIRS[1], True, path=slow), 0.0)
    links.report(PeerState(MINE[1], THEIRS[1], True, path=fast), 0.0)
    assert links.paths() == {"decode-0": slow}
    links.report(PeerState(MINE[0], THEIRS[1], False, "lost"), 1.0)
    assert links.paths() == {"decode-0": fast}


def test_a_newer_bundle_of_a_pair_replaces_the_older() -> None:
    links = Links(ME, [PEER])
    links.receive(Bundle(THEIRS[0], MINE[0], b"first"))
    links.receive(Bundle(THEIRS[0], MINE[0], b"second"))
    assert links.greeting(MINE[0])[1:] == [Bundle(THEIRS[0], MINE[0], b"second")]


def test_a_peer_that_comes_back_starts_anew() -> None:
    links = Links(ME, [PEER])
    offer_all(links, PEER)
    for pair in links.pairs(PEER):
        links.report(PeerState(*pair, connected=True), 0)
    assert links.is_complete()
    assert links.peer_up(PEER) == []
    assert links.peer_up(REBORN) == [PeerUp("decode-0", 21, 2)]
    assert not links.is_complete()
    assert links.offers("decode-0") == []
    assert links.peer_down("decode-0", 20, "late word of the old life") == []
    assert links.peer_down("decode-0", 21, "gone") == [PeerDown("decode-0", 21, "gone")]
    assert links.is_complete()  # nobody to be connected to
    assert links.greeting(MINE[0]) == []


def test_connected_counts_engines_with_all_their_pairs() -> None:
    links = Links(ME, [PEER, OTHER])
    pairs = links.pairs(PEER)
    for pair in pairs[:-1]:
        links.report(PeerState(*pair, connected=True), 0)
    assert links.connected() == 0
    links.report(PeerState(*pairs[-1], connected=True), 0)
    assert links.connected() == 1
    assert "prefill-0/1 - decode-1/0: nothing heard" in links.describe_missing()
    links.report(PeerState(*pairs[0], connected=False, reason="reset"), 0)
    assert links.connected() == 0


def test_a_pair_that_stays_down_is_a_failure() -> None:
    links = Links(ME, [PEER])
    pair = links.pairs(PEER)[0]
    links.report(PeerState(*pair, connected=False, reason="incompatible: dtype"), 100.0)
    links.report(PeerState(*pair, connected=False, reason="incompatible: dtype"), 105.0)
    assert links.failure(109.9, 10) is None
    assert links.failure(110, 10) == "prefill-0/0 cannot reach decode-0/0: incompatible: dtype"
    links.report(PeerState(*pair, connected=True), 111.0)
    assert links.failure(1000, 10) is None


def test_bundles_travel_signed() -> None:
    links = Links(ME, [PEER, OTHER])
    offer_all(links, PEER)
    offer_all(links, OTHER)
    packed = pack(links, SECRET)
    assert sorted(packed) == ["decode-0", "decode-1"]
    assert unpack({"prefill-0": packed["decode-0"]}, SECRET) == links.offers("decode-0")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (sign(Bundles([]), b"another secret"), "wrong signature"),
        (b"", "truncated"),
        (b"\x01" + bytes(200), "wrong signature"),
        (b"\x07" + sign(Bundles([]), SECRET)[1:], "protocol version 7"),
        (sign(ME, SECRET), "not a message"),
        (sign(Bundles([Bundle(THEIRS[0], MINE[0], b"")]), SECRET), "sent a bundle of decode-0/0"),
    ],
)
def test_other_bytes_are_refused_naming_the_engine(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words) as error:
        unpack({"decode-1": data}, SECRET)
    assert "decode-1" in str(error.value)

# SPDX-License-Identifier: Apache-2.0
"""Signed messages: what was not signed with this secret, in this version, is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdma_kv_cache.protocol.bootstrap import Bundle, Bundles, EngineHello, WorkerId
from rdma_kv_cache.protocol.codec import (
    MAX_FRAME_BYTES,
    FrameReader,
    ProtocolError,
    decode,
    encode,
    frame,
    sign,
    verify,
)
from rdma_kv_cache.protocol.control import ToHub

SECRET = bytes(range(32))
HELLO = EngineHello("prefill-0", "prefill", "node1", 2**64 - 1, 8)


def test_round_trip() -> None:
    bundle = Bundle(WorkerId("a", 0, 1), WorkerId("b", 1, 2**64 - 1), b"\x00\xff")
    message = Bundles([bundle])
    assert verify(sign(message, SECRET), SECRET, Bundles) == message
    assert verify(sign(HELLO, SECRET), SECRET, EngineHello) == HELLO


@given(st.integers(0, len(sign(HELLO, SECRET)) - 1))
def test_truncated(length: int) -> None:
    with pytest.raises(ProtocolError):
        verify(sign(HELLO, SECRET)[:length], SECRET, EngineHello)


@given(st.integers(0, len(sign(HELLO, SECRET)) * 8 - 1))
def test_any_flipped_bit(bit: int) -> None:
    data = bytearray(sign(HELLO, SECRET))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        verify(bytes(data), SECRET, EngineHello)


def test_wrong_secret_and_wrong_version() -> None:
    with pytest.raises(ProtocolError, match="not signed with this job's secret"):
        verify(sign(HELLO, b"x" * 32), SECRET, EngineHello)
    with pytest.raises(ProtocolError, match="protocol version 9, expected 1"):
        verify(b"\x09" + sign(HELLO, SECRET)[1:], SECRET, EngineHello)


def test_another_message_under_a_right_signature() -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        verify(sign(HELLO, SECRET), SECRET, ToHub)


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        verify(data, SECRET, EngineHello)
    with pytest.raises(ProtocolError):
        decode(data, EngineHello)


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(1, 7))
def test_frames_survive_any_cut(bodies: list[bytes], step: int) -> None:
    stream = b"".join(map(frame, bodies))
    reader, found = FrameReader(), list[bytes]()
    for start in range(0, len(stream), step):
        found += reader.feed(stream[start : start + step])
    assert found == bodies


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="the limit is"):
        list(FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little")))


def test_encoding_has_no_pickle() -> None:
    assert b"rdma_kv_cache" not in encode(HELLO)

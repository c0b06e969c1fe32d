# SPDX-License-Identifier: Apache-2.0
"""Encoding, signing and framing of messages.

A signed message is `version (1 byte) + HMAC-SHA256 (32 bytes) + msgpack body`; the MAC covers the
version and the body. A frame is a 4-byte little-endian length and that many bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOCOL_VERSION = 1
MAC_BYTES = 32
MAX_FRAME_BYTES = 64 << 20

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_T = TypeVar("_T")


class ProtocolError(ValueError):
    """Bytes that are not a message of this job: truncated, wrong secret, version or shape."""


def encode(message: msgspec.Struct) -> bytes:
    """Return the msgpack bytes of `message`."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview, kind: type[_T] | Any) -> _T:
    """Decode msgpack `data` as `kind` (a Struct or a union of tagged Structs).

    Raises ProtocolError if the bytes are not such a message.
    """
    try:
        message: _T = msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from error
    return message


def sign(message: msgspec.Struct, secret: bytes) -> bytes:
    """Return `message` encoded and signed with the job secret."""
    signed = bytes([PROTOCOL_VERSION]) + encode(message)
    mac = hmac.digest(secret, signed, hashlib.sha256)
    return signed[:1] + mac + signed[1:]


def verify(data: bytes, secret: bytes, kind: type[_T] | Any) -> _T:
    """Check version and signature of `data`, then decode it as `kind`. Raises ProtocolError."""
    if len(data) <= 1 + MAC_BYTES:
        raise ProtocolError(f"truncated message: {len(data)} bytes")
    if data[0] != PROTOCOL_VERSION:
        raise ProtocolError(
            f"protocol version {data[0]}, expected {PROTOCOL_VERSION}: "
            "the peers run different releases of rdma-kv-cache"
        )
    mac = hmac.digest(secret, data[:1] + data[1 + MAC_BYTES :], hashlib.sha256)
    if not hmac.compare_digest(mac, data[1 : 1 + MAC_BYTES]):
        raise ProtocolError("wrong signature: the message was not signed with this job's secret")
    message: _T = decode(data[1 + MAC_BYTES :], kind)
    return message


def engine_api_key(secret: bytes) -> str:
    """Return the bearer key of the job's vLLM servers, which only ranks of this job can derive."""
    return hmac.digest(secret, b"engine-http", hashlib.sha256).hex()


def frame(data: bytes) -> bytes:
    """Return `data` with its length in front, for a byte stream."""
    return _LENGTH.pack(len(data)) + data


class FrameReader:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take in stream bytes and yield every frame that is now complete.

        Raises ProtocolError on a length above MAX_FRAME_BYTES; the stream is unusable then.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"frame of {length} bytes, the limit is {MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body

# SPDX-License-Identifier: Apache-2.0
"""Messages between a prefill worker and a decode worker, and what they tell each other first.

REGISTER, CANCEL, RELEASE and RENEW go from decode to prefill; REFUSED, CANCELLED and CHECKSUMS come
back. The end of a transfer is no message: it is the immediate value `epoch`, signalled after the
last write.
"""

from __future__ import annotations

from typing import Union

import msgspec

PROBE_IMM = 0
"""Immediate value of the probe write; epochs begin at 1."""


class RemoteLayer(msgspec.Struct, frozen=True, array_like=True):
    """Where a layer's pages are in the peer: block b starts at `base + b * block_stride`.

    The page holds `heads` of the layer's `kv_heads` KV heads, each as one run if `head_major`.
    """

    name: str
    base: int
    block_stride: int
    page_bytes: int
    heads: int = 0
    kv_heads: int = 0
    head_major: bool = False


class Hello(msgspec.Struct, frozen=True):
    """Payload of a bootstrap Bundle.

    `attempt` counts reconnections of the same two incarnations; the higher one wins.
    `probe_address` is PROBE_BYTES of memory that the peer may write once to prove the path.
    """

    endpoint: bytes
    memory: list[bytes]
    compatibility: dict[str, str]
    layers: list[RemoteLayer]
    probe_address: int
    tp_size: int = 1
    attempt: int = 0


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Checksum of what the probe write carries."""

    checksum: int


class ProbeResult(msgspec.Struct, frozen=True, tag="probe_result"):
    """Whether the probe write arrived as it was sent."""

    ok: bool


class Register(msgspec.Struct, frozen=True, tag="register"):
    """Decode has blocks for the last pages of this prompt; write them, then signal `epoch`."""

    transfer_id: str
    epoch: int
    prompt_tokens: int
    block_ids: list[list[int]]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop writing for `epoch`; answer CANCELLED when nothing is in flight any more."""

    transfer_id: str
    epoch: int


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Decode needs nothing of this transfer."""

    transfer_id: str


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """These transfers will still be asked for: extend their leases."""

    transfer_ids: list[str]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """No KV will come for `epoch`, and nothing is in flight for it."""

    epoch: int
    reason: str


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """Nothing is in flight for `epoch` and nothing will be."""

    epoch: int


class Checksums(msgspec.Struct, frozen=True, tag="checksums"):
    """Checksums of pages as read at the source.

    `addresses`, `sizes`: int64, `sums`: uint64, all little-endian arrays of one length; addresses
    are those of the receiver. `total_pages` is 0 except in the transfer's last such message.
    """

    epoch: int
    addresses: bytes
    sizes: bytes
    sums: bytes
    total_pages: int = 0


ToProducer = Union[Register, Cancel, Release, Renew]  # noqa: UP007 - evaluated at run time on 3.10
ToConsumer = Union[Refused, Cancelled, Checksums]  # noqa: UP007
PeerMessage = Union[  # noqa: UP007
    Register, Cancel, Release, Renew, Refused, Cancelled, Checksums, Probe, ProbeResult
]

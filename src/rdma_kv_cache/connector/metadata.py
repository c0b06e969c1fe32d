# SPDX-License-Identifier: Apache-2.0
"""What the scheduler side tells the worker side, once a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

BlockIds = tuple[list[int], ...]
"""KV block ids, one list a KV cache group."""


@dataclass(frozen=True)
class PrefillChunk:
    """One step of one prefill: after it, `computed_after` of `prompt_tokens` tokens have KV.

    `block_ids` (empty if the step brought none) are appended to what is known, or replace it if
    `restart` is set (after a preemption, or for a new request).
    """

    req_id: str
    transfer_id: str
    prompt_tokens: int
    computed_after: int
    block_ids: BlockIds
    restart: bool


@dataclass(frozen=True)
class PrefillEnd:
    """The prefill request left the scheduler; `complete` if all of its prompt was computed.

    `held`: its blocks stay allocated until the worker reports the request as sent.
    """

    req_id: str
    transfer_id: str
    complete: bool
    held: bool


@dataclass(frozen=True)
class Load:
    """Ask the prefill worker to fill these blocks; they are the tail of the prompt's pages."""

    req_id: str
    transfer_id: str
    engine: str
    incarnation: int | None
    prompt_tokens: int
    block_ids: BlockIds


@dataclass(frozen=True)
class RemoteTransfer:
    """A transfer as the decode side names it."""

    transfer_id: str
    engine: str


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Everything one scheduler step hands to the workers."""

    chunks: list[PrefillChunk] = field(default_factory=list)
    ends: list[PrefillEnd] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    expected: list[RemoteTransfer] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    releases: list[RemoteTransfer] = field(default_factory=list)

    def is_empty(self) -> bool:
        """True if no worker has anything to do with it."""
        return not any(vars(self).values())

# SPDX-License-Identifier: Apache-2.0
"""Scheduler side of a prefill engine: which request has computed how much, in which blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from rdma_kv_cache.connector.metadata import BlockIds, PrefillChunk, PrefillEnd, StepMetadata

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from rdma_kv_cache.connector.settings import Settings


class ProducerScheduler:
    """Follows requests with `do_remote_decode`."""

    def __init__(self, settings: Settings, tp_size: int) -> None:
        self._settings = settings
        self._tp_size = tp_size
        self._requests: dict[str, tuple[str, int]] = {}
        self._started: set[str] = set()
        self._ends: list[PrefillEnd] = []

    def on_new_request(self, request: Request) -> None:
        """Remember the transfer that this prefill is for."""
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode"):
            transfer_id = params.get("transfer_id") or request.request_id
            self._requests[request.request_id] = (transfer_id, request.num_prompt_tokens)

    def fill(self, meta: StepMetadata, output: SchedulerOutput) -> None:
        """Add this step's chunks, ends and preemptions."""
        for new in output.scheduled_new_reqs:
            self._chunk(meta, output, new.req_id, new.num_computed_tokens, new.block_ids, True)
        cached = output.scheduled_cached_reqs
        for req_id, computed, block_ids in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            resumed = req_id in cached.resumed_req_ids
            self._chunk(meta, output, req_id, computed, block_ids or (), resumed)
        meta.preempted.extend(r for r in output.preempted_req_ids or () if r in self._requests)
        meta.ends, self._ends = self._ends, []

    def request_finished(
        self, request: Request, block_ids: BlockIds
    ) -> tuple[bool, dict[str, Any] | None]:
        """Hold the blocks until they are sent, and tell a two-step proxy where they are."""
        known = self._requests.pop(request.request_id, None)
        if known is None:
            return False, None
        transfer_id, prompt_tokens = known
        complete = (
            request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
            and request.num_computed_tokens >= prompt_tokens
        )
        held = request.request_id in self._started
        self._started.discard(request.request_id)
        self._ends.append(PrefillEnd(request.request_id, transfer_id, complete, held))
        params = self._params(transfer_id, prompt_tokens, block_ids) if complete else None
        return held, params

    def has_pending_work(self) -> bool:
        """True while a worker has not been told of an end."""
        return bool(self._ends)

    def _chunk(
        self,
        meta: StepMetadata,
        output: SchedulerOutput,
        req_id: str,
        computed_before: int,
        block_ids: BlockIds,
        restart: bool,
    ) -> None:
        known = self._requests.get(req_id)
        if known is None:
            return
        transfer_id, prompt_tokens = known
        computed_after = computed_before + output.num_scheduled_tokens[req_id]
        self._started.add(req_id)
        meta.chunks.append(
            PrefillChunk(
                req_id, transfer_id, prompt_tokens, computed_after, tuple(block_ids), restart
            )
        )

    def _params(self, transfer_id: str, prompt_tokens: int, block_ids: BlockIds) -> dict[str, Any]:
        """The keys of NIXL's protocol, which stock two-step proxies copy to decode verbatim."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self._settings.engine,
            "remote_incarnation": str(self._settings.incarnation),
            "remote_request_id": transfer_id,
            "remote_block_ids": [list(ids) for ids in block_ids],
            "remote_host": None,
            "remote_port": None,
            "remote_num_tokens": prompt_tokens,
            "tp_size": self._tp_size,
        }

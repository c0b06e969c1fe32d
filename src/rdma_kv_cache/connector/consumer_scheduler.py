# SPDX-License-Identifier: Apache-2.0
"""Scheduler side of a decode engine: which KV to ask for, and what to give up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdma_kv_cache.connector.log import get_logger
from rdma_kv_cache.connector.metadata import Load, RemoteTransfer, StepMetadata

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = get_logger(__name__)


class ConsumerScheduler:
    """Follows requests with `do_remote_prefill`, each of which is asked for once at most.

    A request that is preempted or whose load failed is recomputed here.
    """

    def __init__(self) -> None:
        self._expected: dict[str, RemoteTransfer] = {}
        self._incarnations: dict[str, int | None] = {}
        self._loading: set[str] = set()
        self._next = StepMetadata()

    def on_new_request(self, request: Request) -> None:
        """Keep the prefill engine's lease alive while the request waits for its turn."""
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_prefill"):
            return
        transfer_id, engine = params.get("remote_request_id"), params.get("remote_engine_id")
        if not transfer_id or not engine:
            logger.warning(
                "request %s: kv_transfer_params lack remote_request_id or remote_engine_id; "
                "its prompt is computed here",
                request.request_id,
            )
            return
        transfer = RemoteTransfer(str(transfer_id), str(engine))
        incarnation = params.get("remote_incarnation")
        self._expected[request.request_id] = transfer
        self._incarnations[request.request_id] = int(incarnation) if incarnation else None
        self._next.expected.append(transfer)

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that prefill will provide beyond the local prefix hit; free of side effects."""
        if request.request_id not in self._expected:
            return 0, False
        missing = request.num_prompt_tokens - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Blocks were allocated: ask for their content, or say that nothing is needed."""
        transfer = self._expected.pop(request.request_id, None)
        if transfer is None:
            return
        incarnation = self._incarnations.pop(request.request_id)
        if num_external_tokens == 0:
            self._next.releases.append(transfer)
            return
        self._loading.add(request.request_id)
        self._next.loads.append(
            Load(
                req_id=request.request_id,
                transfer_id=transfer.transfer_id,
                engine=transfer.engine,
                incarnation=incarnation,
                prompt_tokens=request.num_prompt_tokens,
                block_ids=tuple(blocks.get_unhashed_block_ids_all_groups()),
            )
        )

    def received(self, req_ids: set[str]) -> None:
        """These requests' loads ended, well or not."""
        self._loading -= req_ids

    def request_finished(self, request: Request) -> None:
        """Give up what was not needed: release it at prefill, or cancel the running load."""
        transfer = self._expected.pop(request.request_id, None)
        if transfer is not None:
            del self._incarnations[request.request_id]
            self._next.releases.append(transfer)
        if request.request_id in self._loading:
            self._next.cancels.append(request.request_id)

    def fill(self, meta: StepMetadata) -> None:
        """Add what happened since the last step."""
        meta.expected, meta.loads = self._next.expected, self._next.loads
        meta.cancels, meta.releases = self._next.cancels, self._next.releases
        self._next = StepMetadata()

    def has_pending_work(self) -> bool:
        """True while a worker has not been told of something."""
        return not self._next.is_empty()

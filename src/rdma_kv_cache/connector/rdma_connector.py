# SPDX-License-Identifier: Apache-2.0
"""`RDMAConnector`: the class that vLLM loads, a facade over the scheduler and the worker side."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)

from rdma_kv_cache.connector.consumer_scheduler import ConsumerScheduler
from rdma_kv_cache.connector.metadata import StepMetadata
from rdma_kv_cache.connector.producer_scheduler import ProducerScheduler
from rdma_kv_cache.connector.settings import Settings
from rdma_kv_cache.connector.stats import TransferPromMetrics, TransferStats

try:  # vLLM >= 0.30; older runners call get_finished() only
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
except ImportError:
    KVConnectorTransferResults = None

# Older schedulers have no way to be told of a failed load in a model of several KV cache groups.
# Without this base vLLM keeps one group (sliding windows are cached as full attention), where a
# failed load is recomputed.
_Hybrid: type = SupportsHMA if KVConnectorTransferResults is not None else object

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from rdma_kv_cache.connector.metadata import BlockIds
    from rdma_kv_cache.connector.worker import ConnectorWorker


class RDMAConnector(KVConnectorBase_V1, _Hybrid):
    """Pushes KV pages from prefill to decode, layer by layer; see ARCHITECTURE.md."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._settings = settings = Settings.from_kv_transfer_config(transfer)
        self._worker: ConnectorWorker | None = None
        self._producer: ProducerScheduler | None = None
        self._consumer: ConsumerScheduler | None = None
        if role == KVConnectorRole.WORKER:
            return
        if transfer.is_kv_producer:
            tp_size = vllm_config.parallel_config.tensor_parallel_size
            self._producer = ProducerScheduler(settings, tp_size)
        if transfer.is_kv_consumer:
            self._consumer = ConsumerScheduler()

    # Asked before there is an instance

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Heads outermost in a page: then a TP rank's heads are one run of bytes in it, and engines
        of different TP sizes can meet. It costs the attention kernels nothing."""
        if vllm_config.model_config is None or vllm_config.model_config.use_mla:
            return None  # one latent 'head': no order to choose
        # vLLM >= 0.29 names all dimensions: layers, blocks, heads, tokens (N), content.
        return "LBHNC" if find_spec("vllm.v1.kv_cache_layout") is not None else "HND"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """True for prefill: one CUDA graph of the whole model has no layer hooks, and its pages
        could go only when all layers are computed. Prefill gains little by such graphs: they are
        for short steps. Decode, which lives by them, sends nothing and keeps them."""
        return bool(extra_config.get("piecewise_graphs", False))

    # Scheduler side

    def on_new_request(self, request: Request) -> None:
        """See base class."""
        for side in (self._producer, self._consumer):
            if side is not None:
                side.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """See base class."""
        if self._consumer is None:
            return 0, False
        return self._consumer.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See base class."""
        if self._consumer is not None:
            self._consumer.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        """See base class."""
        meta = StepMetadata()
        if self._producer is not None:
            self._producer.fill(meta, scheduler_output)
        if self._consumer is not None:
            self._consumer.fill(meta)
        return meta

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See base class."""
        if self._consumer is not None:
            self._consumer.received(set(connector_output.finished_recving or ()))

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See base class."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: BlockIds
    ) -> tuple[bool, dict[str, Any] | None]:
        """See base class."""
        if self._consumer is not None:
            self._consumer.request_finished(request)
        if self._producer is not None:
            return self._producer.request_finished(request, block_ids)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Keep stepping until the workers know what the scheduler side decided."""
        return any(
            side is not None and side.has_pending_work()
            for side in (self._producer, self._consumer)
        )

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """See base class: a transfer brings every group's own blocks."""
        return tuple(self._kv_cache_config.transfer_group_ids)

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The KV pool exists: register it and meet the engine rank."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        # Not at module level: config code imports this class where no engine may be loaded.
        from rdma_kv_cache.connector.compatibility import describe
        from rdma_kv_cache.connector.layout import KVLayout
        from rdma_kv_cache.connector.memory import CudaMemory, HostMemory
        from rdma_kv_cache.connector.worker import ConnectorWorker

        transfer, parallel = self._vllm_config.kv_transfer_config, self._vllm_config.parallel_config
        if transfer.is_kv_producer and getattr(parallel, "use_ubatching", False):
            raise ValueError(
                "RDMAConnector: with micro-batches (--enable-dbo) a layer hook comes before all "
                "tokens of the layer are computed; start the prefill engines without them"
            )
        model, tp_size = self._vllm_config.model_config, int(parallel.tensor_parallel_size)
        kv_heads = 1 if model.use_mla else int(model.get_total_num_kv_heads())
        layout = KVLayout.from_tensors(kv_caches, self._kv_cache_config, tp_size, kv_heads)
        device = next(iter(kv_caches.values())).device
        self._worker = ConnectorWorker(
            self._settings,
            layout,
            describe(self._vllm_config, layout),
            tp_rank=int(get_tensor_model_parallel_rank()),
            tp_size=tp_size,
            memory=HostMemory() if device.type == "cpu" else CudaMemory(device),
            produces=transfer.is_kv_producer,
            consumes=transfer.is_kv_consumer,
        )

    def handle_preemptions(self, kv_connector_metadata: StepMetadata) -> None:
        """See base class."""
        self._the_worker.preempt(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        """Begin the step here: `start_load_kv` comes after the forward pass on newer vLLM."""
        super().bind_connector_metadata(connector_metadata)
        self._the_worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to start: loads were asked for when the step's metadata was bound."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs only after all of its KV arrived."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """A layer's pages of this step are written; send them while the next layer computes."""
        self._the_worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        """The step is over; nothing is waited for."""
        self._the_worker.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See base class (vLLM < 0.30)."""
        sent, received, _ = self._the_worker.take_finished()
        return sent, received

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """See base class (vLLM >= 0.30)."""
        sent, received, failed = self._the_worker.take_finished()
        return KVConnectorTransferResults(
            finished_sending=sent, finished_recving=received, failed_recving=failed
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See base class."""
        return self._the_worker.take_failed_blocks()

    def get_kv_connector_stats(self) -> TransferStats | None:
        """See base class; asked of the scheduler side as well, which has none."""
        return None if self._worker is None else self._worker.take_stats()

    def shutdown(self) -> None:
        """See base class."""
        if self._worker is not None:
            self._worker.shutdown()

    # Metrics

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> TransferStats:
        """See base class."""
        return TransferStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> TransferPromMetrics:
        """See base class."""
        return TransferPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _the_worker(self) -> ConnectorWorker:
        assert self._worker is not None, (
            "a worker-side call before register_kv_caches, or on the scheduler"
        )
        return self._worker

# SPDX-License-Identifier: Apache-2.0
"""Offline batches: OpenAI Batch lines in and out, against any OpenAI-compatible URL."""

from rdma_kv_cache.batch.errors import BatchError
from rdma_kv_cache.batch.lines import InputInfo, scan
from rdma_kv_cache.batch.progress import check_input, progress_path
from rdma_kv_cache.batch.run import BatchOptions, BatchResult, run_batch

__all__ = [
    "BatchError",
    "BatchOptions",
    "BatchResult",
    "InputInfo",
    "check_input",
    "progress_path",
    "run_batch",
    "scan",
]

# SPDX-License-Identifier: Apache-2.0
"""Whether two engines' KV pages mean the same bytes.

A page is copied, never converted, so everything that shapes its content must agree. The fields are
exchanged by name: a refusal says which one differs, not only that a hash does.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from rdma_kv_cache.connector.layout import KVLayout

CONNECTOR_VERSION = 2
"""Raise on any change of messages.py or of the meaning of a page."""


def describe(config: VllmConfig, layout: KVLayout) -> dict[str, str]:
    """Name and value of every property that the two ends must share, most telling first."""
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends

    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    backends = sorted({b.get_name() for b in get_current_attn_backends(config)})
    return {
        "connector version": str(CONNECTOR_VERSION),
        "vLLM version": vllm.__version__,
        "model": PurePath(model.model).name,
        "model config": _digest(_hf_config(config)),
        "dtype": str(model.dtype),
        "KV cache dtype": str(cache.cache_dtype),
        "pipeline_parallel_size": str(parallel.pipeline_parallel_size),
        "block size": ",".join(map(str, layout.block_tokens)),
        "attention backend": ",".join(backends),
        "CPU instruction set": _cpu_isa(config, backends),
        "KV cache layout": _page_order(layout),
        "layers": str(len(layout.layers)),
        # By head, as engines of different TP sizes can meet: see heads.py.
        "layer pages": _digest(
            [(x.name, x.group, x.kv_heads, x.page_bytes // (x.heads or 1)) for x in layout.layers]
        ),
    }


def first_difference(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """The first field that differs, as text with both values, or None."""
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        here, there = ours.get(name, "absent"), theirs.get(name, "absent")
        if here != there:
            return f"{name}: {here} here, {there} there"
    return None


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _page_order(layout: KVLayout) -> str:
    """What is outermost in a page, as the tensors say; vLLM's names for it change."""
    orders = {"head-major" if x.head_major else "token-major" for x in layout.layers}
    return ",".join(sorted(orders))


def _hf_config(config: VllmConfig) -> dict[str, object]:
    """The model's own configuration without what depends on where it was loaded from."""
    fields = config.model_config.hf_config.to_dict()
    local = ("_name_or_path", "transformers_version")
    return {key: value for key, value in fields.items() if key not in local}


def _cpu_isa(config: VllmConfig, backends: list[str]) -> str:
    """The CPU backend packs K and V for the instruction set it runs on; other backends: none."""
    if not any("CPU" in name for name in backends):
        return "none"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = config.model_config, config.cache_config
    return str(_get_attn_isa(model.dtype, cache.block_size, model.get_head_size()))

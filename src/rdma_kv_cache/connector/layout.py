# SPDX-License-Identifier: Apache-2.0
"""Where the pages of the paged KV cache are, read from vLLM's tensors.

From vLLM 0.25 on, one block of one layer is one contiguous page with the block index outermost in
the layer's tensor, whatever the backend, so `data_ptr() + block * stride(0)` holds on all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rdma_kv_cache.connector.messages import RemoteLayer

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class Layer:
    """One layer's pages: block b starts at `base + b * block_stride` and has `page_bytes` bytes.

    A page holds `heads` of the layer's `kv_heads` KV heads (0: not told); with `head_major` the
    bytes of each head are one run, head after head.
    """

    name: str
    group: int
    base: int
    block_stride: int
    page_bytes: int
    heads: int = 0
    kv_heads: int = 0
    head_major: bool = False


@dataclass(frozen=True)
class KVLayout:
    """All layers in execution order; `block_tokens[g]` tokens fill a page of KV cache group g."""

    layers: tuple[Layer, ...]
    block_tokens: tuple[int, ...]
    num_blocks: int
    storages: tuple[tuple[int, int], ...]

    @classmethod
    def from_tensors(
        cls,
        kv_caches: dict[str, torch.Tensor],
        config: KVCacheConfig,
        tp_size: int = 1,
        model_kv_heads: int = 1,
    ) -> KVLayout:
        """Read the layout of `register_kv_caches`' tensors (logical shape [blocks, …]).

        `model_kv_heads` tells how many heads there are where each rank has one of them. Raises
        ValueError for a cache whose pages are not contiguous.
        """
        groups = {
            name: index
            for index, group in enumerate(config.kv_cache_groups)
            for name in group.layer_names
        }
        found = []
        for name, tensor in kv_caches.items():
            if name in groups:
                layer = _layer(name, groups[name], tensor, config.num_blocks)
                is_split = tensor.shape[0] != config.num_blocks
                found.append(_with_heads(layer, tensor, is_split, tp_size, model_kv_heads))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in kv_caches.values()
        }
        return cls(
            layers=tuple(found),
            block_tokens=tuple(g.kv_cache_spec.block_size for g in config.kv_cache_groups),
            num_blocks=config.num_blocks,
            storages=tuple(storages.items()),
        )

    def pages(self, group: int, tokens: int) -> int:
        """Number of pages of `group` that `tokens` tokens touch."""
        return -(-tokens // self.block_tokens[group])

    def final_pages(self, group: int, computed: int, prompt_tokens: int) -> int:
        """Leading pages of `group` that no later step of this prefill changes."""
        if computed >= prompt_tokens:
            return self.pages(group, prompt_tokens)
        return computed // self.block_tokens[group]

    def describe(self) -> list[RemoteLayer]:
        """The layers as a peer needs them."""
        return [
            RemoteLayer(
                x.name, x.base, x.block_stride, x.page_bytes, x.heads, x.kv_heads, x.head_major
            )
            for x in self.layers
        ]


def _layer(name: str, group: int, tensor: torch.Tensor, num_blocks: int) -> Layer:
    """Geometry of one layer; kernel blocks smaller than a KV block are regrouped."""
    element = tensor.element_size()
    rows, row_stride = tensor.shape[0], tensor.stride(0) * element
    row_bytes = math.prod(tensor.shape[1:]) * element
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    kernel_blocks, rest = divmod(rows, num_blocks)
    if rest or kernel_blocks < 1 or span * element != row_bytes:
        raise ValueError(
            f"layer {name}: the KV cache of shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()} over {num_blocks} blocks has no contiguous page a block"
        )
    if kernel_blocks > 1 and row_stride != row_bytes:
        raise ValueError(
            f"layer {name}: a KV block of {kernel_blocks} kernel blocks is not contiguous; "
            "choose --block-size equal to the attention kernel's block"
        )
    return Layer(
        name=name,
        group=group,
        base=tensor.data_ptr(),
        block_stride=row_stride * kernel_blocks,
        page_bytes=row_bytes * kernel_blocks,
    )


def _with_heads(
    layer: Layer, tensor: torch.Tensor, is_split: bool, tp_size: int, model_kv_heads: int
) -> Layer:
    """Add what a cache of the logical shape [blocks, heads, tokens, content] tells of its heads.

    `is_split`: a page is several blocks of the attention kernel.
    """
    if tensor.dim() != 4:
        return layer
    heads = int(tensor.shape[1])
    is_replicated = heads == 1 and tp_size > model_kv_heads
    return replace(
        layer,
        heads=heads,
        kv_heads=model_kv_heads if is_replicated else heads * tp_size,
        head_major=heads == 1 or (not is_split and tensor.stride(1) > tensor.stride(2)),
    )

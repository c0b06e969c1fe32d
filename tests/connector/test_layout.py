# SPDX-License-Identifier: Apache-2.0
"""Page addresses are read from the tensors, whatever the shape around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rdma_kv_cache.connector.layout import KVLayout


def config(num_blocks: int, *groups: list[str], block_tokens: int = 16) -> Any:
    """What a KVCacheConfig must have."""
    return SimpleNamespace(
        num_blocks=num_blocks,
        kv_cache_groups=[
            SimpleNamespace(
                layer_names=names, kv_cache_spec=SimpleNamespace(block_size=block_tokens)
            )
            for names in groups
        ],
    )


def test_layers_over_one_storage() -> None:
    pool = torch.arange(2 * 8 * 3 * 16 * 4, dtype=torch.float32).reshape(2, 8, 3, 16, 4)
    layout = KVLayout.from_tensors({"a": pool[0], "b": pool[1]}, config(8, ["a", "b"]))
    assert layout.storages == ((pool.data_ptr(), pool.nbytes),)
    assert [x.page_bytes for x in layout.layers] == [3 * 16 * 4 * 4] * 2
    assert layout.layers[1].base == pool[1].data_ptr()
    assert layout.layers[1].base + 5 * layout.layers[1].block_stride == pool[1, 5].data_ptr()


def test_blocks_outermost_with_layers_inside() -> None:
    pool = torch.zeros(8, 2, 64)
    layout = KVLayout.from_tensors({"a": pool[:, 0], "b": pool[:, 1]}, config(8, ["a"], ["b"]))
    assert [x.block_stride for x in layout.layers] == [2 * 64 * 4] * 2
    assert [x.page_bytes for x in layout.layers] == [64 * 4] * 2
    assert [x.group for x in layout.layers] == [0, 1]


def test_head_major_pages_are_contiguous_too() -> None:
    pool = torch.zeros(8, 3, 16, 4).permute(0, 2, 1, 3)
    layout = KVLayout.from_tensors({"a": pool}, config(8, ["a"]))
    assert layout.layers[0].page_bytes == 3 * 16 * 4 * 4


def test_kernel_blocks_are_regrouped() -> None:
    layout = KVLayout.from_tensors({"a": torch.zeros(16, 8)}, config(8, ["a"]))
    assert (layout.layers[0].page_bytes, layout.layers[0].block_stride) == (64, 64)


def test_scattered_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="no contiguous page"):
        KVLayout.from_tensors({"a": torch.zeros(2, 8, 64).transpose(0, 1)}, config(8, ["a"]))
    with pytest.raises(ValueError, match="no contiguous page"):
        KVLayout.from_tensors({"a": torch.zeros(9, 4)}, config(8, ["a"]))


@pytest.mark.parametrize(
    ("computed", "pages"), [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2), (40, 3)]
)
def test_final_pages(computed: int, pages: int) -> None:
    layout = KVLayout.from_tensors({"a": torch.zeros(8, 4)}, config(8, ["a"]))
    assert layout.final_pages(0, computed, prompt_tokens=40) == pages

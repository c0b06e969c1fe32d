# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights, of architectures that the shipped model is not.

Their texts mean nothing, but each token depends on all of the KV that it attends to: the weights
are large enough for that.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from tests.support.vllm_server import MODEL

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = 80
"""Tokens of the sliding window: not a multiple of a block."""

_COMMON: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}  # fmt: skip


def llama(folder: Path) -> Path:
    """Full attention, four KV heads (the shipped model has three)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(folder, LlamaForCausalLM, LlamaConfig(**_COMMON, tie_word_embeddings=False))


def gemma3(folder: Path) -> Path:
    """Sliding windows with full attention in every second layer: two KV cache groups."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **_COMMON, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=32
    )
    return _save(folder, Gemma3ForCausalLM, config)


def _save(folder: Path, model: Any, config: Any) -> Path:
    import torch

    torch.manual_seed(5)
    model(config).to(torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder

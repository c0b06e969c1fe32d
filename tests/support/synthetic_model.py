# SPDX-License-Identifier: Apache-2.0
"""Model folders made on the spot: a shape with any tokenizer, with or without weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tests.support.vllm_server import MODEL

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SEED = 20


@dataclass(frozen=True)
class Shape:
    """A Llama's shape; the vocabulary is the tokenizer's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    vocab_size: int = 49152

    def kv_bytes_per_token(self, element: int) -> int:
        """Bytes of KV of one token, with elements of `element` bytes."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * element


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128, 40960)
"""Llama 3 8B, but for the vocabulary: 14.8 GB in bfloat16."""
SMALL = Shape(512, 1024, 12, 8, 4, 64, 8192)
"""Quick everywhere: 0.3 GB in float32, and as many layers as a test needs to mix them up."""


def write_config(folder: Path, shape: Shape, dtype: str) -> Path:
    """Write configuration and tokenizer, for `--load-format dummy`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **asdict(shape), "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER_FILES:
        if (MODEL / name).exists():
            shutil.copy(MODEL / name, folder / name)
    return folder


def write_weights(folder: Path, shape: Shape) -> None:
    """Write random float32 weights whose answers depend on every page of KV.

    vLLM's own dummy weights do not: all of them, the norms' included, lie within 0.001, so that
    attention adds nothing to a token's embedding, and garbage in the KV cache changes no answer.
    Here attention is sharp (queries and keys are large), and weighs as much as the embedding.
    """
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads = shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns) * (gain / columns**0.5)

    tensors = {
        "model.embed_tokens.weight": torch.randn(shape.vocab_size, hidden),
        "lm_head.weight": matrix(shape.vocab_size, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for index in range(shape.num_hidden_layers):
        tensors |= {
            f"model.layers.{index}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": torch.ones(hidden),
                "post_attention_layernorm": torch.ones(hidden),
                "self_attn.q_proj": matrix(heads, hidden, 1.5),
                "self_attn.k_proj": matrix(kv, hidden, 1.5),
                "self_attn.v_proj": matrix(kv, hidden),
                "self_attn.o_proj": matrix(hidden, heads),
                "mlp.gate_proj": matrix(inner, hidden),
                "mlp.up_proj": matrix(inner, hidden),
                "mlp.down_proj": matrix(hidden, inner),
            }.items()
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_sliding_window_model(folder: Path, window: int) -> Path:
    """Write a Gemma 3 whose layers see `window` tokens and the whole prompt by turns.

    All KV matters here too: norms give attention the weight 1, and the embedding has 0.2.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, query_pre_attn_scalar=32,
        max_position_embeddings=4096, initializer_range=0.3, sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = Gemma3ForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.05)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (MODEL / name).exists():
            shutil.copy(MODEL / name, folder / name)
    return folder

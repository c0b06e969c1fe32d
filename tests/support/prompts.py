# SPDX-License-Identifier: Apache-2.0
"""Prompts of exact token counts, cut from a real text."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tests.support.vllm_server import MODEL, REPO

if TYPE_CHECKING:
    from collections.abc import Iterable


@lru_cache
def corpus() -> list[int]:
    """Token ids of the licence text, three times over (about 7,000)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return list(tokenizer.encode((REPO / "LICENSE").read_text()).ids) * 3


def prompt(tokens: int, offset: int = 0) -> list[int]:
    """`tokens` token ids, beginning `offset` tokens into the corpus."""
    return corpus()[offset : offset + tokens]


def boundary_lengths(block: int, chunk: int, longest: int) -> list[int]:
    """Lengths one below, at and one above every boundary that the transfer knows, and some odd."""
    edges: Iterable[int] = [
        *(block * n for n in (1, 2, 3, 4, 5, 6, 7)),
        *(chunk * n + block * m for n in (1, 2, 3) for m in (-1, 0, 1)),
        longest,
    ]
    around = {edge + delta for edge in edges for delta in (-1, 0, 1)}
    return sorted(
        {1, 2, 3, 5, 8, 13, 17, 50, 77, 100, 333, 444, 600, 777, 1111, 1300, 1499, 1500} | around
    )

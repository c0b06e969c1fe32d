# SPDX-License-Identifier: Apache-2.0
"""Which part of a page goes from which prefill rank to which decode rank. Pure arithmetic.

Tensor parallelism gives each rank some of a layer's KV heads, in order; if there are more ranks
than heads, neighbours hold the same head. With heads outermost in a page a run of them is a run of
bytes, so engines of different TP sizes exchange slices of pages. With one TP size on both sides
whole pages go from each rank to its namesake, whatever their layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rdma_kv_cache.connector.messages import RemoteLayer


@dataclass(frozen=True)
class Slice:
    """Bytes [source, source + nbytes) of a prefill page, to offset `target` of a decode page."""

    source: int
    target: int
    nbytes: int


def held(kv_heads: int, tp_size: int, tp_rank: int) -> range:
    """The KV heads of a layer that a rank holds, as vLLM deals them out.

    Raises ValueError if neither of the two counts divides the other.
    """
    if kv_heads % tp_size == 0:
        count = kv_heads // tp_size
        return range(tp_rank * count, (tp_rank + 1) * count)
    if tp_size % kv_heads == 0:
        head = tp_rank // (tp_size // kv_heads)
        return range(head, head + 1)
    raise ValueError(f"{kv_heads} KV heads cannot be dealt out to {tp_size} TP ranks")


def givers(kv_heads: int, prefill_tp: int, decode_tp: int, decode_rank: int) -> dict[int, range]:
    """The heads that each prefill rank gives to one decode rank; every head comes from one.

    Of prefill ranks that hold the same head, different decode ranks take different ones.
    """
    found: dict[int, range] = {}
    for head in held(kv_heads, decode_tp, decode_rank):
        holders = [r for r in range(prefill_tp) if head in held(kv_heads, prefill_tp, r)]
        rank = holders[decode_rank % len(holders)]
        first = found[rank].start if rank in found else head
        found[rank] = range(first, head + 1)
    return found


def source_ranks(
    layers: Sequence[RemoteLayer], prefill_tp: int, decode_tp: int, decode_rank: int
) -> set[int]:
    """The prefill ranks that have something for this decode rank."""
    if prefill_tp == decode_tp:
        return {decode_rank}
    return {
        rank
        for kv_heads in {layer.kv_heads for layer in layers}
        for rank in givers(kv_heads, prefill_tp, decode_tp, decode_rank)
    }


def target_ranks(
    layers: Sequence[RemoteLayer], prefill_tp: int, decode_tp: int, prefill_rank: int
) -> set[int]:
    """The decode ranks that this prefill rank has something for."""
    return {
        rank
        for rank in range(decode_tp)
        if prefill_rank in source_ranks(layers, prefill_tp, decode_tp, rank)
    }


def slices(
    prefill: Sequence[RemoteLayer],
    prefill_tp: int,
    prefill_rank: int,
    decode: Sequence[RemoteLayer],
    decode_tp: int,
    decode_rank: int,
) -> list[Slice | None]:
    """What goes from a prefill rank to a decode rank in each page of each layer; None: nothing.

    Raises ValueError with the reason if these engines cannot exchange pages.
    """
    if prefill_tp == decode_tp:
        same = prefill_rank == decode_rank
        return [Slice(0, 0, layer.page_bytes) if same else None for layer in prefill]
    found: list[Slice | None] = []
    for here, there in zip(prefill, decode, strict=True):
        for layer, tp_size, rank in (
            (here, prefill_tp, prefill_rank),
            (there, decode_tp, decode_rank),
        ):
            _check(layer, tp_size, rank, f"tensor_parallel_size: {prefill_tp} and {decode_tp}")
        heads = givers(here.kv_heads, prefill_tp, decode_tp, decode_rank).get(prefill_rank)
        if heads is None:
            found.append(None)
            continue
        head_bytes = here.page_bytes // here.heads
        found.append(
            Slice(
                (heads.start - held(here.kv_heads, prefill_tp, prefill_rank).start) * head_bytes,
                (heads.start - held(here.kv_heads, decode_tp, decode_rank).start) * head_bytes,
                len(heads) * head_bytes,
            )
        )
    return found


def _check(layer: RemoteLayer, tp_size: int, tp_rank: int, what: str) -> None:
    """Raise ValueError unless pages of this layer can be cut by heads."""
    if not layer.head_major:
        raise ValueError(
            f"{what}: layer {layer.name} does not have heads outermost in a page, so the heads of "
            "a rank are scattered over it; give prefill and decode one TP size, or both an "
            "attention backend with the layout HND (LBHNC)"
        )
    if len(held(layer.kv_heads, tp_size, tp_rank)) != layer.heads:
        raise ValueError(
            f"{what}: layer {layer.name} has {layer.heads} of {layer.kv_heads} KV heads on TP rank "
            f"{tp_rank} of {tp_size}, which is not how they are dealt out evenly; give prefill and "
            "decode one TP size"
        )
